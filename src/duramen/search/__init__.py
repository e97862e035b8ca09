"""Training-free search for the sub-network that keeps most of a model under a budget."""
