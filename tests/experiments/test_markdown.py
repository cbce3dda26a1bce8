"""Tables in a terminal: within 100 columns, nothing lost, each with a sentence that says what its numbers are."""

from __future__ import annotations

import importlib
import io
import re

import pytest
from rich.cells import cell_len
from rich.console import Console

from experiments import markdown
from experiments.draw import REPORTS
from experiments.markdown import says, show, table
from experiments.results import EXPERIMENTS, ROOT, load_results
from experiments.tables import other_tables, render_table


def shown(text: str, width: int = 300) -> list[str]:
    file = io.StringIO()
    show(Console(file=file, width=width), text)
    return file.getvalue().splitlines()


def texts() -> dict[str, str]:
    """All tables of the repository's results, by their markers."""
    return other_tables(ROOT) | {name: render_table(name, load_results(ROOT, name)) for name in EXPERIMENTS}


@pytest.mark.parametrize("width", [70, 100, 300])
def test_all_tables_of_the_repository_fit(width):
    for name, text in texts().items():
        lines = shown(text, width)
        assert max(map(cell_len, lines)) <= min(width, 100), name


def test_every_number_is_there_once_and_words_are_repeated():
    header = ["variant", *(f"number {i}" for i in range(12))]
    rows = [[f"row {r}", *(f"{r}.{i:02d} ± 0.001" for i in range(12))] for r in range(3)]
    lines = shown(table(header, rows))
    text = "\n".join(lines)
    assert all(text.count(cell) == 1 for row in rows for cell in row[1:])
    parts = text.count("variant")
    assert parts == text.count("row 0") == text.count("row 2") == 3
    assert max(map(cell_len, lines)) <= 100


def test_a_narrow_table_stays_one():
    lines = shown("What it says.\n\n" + table(["a", "b"], [["x", "1"], ["[y] \\| z", "2"]]) + "\nWhere from.\n")
    assert [line.split() for line in lines if line.strip() and "─" not in line] == [
        ["What", "it", "says."],
        ["a", "b"],
        ["x", "1"],
        ["[y]", "\\|", "z", "2"],
        ["Where", "from."],
    ]


def test_long_words_are_folded_and_not_cut():
    long = "w" * 70
    lines = shown(table([long, "n"], [["x", "1" * 150]]))
    assert "".join(lines).count("w") == 70
    assert "".join(lines).count("1") == 150
    assert max(map(cell_len, lines)) <= 100


@pytest.mark.parametrize("study", [name for name in REPORTS if name != "benchmarks"])  # whose tables bring theirs
def test_every_table_of_a_study_has_a_sentence(study):
    sentences = importlib.import_module(f"experiments.{study}.report").SAYS
    assert set(sentences) == {m for m in other_tables(ROOT) if re.fullmatch(rf"{study}(_[a-z_]+)?", m)}
    assert all(sentence.endswith(".") for sentence in sentences.values())


def test_a_table_without_its_sentence_is_no_table():
    assert says({"a": "It says."}, {"a": markdown.table(["x"], [["1"]])}) == "It says.\n\n| x |\n|:--|\n| 1 |\n"
    with pytest.raises(KeyError):
        says({}, {"a": ""})
