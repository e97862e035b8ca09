"""Evaluation: perplexity, divergence from the dense model, likelihood tasks, latency, and paired comparison."""
