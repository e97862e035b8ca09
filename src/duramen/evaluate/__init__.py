"""Evaluation: perplexity, divergence from the dense model, likelihood tasks, latency, and paired comparison."""

import sys

from duramen.verb import Verb

sys.modules[__name__].__class__ = Verb
