"""Timings and memory; ratios are measured within one run."""
