"""Floors and doors, read from the source: imports run one way, and each guest library has one door."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "liegroup_attn"

# From the top down. A module may import from its own floor and from those below it.
FLOORS = (
    ("experiments", "liegroup_attn.integrations"),
    ("liegroup_attn.lightning",),
    ("liegroup_attn.nn",),
    ("liegroup_attn",),  # the public face: only names re-exported
    ("liegroup_attn.functional",),
    ("liegroup_attn.expm", "liegroup_attn.positional", "liegroup_attn.plots"),
    (
        "liegroup_attn.rates",
        "liegroup_attn.clocks",
        "liegroup_attn.generators",
        "liegroup_attn.feature_maps",
        "liegroup_attn.manifolds",
        "liegroup_attn.metrics",
        "liegroup_attn.algebra",
    ),
    (
        "liegroup_attn.masks",
        "liegroup_attn.scores",
        "liegroup_attn.visible",
        "liegroup_attn.checks",
        "liegroup_attn.deprecated",
        "liegroup_attn.errors",
        "liegroup_attn.options",
        "liegroup_attn.resettable",
        "liegroup_attn.tensors",
    ),
)

DOORS = {
    "geoopt": ("liegroup_attn.manifolds", "liegroup_attn.lightning.optim", "experiments"),
    "torchmetrics": ("liegroup_attn.metrics", "experiments"),
    "matplotlib": ("liegroup_attn.plots", "experiments"),
    "lightning": ("liegroup_attn.lightning", "experiments"),
    "pytorch_lightning": (),
    "scipy": ("experiments",),
    "sklearn": ("liegroup_attn.lightning.data.digits",),
    "torchdiffeq": ("experiments",),
    "transformers": ("liegroup_attn.integrations", "experiments"),
    "x_transformers": ("liegroup_attn.integrations", "experiments"),
    "rotary_embedding_torch": ("experiments",),
    "litgpt": ("liegroup_attn.integrations", "experiments"),
}


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {_module(path): path for folder in (PACKAGE, "experiments") for path in sorted((ROOT / folder).rglob("*.py"))}
TREES = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in FILES.items()}


def _for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def _imports(module: str, tree: ast.AST | None = None, everywhere: bool = True) -> set[str]:
    """Modules imported by ``module``; ``everywhere`` counts imports inside functions too."""
    found: set[str] = set()
    package = module if FILES[module].name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.iter_child_nodes(TREES[module] if tree is None else tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            # ``from package import module`` imports the module, ``from module import name`` the module of the name
            found |= {f"{base}.{a.name}" if f"{base}.{a.name}" in FILES else base for a in node.names}
        elif not _for_types_only(node) and (
            everywhere or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        ):
            found |= _imports(module, node, everywhere)
    return found


def _within(module: str, part: str) -> bool:
    return module == part or module.startswith(part + ".")


def _floor(module: str) -> int:
    """Number of the floor, 0 at the top; the longest name that fits wins."""
    fits = [(len(part), i) for i, parts in enumerate(FLOORS) for part in parts if _within(module, part)]
    return max(fits)[1]


def _own(imports: set[str]) -> set[str]:
    return {name for name in imports if _within(name, PACKAGE) or _within(name, "experiments")}


def test_every_module_lives_on_a_floor():
    """The face's own floor is for the face; whatever else has landed there is a file nobody gave a place."""
    assert [module for module in FILES if FLOORS[_floor(module)] == (PACKAGE,)] == [PACKAGE]


def test_imports_run_down():
    up = [
        f"{module} > {name}"
        for module in FILES
        for name in sorted(_own(_imports(module)))
        if _floor(name) < _floor(module)
    ]
    assert not up, f"imports from a floor above: {up}"


def test_guests_come_in_by_their_door():
    strays = [
        f"{module} > {name}"
        for module in FILES
        for name in sorted(_imports(module))
        if not any(_within(module, door) for door in DOORS.get(name.partition(".")[0], (module,)))
    ]
    assert not strays, f"imported beside the door: {strays}"


