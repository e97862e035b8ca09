"""Quantization: grids of few-bit integers, and the integers that a layer's outputs miss least."""
