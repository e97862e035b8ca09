"""Token reduction: which tokens of a sequence may leave between two layers, into which others they merge, and how many at which layer."""
