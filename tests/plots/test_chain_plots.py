"""Plots of a chain: what is drawn is what NumPy and SciPy compute."""

import sys
import warnings

import matplotlib
import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from matplotlib.figure import Figure
from PIL import Image

from liegroup_attn import DenseGenerator, SoftmaxGenerator
from liegroup_attn.algebra import spectral_gap
from liegroup_attn.clocks import ErlangClock, ExponentialClock, FixedClock
from liegroup_attn.errors import GeneratorError, ShapeError
from liegroup_attn.plots import (
    animate_token_flow,
    plot_flow,
    plot_hop_laws,
    plot_layers,
    plot_spectrum,
    plot_token_flow,
)

N = 6
NAMES = ["the", "cat", "the", "internationalization of names", "$x", "."]
CLOCKS = [None, ExponentialClock(), ErlangClock(3)]


def rates(n=N, causal=False, seed=0):
    scores = 2 * torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf) if causal else scores
    return 3 * (scores.softmax(-1) - torch.eye(n, dtype=torch.float64))


def mixing(Q, t, clock=None):
    if clock is None:
        return scipy.linalg.expm(t * np.asarray(Q))
    s = clock.resolvents
    return np.linalg.matrix_power(np.linalg.inv(np.eye(len(Q)) - t * np.asarray(Q) / s), s)


def drawn_areas(ax):
    """Lower and upper edge of each area at its times, (areas, 2, points)."""
    edges = []
    for area in ax.collections:
        vertices = area.get_paths()[0].vertices
        times = np.unique(vertices[:, 0])
        edges.append([[f(vertices[vertices[:, 0] == t, 1]) for t in times] for f in (min, max)])
    return np.array(edges)


def flow(ax=None):
    axes = None if ax is None else [ax, *Figure().subplots(1, 2)]
    figure, axes = plot_flow(rates(), [1.0], axes=axes)
    return figure, axes[0]


DRAW = {
    "flow": flow,
    "hops": lambda ax=None: plot_hop_laws(ax=ax),
    "spectrum": lambda ax=None: plot_spectrum(rates(), ax=ax),
    "spectrum of P": lambda ax=None: plot_spectrum(rates(), 0.5, ax=ax),
    "token": lambda ax=None: plot_token_flow(rates(), 1, ax=ax),
    "layers": lambda ax=None: plot_layers(torch.rand(3, 4), ax=ax),
}
every = pytest.mark.parametrize("draw", DRAW.values(), ids=DRAW.keys())


@pytest.fixture(autouse=True)
def _leaves_no_trace():
    """No warning, no rcParams changed, no figure open in pyplot, whatever is drawn."""
    before = dict(matplotlib.rcParams)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    assert dict(matplotlib.rcParams) == before
    if "matplotlib.pyplot" in sys.modules:
        assert sys.modules["matplotlib.pyplot"].get_fignums() == []


@every
def test_new_figure(draw, tmp_path):
    figure, ax = draw()
    assert isinstance(figure, Figure)
    assert ax.figure is figure
    figure.savefig(tmp_path / "figure.png")
    figure.savefig(tmp_path / "figure.pdf")


@every
@pytest.mark.parametrize("nested", [False, True])
def test_given_axes(draw, nested):
    figure = Figure()
    ax, other = (figure.subfigures(1, 1) if nested else figure).subplots(1, 2)
    got_figure, got = draw(ax)
    assert got_figure is figure
    assert got is ax
    assert ax.has_data()
    assert not other.has_data()
    figure.draw_without_rendering()


@pytest.mark.parametrize("clock", CLOCKS, ids=repr)
def test_flow_is_the_exponential(clock):
    Q, times = rates(), [0.0, 0.3, 1e6]
    _, axes = plot_flow(Q, times, clock=clock)
    assert [ax.get_title() for ax in axes] == ["S", "Q", "P(0)", "P(0.3)", "P(1e6)"]
    S, drawn, *P = (np.asarray(ax.images[0].get_array()) for ax in axes)
    np.testing.assert_allclose(drawn, Q, atol=1e-12)
    np.testing.assert_allclose(np.diag(S), 0, atol=1e-12)
    exits = -np.diag(Q)[:, None]
    np.testing.assert_allclose(exits * (S - np.eye(N)), Q, atol=1e-12)
    for t, got in zip(times[:2], P[:2], strict=True):
        np.testing.assert_allclose(got, mixing(Q, t, clock), atol=1e-12)
    np.testing.assert_allclose(P[2], P[2][:1].repeat(N, 0), atol=1e-5)  # the stationary law in every row
    assert len({axes[i].images[0].get_clim() for i in (0, 2, 3, 4)}) == 1
    assert [len(ax.child_axes) for ax in axes] == [0, 1, 0, 0, 1]  # a bar for Q, one for all others


