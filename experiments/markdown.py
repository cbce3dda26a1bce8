"""Tables in Markdown, and how a number over seeds is written."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

__all__ = ["NONE", "spread", "table"]

NONE = "—"  # where there is no number


def table(header: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """A table that ends with a line break.

    Args:
        header: titles of the columns.
        rows: as many cells each.
        words: how many columns from the left hold words; numbers stand on the right.
    """
    aligned = [":--"] * words + ["--:"] * (len(header) - words)
    shown = [f"| {' | '.join(row)} |" for row in (header, *rows)]
    return "\n".join([shown[0], f"|{'|'.join(aligned)}|", *shown[1:], ""])


def spread(values: Iterable[float | None], form: str) -> str:
    """Mean ± standard deviation of those there are.

    Args:
        values: by seed; None where there is none.
        form: of ``str.format``.
    """
    numbers = [value for value in values if value is not None]
    if not numbers:
        return NONE
    mean = form.format(statistics.fmean(numbers))
    return f"{mean} ± {form.format(statistics.stdev(numbers))}" if len(numbers) > 1 else mean
