import sys
import warnings

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from liegroup_attn.errors import ShapeError
from liegroup_attn.plots import plot_accuracy_by_depth, plot_curves, plot_matrices

N = 5


def chain(n=N, dtype=torch.float64):
    S = torch.randn(n, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(-1)
    Q = 3 * (S - torch.eye(n, dtype=torch.float64))
    return {"S": S.to(dtype), "Q": Q.to(dtype), "P(t)": torch.matrix_exp(Q).to(dtype)}


def seeds(points=9, count=3):
    return np.arange(points), np.random.default_rng(0).random((count, points))


def matrices(ax=None):
    return plot_matrices({"S": chain()["S"]}, axes=None if ax is None else [ax])


def curves(ax=None):
    return plot_curves({"softmax": seeds(), "Lie": seeds()}, ax=ax, xlabel="step", ylabel="nats")


def depths(ax=None):
    return plot_accuracy_by_depth({"softmax": seeds()[1]}, ax=ax, trained_depth=4)


every = pytest.mark.parametrize("draw", [matrices, curves, depths])


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
    ax = ax[0] if draw is matrices else ax
    assert isinstance(figure, Figure)
    assert ax.figure is figure
    figure.savefig(tmp_path / "figure.png")
    figure.savefig(tmp_path / "figure.pdf")


@every
@pytest.mark.parametrize("nested", [False, True])
def test_given_axes(draw, nested):
    figure = Figure()
    place = figure.subfigures(1, 1) if nested else figure
    ax, other = place.subplots(1, 2)
    got_figure, got = draw(ax)
    assert got_figure is figure
    assert (got[0] if draw is matrices else got) is ax
    assert ax.has_data()
    assert not other.has_data()
    figure.savefig("/dev/null", format="png")


def test_matrices_scales():
    _, axes = plot_matrices(chain())
    S, Q, P = (ax.images[0] for ax in axes)
    assert [ax.get_title() for ax in axes] == ["S", "Q", "P(t)"]
    assert S.get_clim() == P.get_clim() == (0, max(chain()["S"].max(), chain()["P(t)"].max()))
    assert Q.get_clim() == (-chain()["Q"].abs().max(), chain()["Q"].abs().max())
    assert Q.norm(0.0) == pytest.approx(0.5)
    assert S.cmap.name == P.cmap.name != Q.cmap.name
    np.testing.assert_allclose(Q.get_array(), chain()["Q"])
    assert all(len(ax.child_axes) == 1 for ax in axes)  # a colour bar each
    ticks = axes[1].child_axes[0].get_yticks()
    np.testing.assert_allclose(ticks, -ticks[::-1])
    labels = [label.get_text() for label in axes[1].child_axes[0].get_yticklabels()]
    assert "0" in labels
    assert "−0" not in labels


def test_matrices_rates_have_their_own_scale_and_rounding_makes_no_generator():
    P = chain()["P(t)"].clone()
    P[0, 1] = -1e-9
    _, (a, b, c) = plot_matrices({"rates": 9 * torch.ones(2, 2), "P": P, "zero": torch.zeros(2, 2)})
    assert a.images[0].get_clim() == (0, 9)
    assert b.images[0].get_clim() == (0, P.max())
    assert c.images[0].get_clim() == (0, 1)


@pytest.mark.parametrize("n", [1, 40, 41])
def test_matrices_token_labels(n):
    names = [f"<{i}>" for i in range(n)]
    figure, axes = plot_matrices({"S": chain(n)["S"], "P": chain(n)["P(t)"]}, tokens=names)
    figure.draw_without_rendering()
    rows, columns = (
        [label.get_text() for label in labels()] for labels in (axes[0].get_yticklabels, axes[1].get_xticklabels)
    )
    assert rows == columns == (names if n <= 40 else [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_matrices_of_any_kind(dtype):
    S = chain(dtype=dtype)["S"].requires_grad_()
    _, axes = plot_matrices({"tensor": S, "array": S.detach().double().numpy(), "list": S.tolist(), "rows": list(S)})
    for ax in axes:
        np.testing.assert_allclose(ax.images[0].get_array(), S.detach().double())
        assert ax.images[0].get_clim() == axes[0].images[0].get_clim()


def test_matrices_nan_is_left_out_of_the_scale():
    Q = chain()["Q"].clone()
    Q[0, 0], Q[1, 1] = torch.nan, -torch.inf
    figure, (ax,) = plot_matrices({"Q": Q})
    figure.draw_without_rendering()
    assert ax.images[0].get_clim()[1] == Q[Q.isfinite()].abs().max()
    assert ax.images[0].get_array().mask.sum() == 2


@pytest.mark.parametrize(
    "call",
    [
        lambda: plot_matrices({}),
        lambda: plot_matrices({"S": torch.zeros(2, 3)}),
        lambda: plot_matrices({"S": torch.zeros(4, 2, 2)}),
        lambda: plot_matrices({"S": torch.zeros(2, 2)}, tokens=["one"]),
        lambda: plot_matrices({"S": torch.zeros(2, 2)}, axes=[]),
        lambda: plot_curves({"a": ([1, 2], [[1, 2, 3]])}),
        lambda: plot_curves({"a": ([1, 2], np.zeros((2, 2, 2)))}),
        lambda: plot_accuracy_by_depth({"a": np.zeros((2, 2, 2))}),
    ],
)
def test_wrong_shapes(call):
    with pytest.raises(ShapeError, match=r": expected .*, got .*; "):
        call()


def test_curves_mean_and_band():
    x, ys = seeds()
    figure, ax = plot_curves({"a": (x, ys), "one seed": (x, ys[:1]), "flat": (x, ys[0])}, xlabel="step", ylabel="nats")
    figure.draw_without_rendering()
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("step", "nats")
    np.testing.assert_allclose(ax.lines[0].get_ydata(), ys.mean(0))
    np.testing.assert_allclose(ax.lines[2].get_ydata(), ys[0])
    (band,) = ax.collections  # one seed has no band
    vertices = band.get_paths()[0].vertices
    std = ys.std(0, ddof=1)
    for i in x:
        at = vertices[vertices[:, 0] == i, 1]
        assert at.min() == pytest.approx(ys[:, i].mean() - std[i])
        assert at.max() == pytest.approx(ys[:, i].mean() + std[i])


def test_curves_colors_and_legend():
    x = [0, 1]
    data = {"low": (x, [0, 1]), "high": (x, [0, 3]), "middle": (x, [0, 2])}
    _, ax = plot_curves(data, colors={"high": "#0072B2"})
    got = {line.get_label(): line.get_color() for line in ax.lines}
    assert got["high"] == "#0072B2"
    assert len(set(got.values())) == 3  # the given colour is not given again
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["high", "middle", "low"]
    many = plot_curves({str(i): (x, [0, i]) for i in range(20)})[1].lines
    assert len({(line.get_color(), line.get_marker()) for line in many}) == 20


def test_curves_nan():
    ys = [[np.nan, 1.0, 2.0, np.nan], [np.nan, 3.0, np.nan, np.nan]]
    figure, ax = plot_curves({"a": ([0, 1, 2, 3], ys), "nothing": ([0, 1], [[np.nan, np.nan]] * 2)})
    figure.draw_without_rendering()
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [np.nan, 2, 2, np.nan])
    assert np.isfinite(ax.dataLim.get_points()).all()


def test_accuracy_by_depth():
    ys = torch.tensor([[torch.nan, 1.0, 0.5, 0.25], [torch.nan, 1.0, 0.7, 0.35]])
    figure, ax = plot_accuracy_by_depth({"softmax": ys, "short": ys[0, :3]}, trained_depth=1)
    figure.draw_without_rendering()
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [np.nan, 100, 60, 30], rtol=1e-6)
    np.testing.assert_allclose(ax.lines[0].get_xdata(), [0, 1, 2, 3])
    assert ax.get_ylabel() == "accuracy (%)"
    assert "depth" in ax.get_xlabel()
    assert ax.patches[0].get_extents().transformed(ax.transData.inverted()).x0 == pytest.approx(1.5)
    assert [text.get_text().strip() for text in ax.texts] == ["deeper than trained"]


def test_nothing_is_shaded_when_nothing_is_deeper():
    _, ax = plot_accuracy_by_depth({"softmax": [1.0, 0.5]}, trained_depth=1)
    assert not ax.patches
    assert not ax.texts


def test_no_pyplot():
    import subprocess

    code = "import sys, liegroup_attn.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
