"""Sphinx configuration. Pages with a jupytext header are lessons and run at every build; nothing needs a network."""

import os
import re
from pathlib import Path
from typing import Any

# The lessons and the build itself leave the other cores alone.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import liegroup_attn

project = "liegroup_attn"
author = "The liegroup-attn maintainers"
project_copyright = f"2026, {author}"
version = release = liegroup_attn.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "myst_nb",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "Thumbs.db", ".DS_Store", "jupyter_execute"]

# --- pages and lessons ---
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "force"  # a cache would not see that the library has changed
nb_execution_raise_on_error = True
nb_execution_timeout = 600  # a cell takes seconds; a crowded machine may take its time
nb_merge_streams = True

# --- reference ---
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # overrides stay bare: the contract stands on the base class
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = ["Source"]

# --- HTML ---
html_theme = "furo"
html_title = f"liegroup_attn {release}"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_show_sphinx = False
# Left out of what the copy button takes: doctest prompts.
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
# The script is fetched by the reader's browser, by nobody at build time.
mathjax_path = "https://cdn.jsdelivr.net/npm/mathjax@3/es5/tex-mml-chtml.js"

_SOURCE = re.compile(r"^Source: (?P<text>\S.*)$")
_PAGE = re.compile(r"\bdocs/mathematics\b")
_STUDY = re.compile(r"\.\./experiments/(\w+)/README\.md")
_LOCAL = re.compile(r"\]\((?!https?:|#)")
_LETTER = re.compile(r"^(?P<field>\s+\w+: )(?P<letter>[A-Z]\.)$")


def _spread_source(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """``Source: [Key]_`` on one line becomes a section that napoleon knows, its pages become links."""
    spread: list[str] = []
    inside = False
    for line in lines:
        if match := _SOURCE.match(line):
            inside = True
            spread += ["Source:", "    " + match["text"]]
        else:
            inside = inside and bool(line.strip())
            spread.append("    " + line if inside else line)
        if inside:
            spread[-1] = _PAGE.sub(":doc:`/mathematics`", spread[-1])
    lines[:] = spread


def _escape_letters(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """``num_heads: H.`` is a size, not the item H of an enumeration."""
    lines[:] = [_LETTER.sub(r"\g<field>\\\g<letter>", line) for line in lines]


def _copy_studies(app: Any) -> None:
    """The README of each study becomes a page, ``protocols/<study>``, that git ignores."""
    docs = Path(app.srcdir)
    for readme in sorted(docs.parent.glob("experiments/*/README.md")):
        study, page = readme.parent.name, docs / "protocols" / f"{readme.parent.name}.md"
        text = _LOCAL.sub(f"](../../experiments/{study}/", readme.read_text(encoding="utf-8"))
        page.parent.mkdir(exist_ok=True)
        if not page.exists() or page.read_text(encoding="utf-8") != text:
            page.write_text(text, encoding="utf-8")


def _link_studies(app: Any, docname: str, source: list[str]) -> None:
    """Where GitHub links to such a README, the site links to its page."""
    source[0] = _STUDY.sub(r"protocols/\1.md", source[0])


def setup(app: Any) -> dict[str, bool]:
    """Docstrings are spread before napoleon sees them, which listens at priority 500."""
    app.connect("builder-inited", _copy_studies)
    app.connect("source-read", _link_studies)
    app.connect("autodoc-process-docstring", _spread_source, priority=400)
    app.connect("autodoc-process-docstring", _escape_letters, priority=400)
    return {"parallel_read_safe": True}