def test_flow_of_a_softmax_generator_shows_its_softmax():
    query, key = torch.randn(2, N, 4, generator=torch.Generator().manual_seed(1)).unbind(0)
    generator = SoftmaxGenerator(query, key, is_causal=True, jump_rates=torch.linspace(0.2, 1, N))
    _, axes = plot_flow(generator, 1.0)
    S = ((query @ key.mT) / 2).masked_fill(torch.ones(N, N).triu(1).bool(), -torch.inf).softmax(-1)
    np.testing.assert_allclose(axes[0].images[0].get_array(), S, atol=1e-5)
    assert not np.triu(axes[2].images[0].get_array(), 1).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rates_of_any_kind(dtype):
    Q = rates().to(dtype).requires_grad_()
    for given in (Q, Q.detach().float().numpy(), Q.tolist(), DenseGenerator(rates().to(torch.float32))):
        P = plot_flow(given, 0.5)[1][2].images[0].get_array()
        np.testing.assert_allclose(P.sum(-1), 1, atol=1e-12)
        np.testing.assert_allclose(P, mixing(rates(), 0.5), atol=2e-2)


@pytest.mark.parametrize("n", [1, 12, 40, 64])
def test_flow_at_awkward_sizes(n):
    names = [f"a rather long name {i}" for i in range(n)]
    figure, axes = plot_flow(rates(n, causal=True), [1e-6, 1e4], tokens=names)
    figure.draw_without_rendering()
    box = axes[0].get_window_extent()
    assert min(box.width, box.height) / figure.dpi > 1.0  # inches: names leave room for the map
    assert len(axes[0].get_yticks()) == (n if n <= 40 else 0)


LAWS = {
    "fixed": (FixedClock(), lambda k, mean: scipy.stats.poisson.pmf(k, mean)),
    "exponential": (ExponentialClock(), lambda k, mean: scipy.stats.geom.pmf(k + 1, 1 / (1 + mean))),
    "Erlang": (ErlangClock(3), lambda k, mean: scipy.stats.nbinom.pmf(k, 3, 3 / (3 + mean))),
}


@pytest.mark.parametrize("most", [None, 5])
@pytest.mark.parametrize(("clock", "law"), LAWS.values(), ids=LAWS.keys())
def test_hop_laws(clock, law, most):
    means = [0.0, 0.5, 4.0, 30.0]
    figure, ax = plot_hop_laws(torch.tensor(means), clocks={"it": clock}, most_hops=most)
    figure.draw_without_rendering()
    for line, mean in zip(ax.lines, means, strict=False):
        k = line.get_xdata()
        np.testing.assert_array_equal(k, np.arange(len(k)))
        np.testing.assert_allclose(line.get_ydata(), law(k, mean), rtol=1e-9, atol=1e-15)
        left = 1 - law(k, mean).sum()
        assert left < 0.01 or f"({100 * left:.0f} % beyond)" in line.get_label()
    assert (len(k) == 6) if most else (left < 0.01)


def test_hop_laws_legend_and_logarithm():
    _, ax = plot_hop_laws([1.0, 3.0], log=True)
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels[:2] == ["fixed (Poisson), mean 1", "fixed (Poisson), mean 3"]
    assert labels[-1] == "exponential (geometric), mean 3"
    assert ax.get_yscale() == "log"
    assert ax.get_ylim()[0] >= 1e-9
    looks = {(line.get_color(), line.get_marker(), str(line.get_linestyle())) for line in ax.lines[:6]}
    assert len(looks) == 6


def complex_of(line):
    return np.sort_complex(np.round(line.get_xdata() + 1j * line.get_ydata(), 9))


