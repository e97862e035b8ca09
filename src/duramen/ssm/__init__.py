"""Exact scans of state-space layers, on a processor first: with states in and out, padding that holds, and steps that decay without writing."""
