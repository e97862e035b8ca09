"""Open release: the openness class of a model by the Model Openness Framework, and everything that earns it."""