@pytest.mark.parametrize("clock", CLOCKS, ids=repr)
@pytest.mark.parametrize("time", [None, 0.7])
def test_spectrum(time, clock):
    heads = torch.stack([rates(seed=i) * (i + 1) for i in range(3)])
    figure, ax = plot_spectrum(heads, time, clock=clock)
    figure.draw_without_rendering()
    lines = {line.get_label().split(",")[0]: line for line in ax.lines}
    region = ax.patches[0].get_path().transformed(ax.patches[0].get_patch_transform())
    edge = region.to_polygons()[0] @ [1, 1j]
    for i, Q in enumerate(heads):
        expected = np.linalg.eigvals(np.asarray(Q) if time is None else mixing(Q, time, clock))
        got = complex_of(lines[f"head {i}"])
        np.testing.assert_allclose(got, np.sort_complex(np.round(expected, 9)), atol=1e-8)
        inside = got[np.abs(got - (0 if time is None else 1)) > 1e-6]
        around = np.unwrap(np.angle(edge - inside[:, None]))  # how often the edge winds around each value
        assert (around[:, -1] - around[:, 0] > 6).all()
        if time is None:
            assert lines[f"head {i}"].get_label() == f"head {i}, gap {float(spectral_gap(Q)):.3g}"
    if time is None:
        bound = -float(heads.diagonal(dim1=-2, dim2=-1).min())
        assert (*ax.patches[0].center, ax.patches[0].radius) == pytest.approx((-bound, 0, bound))


def test_spectrum_of_a_causal_chain_is_its_diagonal():
    Q = rates(causal=True)
    _, ax = plot_spectrum([DenseGenerator(Q)])
    assert ax.lines[0].get_label().startswith("head 0")
    np.testing.assert_allclose(complex_of(ax.lines[0]), np.sort(np.diag(Q)), atol=1e-8)
    assert ax.lines[1].get_xdata()[0] == pytest.approx(-float(spectral_gap(Q)))  # the dashed line


@pytest.mark.parametrize("heads", [1, 5, 32])
def test_spectrum_of_many_heads_and_of_one_token(heads):
    figure, ax = plot_spectrum(torch.zeros(heads, 1, 1))
    figure.draw_without_rendering()
    assert len(ax.get_legend().get_texts()) == heads + 1
    assert ax.get_window_extent().width / figure.dpi > 1.5


@pytest.mark.parametrize("clock", CLOCKS, ids=repr)
@pytest.mark.parametrize("log", [False, True])
def test_token_flow(clock, log):
    Q = rates()
    _, ax = plot_token_flow(Q, -5, 3.0, clock=clock, top=2, tokens=NAMES, log=log)
    edges = drawn_areas(ax)
    times = np.unique(ax.collections[0].get_paths()[0].vertices[:, 0])
    assert len(times) == 200
    assert (times[0], times[-1]) == pytest.approx((3e-3, 3.0) if log else (0.0, 3.0))
    np.testing.assert_allclose(edges[0, 0], 0, atol=1e-12)
    np.testing.assert_allclose(edges[-1, 1], 1, atol=1e-9)  # all areas together
    np.testing.assert_allclose(edges[1:, 0], edges[:-1, 1], atol=1e-12)  # one lies on the other
    row = np.stack([mixing(Q, t, clock)[1] for t in times], -1)
    order = [1, *(i for i in np.argsort(-row.mean(-1)) if i != 1)]
    expected = np.stack([*row[order[:3]], row[order[3:]].sum(0)])
    np.testing.assert_allclose(edges[:, 1] - edges[:, 0], expected, atol=1e-9)
    labels = [area.get_label() for area in ax.collections]
    assert (labels[0], labels[-1]) == ("cat", "3 others")
    assert [text.get_text() for text in ax.get_legend().get_texts()] == labels[::-1]


def test_token_flow_names():
    _, ax = plot_token_flow(rates(), 0, [0.0, 1.0, 2.0], tokens=NAMES)
    labels = {area.get_label() for area in ax.collections}
    assert {"the (0)", "the (2)", r"\$x"} < labels
    assert max(map(len, labels)) <= 18
    assert [area.get_label() for area in plot_token_flow([[0.0]], 0)[1].collections] == ["0"]


def test_token_flow_as_bars(tmp_path):
    times = [0.0, 0.5, 2.0]
    animation = animate_token_flow(rates(), 2, times, tokens=NAMES)
    for frame, t in enumerate(times):
        title, *bars = animation._func(frame)
        assert title.get_text() == f"t = {t:g}"
        np.testing.assert_allclose([bar.get_height() for bar in bars], mixing(rates(), t)[2], atol=1e-12)
    animation.save(tmp_path / "flow.gif", writer="pillow")
    with Image.open(tmp_path / "flow.gif") as film:
        assert film.n_frames == 3


