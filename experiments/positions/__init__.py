"""Positional encodings × ways of mixing, on four tasks."""
