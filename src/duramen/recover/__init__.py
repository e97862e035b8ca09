"""Winning back what compression cost."""
