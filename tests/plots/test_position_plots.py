"""Figures of positions: what is drawn is the data, on the scale that is promised."""

import sys
import warnings

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from liegroup_attn.errors import ShapeError
from liegroup_attn.plots import plot_encoding, plot_score_decay, plot_similarity
from liegroup_attn.positional import ALiBi, SinusoidalEncoding, position_similarity, score_decay


def table():
    return SinusoidalEncoding(16).table(torch.arange(10.0)[:, None])


def bias():
    at = torch.arange(6.0)
    return ALiBi(2).between(at[:, None], at[None])


def encoding(ax=None):
    return plot_encoding({"table": table()}, axes=None if ax is None else [ax])


def similarity(ax=None):
    return plot_similarity({"map": position_similarity(table())}, axes=None if ax is None else [ax])


def decay(ax=None):
    at = torch.arange(5)
    return plot_score_decay({"a": (at, score_decay(ALiBi(2), at)), "b": (at, [1, 2, 3, 2, 1])}, ax=ax)


every = pytest.mark.parametrize("draw", [encoding, similarity, decay])


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
    figure, axes = draw()
    assert isinstance(figure, Figure)
    assert np.atleast_1d(axes)[0].figure is figure
    figure.savefig(tmp_path / "figure.png")
    figure.savefig(tmp_path / "figure.pdf")
    figure.savefig(tmp_path / "figure.svg")


@every
@pytest.mark.parametrize("nested", [False, True])
def test_given_axes(draw, nested):
    figure = Figure()
    place = figure.subfigures(1, 1) if nested else figure
    ax, other = place.subplots(1, 2)
    got_figure, got = draw(ax)
    assert got_figure is figure
    assert np.atleast_1d(got)[0] is ax
    assert ax.has_data()
    assert not other.has_data()
    figure.savefig("/dev/null", format="png")


def test_encoding_draws_the_numbers():
    figure, (ax,) = plot_encoding({"sinusoidal": table()}, label="value")
    figure.draw_without_rendering()
    np.testing.assert_allclose(ax.images[0].get_array(), table())
    most = float(table().abs().max())
    assert ax.images[0].get_clim() == pytest.approx((-most, most))
    assert (ax.get_title(), ax.get_xlabel(), ax.get_ylabel()) == ("sinusoidal", "feature", "position")
    assert ax.child_axes[0].get_ylabel() == "value"


@pytest.mark.parametrize("shared", [True, False])
def test_encoding_scales(shared):
    heads = bias()
    _, axes = plot_encoding({"0": heads[0], "1": heads[1], "rates": -heads[1]}, shared=shared)
    low, high = float(heads[0].min()), float(-heads[1].min())
    limits = [ax.images[0].get_clim() for ax in axes]
    assert limits == ([(low, -low)] * 3 if shared else [(low, 0), (-high, 0), (0, high)])
    assert [len(ax.child_axes) for ax in axes] == ([0, 0, 1] if shared else [1, 1, 1])


def test_encoding_hidden_entries_are_grey_and_out_of_the_scale():
    hidden = bias()[0].masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)
    figure, (ax,) = plot_encoding({"causal": hidden})
    figure.draw_without_rendering()
    assert ax.images[0].get_clim() == (float(bias()[0].min()), 0)
    assert ax.images[0].get_array().mask.sum() == 15


def test_similarity_scale_and_labels():
    _, axes = plot_similarity({"a": 0.5 * torch.eye(4), "b": torch.eye(3)})
    assert [ax.images[0].get_clim() for ax in axes] == [(-1, 1)] * 2
    assert [ax.get_ylabel() for ax in axes] == ["position", ""]
    assert axes[1].child_axes[0].get_ylabel() == "cosine similarity"


def test_decay_lines_and_legend():
    figure, ax = decay()
    figure.draw_without_rendering()
    zero, first, second, other = ax.lines
    np.testing.assert_allclose(zero.get_ydata(), 0)
    np.testing.assert_allclose(first.get_ydata(), score_decay(ALiBi(2), torch.arange(5))[0])
    np.testing.assert_allclose(other.get_ydata(), [1, 2, 3, 2, 1])
    assert first.get_color() == second.get_color() != other.get_color()
    assert first.get_alpha() > second.get_alpha()
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b"]
    alone = plot_score_decay({"a": ([0, 1], [1, 0])}, colors={"a": "#000000"}, ylabel="bias")[1]
    assert alone.get_legend() is None
    assert alone.lines[1].get_color() == "#000000"
    assert alone.get_ylabel() == "bias"
    assert "distance" in alone.get_xlabel()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_of_any_kind(dtype):
    values = table().to(dtype).requires_grad_()
    _, axes = plot_encoding({"tensor": values, "array": values.detach().double().numpy(), "list": values.tolist()})
    for ax in axes:
        np.testing.assert_allclose(ax.images[0].get_array(), values.detach().double())


@pytest.mark.parametrize(
    "call",
    [
        lambda: plot_encoding({}),
        lambda: plot_encoding({"heads": torch.zeros(2, 3, 3)}),
        lambda: plot_encoding({"empty": torch.zeros(0, 3)}),
        lambda: plot_encoding({"a": torch.zeros(2, 3)}, axes=[]),
        lambda: plot_similarity({}),
        lambda: plot_similarity({"a": torch.zeros(2, 3)}),
        lambda: plot_score_decay({}),
        lambda: plot_score_decay({"a": ([0, 1], [1, 2, 3])}),
        lambda: plot_score_decay({"a": (np.zeros((2, 2)), np.zeros((2, 2)))}),
    ],
)
def test_wrong_shapes(call):
    with pytest.raises(ShapeError, match=r": expected .*, got .*; "):
        call()