def test_no_import_cycle():
    """Depth-first over imports at module level; a package is loaded by the import of any of its modules."""
    graph = {m: {n for n in _own(_imports(m, everywhere=False)) if n in FILES and n != m} for m in FILES}
    done, path = set(), []

    def visit(module: str) -> None:
        assert module not in path, f"import cycle: {' > '.join([*path[path.index(module) :], module])}"
        if module in done:
            return
        path.append(module)
        for name in sorted(graph[module]):
            visit(name)
        done.add(path.pop())

    for module in sorted(graph):
        visit(module)


def test_the_face_defines_nothing():
    """Names re-exported, the version, and the lazy door to the sub-packages."""
    allowed = (ast.Import, ast.ImportFrom, ast.Assign, ast.Expr)
    for node in TREES[PACKAGE].body:
        assert isinstance(node, allowed) or (
            isinstance(node, ast.FunctionDef) and node.name in {"__getattr__", "__dir__"}
        )


def _asserts_of_arguments(tree: ast.AST) -> list[int]:
    """Lines on which a function asserts something about what it was handed."""
    lines = []
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            handed = {a.arg for a in (*function.args.args, *function.args.kwonlyargs)} - {"self", "cls"}
            for node in ast.walk(function):
                if isinstance(node, ast.Assert):
                    told = {n.id for n in ast.walk(node.test) if isinstance(n, ast.Name)}
                    lines += [node.lineno] * bool(handed & told)
    return lines


def test_user_input_is_not_asserted():
    """``python -O`` removes an assert: what a caller hands over is checked by raising."""
    found = {m: _asserts_of_arguments(TREES[m]) for m in FILES if _within(m, PACKAGE)}
    assert not {module: lines for module, lines in found.items() if lines}


def test_importing_the_library_costs_torch_only():
    """torch itself may bring NumPy; none of the guests may come."""
    code = (
        "import sys, torch; before = set(sys.modules); import liegroup_attn; dir(liegroup_attn);"
        "print(*sorted({m.partition('.')[0] for m in set(sys.modules) - before}))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    extra = {name for name in out.stdout.split() if name not in sys.stdlib_module_names}
    assert extra == {PACKAGE, "torch"} or extra == {PACKAGE}, extra


LAYERS = """
from torch.nn import TransformerEncoderLayer
from liegroup_attn.nn import LieAttention, LieMultiheadAttention, SoftmaxAttention, convert_attention
LieMultiheadAttention(8, 2, time=0.4), LieAttention(8, 2, learn_time=False)
for model in SoftmaxAttention(8, 2), TransformerEncoderLayer(8, 2): convert_attention(model)
"""


@pytest.mark.parametrize(
    "code",
    [
        "import liegroup_attn.manifolds, liegroup_attn.positional",
        LAYERS,
    ],
    ids=["manifolds", "layers"],
)
def test_geoopt_comes_with_the_first_manifold(code):
    """And SciPy with it: most of a second."""
    code += "\nimport sys; print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert not {"geoopt", "scipy"} & set(out.stdout.split())


def test_the_public_names_are_there():
    import liegroup_attn as la

    for name in la.__all__:
        assert getattr(la, name) is not None
    assert set(la.__all__) <= set(dir(la))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = la.no_such_name


def test_these_tests_can_fail():
    """The reader sees every way to write an import, and an assert of an argument."""
    assert _asserts_of_arguments(ast.parse("def f(x, *, y):\n    assert y > 0\n    z = 1\n    assert z")) == [2]
    code = ast.parse(
        "import geoopt\nfrom liegroup_attn import functional\nfrom ..errors import ShapeError\n"
        "def f():\n    import matplotlib.pyplot\nif TYPE_CHECKING:\n    import scipy\n"
    )
    module = "liegroup_attn.expm.base"
    assert _imports(module, code) == {
        "geoopt",
        "liegroup_attn.functional",
        "liegroup_attn.errors",
        "matplotlib.pyplot",
    }
    assert _imports(module, code, everywhere=False) == {
        "geoopt",
        "liegroup_attn.functional",
        "liegroup_attn.errors",
    }
    assert _floor("liegroup_attn.functional") < _floor("liegroup_attn.expm.base") < _floor("liegroup_attn.errors")