def test_token_flow_as_a_matrix(tmp_path):
    figure = Figure()
    ax = figure.subplots()
    animation = animate_token_flow(rates(), times=1.0, frames=4, clock=ExponentialClock(), ax=ax)
    assert ax.images[0].get_clim() == (0, 1)  # P(0) = I
    for frame, t in enumerate(np.linspace(0, 1, 4)):
        animation._func(frame)
        np.testing.assert_allclose(ax.images[0].get_array(), mixing(rates(), t, ExponentialClock()), atol=1e-12)
    animation.save(tmp_path / "flow.gif", writer="pillow")
    with Image.open(tmp_path / "flow.gif") as film:
        assert film.n_frames == 4


def test_layers():
    values = {"a": torch.tensor([0.5, 1200.0, 1e-6]), "softmax": float("nan"), "c": [2.0, np.nan]}
    figure, ax = plot_layers(values, label="time t (s)")
    figure.draw_without_rendering()
    expected = [[0.5, 1200, 1e-6], [np.nan] * 3, [2, np.nan, np.nan]]
    np.testing.assert_allclose(ax.images[0].get_array().filled(np.nan), expected)
    assert [text.get_text() for text in ax.texts] == ["0.5", "1200", "1e−6", "–", "2", "–"]
    assert [label.get_text() for label in ax.get_yticklabels()] == list(values)
    assert [patch.get_width() for patch in ax.patches] == [0, 2, 1]  # heads that a layer does not have
    assert ax.child_axes[0].get_ylabel() == "time t (s)"


@pytest.mark.parametrize(("heads", "numbers"), [(16, 32), (17, 0)])
def test_layers_with_many_heads(heads, numbers):
    _, ax = plot_layers(torch.randn(2, heads, dtype=torch.bfloat16))
    assert len(ax.texts) == numbers
    low, high = ax.images[0].get_clim()
    assert low == -high  # negative values: centred on 0


WRONG = {
    "not square": (ShapeError, lambda: plot_flow(torch.zeros(2, 3), 1.0)),
    "a batch": (ShapeError, lambda: plot_token_flow(torch.zeros(2, 2, 2), 0)),
    "no generator": (ShapeError, lambda: plot_spectrum({})),
    "four axes": (ShapeError, lambda: plot_spectrum(torch.zeros(1, 1, 2, 2))),
    "no times": (ShapeError, lambda: plot_flow(rates(), [])),
    "too few axes": (ShapeError, lambda: plot_flow(rates(), 1.0, axes=[])),
    "too few names": (ShapeError, lambda: plot_flow(rates(), 1.0, tokens=["one"])),
    "no such token": (ShapeError, lambda: plot_token_flow(rates(), N)),
    "too many targets": (ShapeError, lambda: plot_token_flow(rates(), 0, top=99)),
    "no end": (ShapeError, lambda: plot_token_flow(rates(), 0, 0.0)),
    "times not sorted": (ShapeError, lambda: plot_token_flow(rates(), 0, [0.0, 2.0, 1.0])),
    "no such token in a film": (ShapeError, lambda: animate_token_flow(rates(), -N - 1)),
    "layers of one axis": (ShapeError, lambda: plot_layers([1.0, 2.0])),
    "a layer of two axes": (ShapeError, lambda: plot_layers({"a": torch.zeros(2, 2)})),
    "no layers": (ShapeError, lambda: plot_layers({})),
    "means of two axes": (ShapeError, lambda: plot_hop_laws(torch.zeros(2, 2))),
    "scores": (GeneratorError, lambda: plot_flow(-torch.ones(2, 2), 1.0)),
    "a transition matrix": (GeneratorError, lambda: plot_spectrum(torch.eye(2))),
    "NaN": (GeneratorError, lambda: plot_token_flow([[np.nan]], 0)),
    "back in time": (GeneratorError, lambda: plot_flow(rates(), [-1.0])),
    "0 on a logarithmic axis": (GeneratorError, lambda: plot_token_flow(rates(), 0, [0.0, 1.0], log=True)),
    "a class for a clock": (GeneratorError, lambda: plot_flow(rates(), 1.0, clock=ExponentialClock)),
    "a name for a clock": (GeneratorError, lambda: plot_hop_laws(clocks=["fixed"])),
    "a number for a clock": (GeneratorError, lambda: plot_spectrum(rates(), 1.0, clock=2)),
    "an infinite time": (GeneratorError, lambda: plot_spectrum(rates(), float("inf"))),
    "negative hops": (GeneratorError, lambda: plot_hop_laws(-1.0)),
}


@pytest.mark.parametrize(("error", "call"), WRONG.values(), ids=WRONG.keys())
def test_wrong_input(error, call):
    with pytest.raises(error, match=r": expected .*, got .*; "):
        call()
