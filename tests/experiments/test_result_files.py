"""Result files, tables and figures are whole or as they were, and one that is not ends every study in one sentence."""

from __future__ import annotations

import json
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from experiments.draw import REPORTS, draw
from experiments.jobs import finished
from experiments.results import EXPERIMENTS, ROOT, Run, load_results, read_json, write_figure, write_json, write_text
from liegroup_attn.lightning.cli import main

# What is in a result's place → what the sentence calls it.
DAMAGED = {
    "empty": (b"", "one that is cut short or no result"),
    "cut short": (b'{"setting": {"steps": 3}, "se', "one that is cut short or no result"),
    "no text": (b"\xff\xfe\x00" * 9, "one that is cut short or no result"),
    "a list": (b"[1, 2]", "one that is cut short or no result"),
    "somebody else's": (b'{"name": "x"}', "one without "),
}
STUDIES = (*EXPERIMENTS, *REPORTS)


def first_result(study: str) -> Path:
    """Of those in the repository."""
    return sorted((ROOT / study / "results").glob("*.json"))[0]


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("study", STUDIES)
def test_every_study_names_a_damaged_result(study, name, tmp_path):
    content, words = DAMAGED[name]
    path = tmp_path / study / "results" / first_result(study).name
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=rf"^{path}: expected a whole result, got {words}.*; delete it and run the same"
    ):
        draw(tmp_path, [study])
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [path]


@pytest.mark.parametrize("study", STUDIES)
def test_every_study_names_a_folder(study, tmp_path):
    path = tmp_path / study / "results" / first_result(study).name
    path.mkdir(parents=True)
    with pytest.raises(
        IsADirectoryError, match=rf"^{path}: expected a file that can be read and written, got: is a dir"
    ):
        draw(tmp_path, [study])


def test_finished_runs_are_looked_at_before_any_is_started(tmp_path, monkeypatch, capfd):
    run = Run("reachability", "exp", "quick", 0)
    path = run.result_path(tmp_path)
    path.parent.mkdir(parents=True)
    path.write_text(first_result("reachability").read_text()[:500])
    for look in (
        lambda: run.finished(tmp_path),
        lambda: load_results(tmp_path, "reachability"),
        lambda: finished(path, {}),
    ):
        with pytest.raises(ValueError, match=rf"^{path}: expected a whole result, got one that is cut short"):
            look()
    monkeypatch.setattr(sys, "argv", ["liegroup-attn"])
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a run was started"))
    monkeypatch.chdir(ROOT.parent)
    with pytest.raises(SystemExit) as stop:
        main(["compare", "--experiments", "reachability", "--variants", "exp", "--output", str(tmp_path)])
    err = capfd.readouterr().err
    assert stop.value.code == 1
    assert err.startswith(f"liegroup-attn: ValueError: {path}: expected a whole result")
    assert "Traceback" not in err


def test_a_whole_result_is_read(tmp_path):
    write_json(tmp_path / "new" / "x.json", {"a": [1, None], "b": "ü"})
    assert read_json(tmp_path / "new" / "x.json", "a", "b") == {"a": [1, None], "b": "ü"}
    with pytest.raises(ValueError, match=r"x\.json: expected a whole result, got one without c, d; delete"):
        read_json(tmp_path / "new" / "x.json", "c", "a", "d")


def figure(path: Path) -> None:
    drawn = Figure(figsize=(8, 8))
    drawn.add_subplot().plot(range(100), [(i * i) % 37 for i in range(100)])
    write_figure(path, drawn)


WRITERS: dict[str, Callable[[Path], None]] = {
    "x.json": lambda path: write_json(path, {"numbers": list(range(10_000))}),
    "x.md": lambda path: write_text(path, "| a |\n" * 10_000),
    "x.png": figure,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_the_earlier_file_whole(name, tmp_path):
    path = tmp_path / name
    path.write_text("before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))  # for root as well
    try:
        with pytest.raises(
            OSError, match=rf"^{path}: expected a file that can be read and written, got: .*; make room"
        ):
            WRITERS[name](path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [(name, "before")]
    WRITERS[name](path)
    assert path.stat().st_size > 2000


@pytest.mark.parametrize("name", WRITERS)
def test_a_place_that_takes_no_file(name, tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(OSError, match=rf"^{tmp_path}/file/{name}: expected a file that can be read and written"):
        WRITERS[name](tmp_path / "file" / name)
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("study", ["reachability", "rate_recovery", "drop_in"])
def test_what_is_whole_is_drawn(study, tmp_path):
    folder = tmp_path / study / "results"
    folder.mkdir(parents=True)
    shutil.copy(first_result(study), folder)
    written = draw(tmp_path, [study])
    assert written[0].name == "table.md"
    assert all(path.stat().st_size > 100 for path in written)
    assert not list(tmp_path.rglob("*.part"))
    assert json.loads(next(folder.iterdir()).read_text())
