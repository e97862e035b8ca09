"""Shapes: what can be cut out of a model as a whole, what of it should go, and how the rest is saved so that it opens again."""
