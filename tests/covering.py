"""Covering tables: of all valid rows, few that together show every pair of values; the others wait for ``-m full``."""

import heapq
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest

full = False  # conftest.py says whether the run asks for the others


def cover(rows: Sequence[tuple], strength: int = 2) -> list[int]:
    """Greedy: the row that shows most of what is not yet shown, the first of equals. Where it stands, in order."""
    shown = [frozenset(itertools.combinations(enumerate(row), min(strength, len(row)))) for row in rows]
    missing, chosen = set().union(*shown), []
    queue = [(-len(each), i) for i, each in enumerate(shown)]
    heapq.heapify(queue)
    while missing:
        _, i = heapq.heappop(queue)
        # What a row would add never grows, so one that is still ahead after a recount is the best of all.
        again = (-len(shown[i] & missing), i)
        if queue and again > queue[0]:
            heapq.heappush(queue, again)
        else:
            missing -= shown[i]
            chosen.append(i)
    return sorted(chosen)


def covering(rows: Iterable[tuple], strength: int = 2, name: Callable[[Any], str] | None = None) -> list[Any]:
    """A covering table as pytest parameters; ``name`` makes a row one argument with this id."""
    rows = list(rows)
    chosen = {rows[i] for i in cover(rows, strength)}
    return parameters(rows, chosen.__contains__, name)


def parameters(
    rows: Iterable[tuple], kept: Callable[[Any], bool], name: Callable[[Any], str] | None = None
) -> list[Any]:
    """The rows kept, and where the run asks for them the others, marked."""
    return [
        pytest.param(
            *([row] if name else row),
            id=name(row) if name else "-".join(map(str, row)),
            marks=() if kept(row) else pytest.mark.full,
        )
        for row in rows
        if full or kept(row)
    ]
