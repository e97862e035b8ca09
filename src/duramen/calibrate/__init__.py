"""Calibration: token batches, streaming statistics, and the walker that goes through a model block by block."""
