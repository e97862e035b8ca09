"""Writing results in formats that others open."""
