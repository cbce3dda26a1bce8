"""Tables in Markdown, how they are shown in a terminal, and how a number over seeds is written."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["NONE", "says", "show", "spread", "table"]

NONE = "—"  # where there is no number
_COLUMNS, _BETWEEN = 100, 3  # of a terminal, and between two of a table


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


def says(sentences: Mapping[str, str], tables: Mapping[str, str]) -> str:
    """Tables, each below the sentence that says what its numbers are."""
    return "\n".join(f"{sentences[name]}\n\n{text}" for name, text in tables.items())


def show(console: Console, text: str) -> None:
    """Print Markdown within 100 columns: of a wide table some columns at a time, the words on the left each time.

    Args:
        console: to print on.
        text: tables as ``table`` makes them, and lines of words.
    """
    width = min(console.width, _COLUMNS)
    for is_table, lines in _blocks(text):
        if is_table:
            for part in _parts([_cells(line) for line in lines], width):
                console.print(part, width=width)
        else:
            console.print("\n".join(lines), markup=False, highlight=False, width=width)


def _blocks(text: str) -> Iterator[tuple[bool, list[str]]]:
    """Lines of tables, and lines of words."""
    lines: list[str] = []
    for line in text.splitlines():
        if lines and lines[0].startswith("|") != line.startswith("|"):
            yield lines[0].startswith("|"), lines
            lines = []
        lines.append(line)
    if lines:
        yield lines[0].startswith("|"), lines


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip()[1:-1])]


def _parts(rows: list[list[str]], width: int) -> Iterator[Table]:
    """One table, or several that have the columns of words in common."""
    header, aligned, *body = rows
    columns = list(zip(header, *body, strict=True))
    words = next((i for i, mark in enumerate(aligned) if mark.endswith(":")), len(aligned))
    # A title is wrapped between words, a number is not; words are where there is room.
    sizes = [max(map(cell_len, [*title.split(), *cells])) for title, *cells in columns]
    sizes[:words] = [min(size, 44, width * 6 // 10 // words) for size in sizes[:words]]
    left = sum(sizes[:words]) + _BETWEEN * (words + 1)
    sizes[words:] = [min(size, width - left - _BETWEEN) for size in sizes[words:]]
    groups: list[list[int]] = [[]]
    for i in range(words, len(columns)):
        used = left + sum(sizes[j] + _BETWEEN for j in groups[-1])
        if groups[-1] and used + sizes[i] + _BETWEEN > width:
            groups.append([])
        groups[-1].append(i)
    for group in groups:
        part = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        chosen = [*range(words), *group]
        for i in chosen:
            part.add_column(
                Text(columns[i][0]), justify="right" if i in group else "left", width=sizes[i], overflow="fold"
            )
        for row in body:
            part.add_row(*(Text(row[i]) for i in chosen))
        yield part
