"""The README's Python runs as it stands, and its commands are those that CI runs."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_python_blocks_run():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 2
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(block, namespace)
    assert namespace["z"].shape == (8, 64, 128)


def test_the_first_page_is_one():
    """What it wins and what it does not stand before all else, by numbers that ``liegroup-attn draw`` fills in."""
    assert len(README.splitlines()) <= 130
    assert re.findall(r"<!-- table: (\w+) -->", README) == ["headline_sentence", "language_sentence", "headline"]
    table = README[README.index("<!-- table: headline -->") :]
    assert len(re.findall(r"^\| (?!variant)", table[: table.index("<!-- end")], re.MULTILINE)) <= 6


def test_files_named_exist():
    named = [name for name in re.findall(r"\]\(([^)#:]+)\)", README)]
    named += re.findall(r"--config (\S+)", README)
    assert named
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing


def test_ci_runs_blocks_that_the_readme_has():
    wanted = re.findall(r"\$\(block (\w+)\)", (ROOT / ".ci" / "run").read_text())
    assert wanted == ["install", "test"]
    for name in wanted:
        assert re.search(rf"<!-- ci: {name} -->\n```bash\n.+?```\n<!-- end of ci -->", README, re.DOTALL), name
