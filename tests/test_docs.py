"""The reference names every public object once, and every citation key has its entry. Nothing is built."""

import ast
import importlib
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
BIBLIOGRAPHY = (DOCS / "bibliography.rst").read_text(encoding="utf-8")
REFERENCE = {path.name: path.read_text(encoding="utf-8") for path in sorted((DOCS / "reference").glob("*.rst"))}
DOCUMENTED = (
    "liegroup_attn",
    "liegroup_attn.algebra",
    "liegroup_attn.clocks",
    "liegroup_attn.errors",
    "liegroup_attn.expm",
    "liegroup_attn.feature_maps",
    "liegroup_attn.generators",
    "liegroup_attn.integrations.transformers",
    "liegroup_attn.integrations.x_transformers",
    "liegroup_attn.lightning",
    "liegroup_attn.lightning.cli",
    "liegroup_attn.lightning.data",
    "liegroup_attn.manifolds",
    "liegroup_attn.metrics",
    "liegroup_attn.nn",
    "liegroup_attn.plots",
    "liegroup_attn.positional",
    "liegroup_attn.scores",
    "liegroup_attn.visible",
)
_CITED = re.compile(r"\[([A-Z][A-Za-z]+\d{4})\]_")
_DEFINED = re.compile(r"^\.\. \[([A-Z][A-Za-z]+\d{4})\] \S", re.MULTILINE)
_DIRECTIVE = re.compile(r"^\.\. (?:auto(?:class|exception|function)|class|function):: (\S+)$", re.MULTILINE)
_LABEL = re.compile(r"<(bib-[a-z]+\d{4})>")


def _docstrings() -> dict[str, str]:
    """File: all its docstrings."""
    found = {}
    for path in sorted((ROOT / "liegroup_attn").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        texts = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, owners)]
        found[path.relative_to(ROOT).as_posix()] = "\n".join(texts)
    return found


def _resolve(name: str) -> object:
    """The object that a dotted name stands for."""
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def _entries() -> list[str]:
    return [name for text in REFERENCE.values() for name in _DIRECTIVE.findall(text)]


def test_every_citation_is_defined():
    defined = set(_DEFINED.findall(BIBLIOGRAPHY))
    for file, text in _docstrings().items():
        missing = sorted(set(_CITED.findall(text)) - defined)
        assert not missing, f"{file} cites {missing}, which docs/bibliography.rst does not define"


def test_every_definition_is_cited_and_unique():
    """Sphinx warns of a citation that nobody refers to, and a warning stops the build."""
    defined = _DEFINED.findall(BIBLIOGRAPHY)
    cited = {key for text in _docstrings().values() for key in _CITED.findall(text)}
    assert defined == sorted(set(defined))
    assert set(defined) <= cited


def test_every_label_that_pages_use_is_there():
    for path in DOCS.glob("*.md"):
        for label in _LABEL.findall(path.read_text(encoding="utf-8")):
            assert f".. _{label}:" in BIBLIOGRAPHY, f"{path.name} refers to {label}"


@pytest.mark.parametrize("package", DOCUMENTED)
def test_every_public_name_is_in_the_reference(package):
    """Under any of the names by which it can be imported."""
    entries = [_resolve(entry) for entry in _entries()]
    module = importlib.import_module(package)
    missing = [name for name in module.__all__ if not any(getattr(module, name) is entry for entry in entries)]
    assert not missing, f"{package}: no entry for {missing} in docs/reference"


def test_every_object_is_in_the_reference_once():
    names = {entry: _resolve(entry) for entry in _entries()}
    assert len(names) == len(_entries())
    count = Counter(id(entry) for entry in names.values())
    assert not [name for name, entry in names.items() if count[id(entry)] > 1]


def test_every_page_is_in_a_table_of_contents():
    listed = set(re.findall(r"^([\w/]+)$", (DOCS / "index.md").read_text(encoding="utf-8"), re.MULTILINE))
    listed |= {"index"}
    pages = {path.stem for path in DOCS.glob("*.md")} | {path.stem for path in DOCS.glob("*.rst")}
    assert pages <= listed
    inside = (DOCS / "reference" / "index.md").read_text(encoding="utf-8")
    assert all(f"\n{name.removesuffix('.rst')}\n" in inside for name in REFERENCE)


def test_what_contributing_shows_runs():
    """The blocks of docs/contributing.md, one after the other: a clock, a bias, a mask, a method of one's own."""
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "contributing.md").read_text(encoding="utf-8"), re.DOTALL)
    shown = {}
    for block in blocks:
        exec(block, shown)
    assert {"CoinClock", "Parabola", "Chunks", "InHalves"} <= shown.keys()


def test_these_tests_can_fail():
    assert _CITED.findall("Source: [Nobody1900]_.") == ["Nobody1900"]
    assert _DEFINED.findall(".. [Nobody1900] N. Body.") == ["Nobody1900"]
    assert _DIRECTIVE.findall(".. autoclass:: a.B\n   :members:\n.. class:: a.C\n") == ["a.B", "a.C"]
