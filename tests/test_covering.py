"""The covering tables cover: what all rows show together, the chosen ones show."""

import itertools

import covering
import pytest
from cases import CLOCKS, FIRST_HOP, MASKS, METHODS, combinations

ROWS = [row for row in itertools.product("abcd", range(3), "xyz", (False, True)) if row[0] != "a" or row[1] == 0]


def _shown(rows, strength):
    """Which values meet, column by column."""
    return {
        (columns, tuple(row[i] for i in columns))
        for row in rows
        for columns in itertools.combinations(range(len(row)), strength)
    }


@pytest.mark.parametrize(("strength", "least"), [(1, 4), (2, 10), (3, 30), (4, len(ROWS))])
def test_every_meeting_of_values_is_chosen_and_few_rows_more(strength, least):
    """The least that any table has: all meetings of the two, three or four longest columns, one a row."""
    chosen = [ROWS[i] for i in covering.cover(ROWS, strength)]
    assert _shown(chosen, strength) == _shown(ROWS, strength)
    assert least <= len(chosen) <= 1.5 * least
    assert len(set(chosen)) == len(chosen)


def test_one_row_and_none():
    assert covering.cover([("a", 1)]) == [0]
    assert covering.cover([]) == []


def test_the_others_wait_until_they_are_asked_for(monkeypatch):
    monkeypatch.setattr(covering, "full", False)
    few = covering.covering(ROWS)
    assert not any(row.marks for row in few)
    monkeypatch.setattr(covering, "full", True)
    every = covering.covering(ROWS)
    assert [row.values for row in every] == ROWS
    assert [row for row in every if not row.marks] == few
    assert {mark.name for row in every for mark in row.marks} == {"full"}


def test_the_axioms_see_every_two_rows_of_their_tables_together():
    pairs = _shown([row.values[0] for row in combinations()], 2)
    for i, j, first, second in ((0, 1, CLOCKS, FIRST_HOP), (0, 3, CLOCKS, MASKS), (1, 3, FIRST_HOP, MASKS)):
        assert {((i, j), pair) for pair in itertools.product(first, second)} <= pairs
    suited = {(method, mask) for method in METHODS for mask in MASKS if ((2, 3), (method, mask)) in pairs}
    assert {("default", mask) for mask in MASKS} <= suited
    assert ("sweep", "none") not in suited
