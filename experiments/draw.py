"""Tables and figures from result files alone: no training, no network."""

from __future__ import annotations

from pathlib import Path


def draw(output: Path, experiments: list[str]) -> list[Path]:
    """Draw; returns what was written."""
    return []
