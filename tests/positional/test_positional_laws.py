"""The helpers that measure laws, against closed forms and against encodings that break them."""

from __future__ import annotations

import pytest
import torch

from liegroup_attn.errors import DtypeError, ShapeError
from liegroup_attn.positional import (
    ALiBi,
    CayleyString,
    LearnedEncoding,
    RotaryEncoding,
    RotationEncoding,
    SinusoidalEncoding,
    commutator_norm,
    grid_positions,
    position_similarity,
    relative_law_residual,
    score_decay,
)

D = 8


def vectors(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def skew(*shape: int, seed: int = 0) -> torch.Tensor:
    any_matrix = vectors(*shape, seed=seed)
    return any_matrix - any_matrix.mT


class Exponential(RotationEncoding):
    """R(x) = exp(Σ x_p A_p) for whatever generators."""

    def __init__(self, generators: torch.Tensor) -> None:
        heads = None if generators.dim() == 3 else generators.size(0)
        super().__init__(generators.size(-1), heads, generators.size(-3))
        self.generators = generators

    def act(self, x, coordinates):
        generator = torch.einsum("np,...pij->...nij", coordinates, self.generators).contiguous()
        turned = torch.matrix_exp(generator)
        return (turned @ x.unsqueeze(-1)).squeeze(-1)


class Contrary(RotaryEncoding):
    """Keys turn the other way, so that scores know m + n."""

    def act_both(self, query, key, coordinates):
        return self.act(query, coordinates), self.act(key, -coordinates)


class Contextual(ALiBi):
    contextual = True


def test_commutators_of_rotations_in_space():
    basis = torch.zeros(3, 3, 3, dtype=torch.float64)
    for axis in range(3):
        i, j = (axis + 1) % 3, (axis + 2) % 3
        basis[axis, j, i], basis[axis, i, j] = 1, -1
    norm = 2**0.5  # [L_x, L_y] = L_z, of Frobenius norm √2
    assert float(commutator_norm(basis)) == pytest.approx(norm)
    assert float(commutator_norm(basis * torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1))) == pytest.approx(6 * norm)
    assert float(commutator_norm(basis[:1])) == 0


def test_commutators_by_head():
    first = skew(D, D)
    commuting = torch.stack([first, first @ first @ first])
    crossing = torch.stack([first, skew(D, D, seed=1)])
    norms = commutator_norm(torch.stack([commuting, crossing]))
    assert norms.shape == (2,)
    assert norms[0] <= 1e-11
    expected = first @ crossing[1] - crossing[1] @ first
    torch.testing.assert_close(norms[1], expected.norm())


@pytest.mark.parametrize("layout", ["half_split", "interleaved"])
def test_rope_keeps_the_relative_law(layout):
    assert relative_law_residual(RotaryEncoding(D, layout=layout), torch.arange(12)) <= 1e-14
    assert relative_law_residual(RotaryEncoding(D, layout=layout), torch.tensor([0.5, -3.0, 100.25])) <= 1e-12


@pytest.mark.parametrize("heads", [False, True])
def test_the_relative_law_holds_iff_generators_commute(heads):
    first, places = skew(D, D) / 4, grid_positions(3, 3)
    commuting, crossing = (torch.stack([first, second]) for second in (first @ first @ first, skew(D, D, seed=1) / 4))
    if heads:  # the worst head decides
        commuting, crossing = torch.stack([commuting, 2 * commuting]), torch.stack([commuting, crossing])
    assert relative_law_residual(Exponential(commuting), places) <= 1e-11
    assert relative_law_residual(Exponential(crossing), places) > 0.1
    one_axis = Exponential(skew(1, D, D))  # one generator commutes with itself
    assert relative_law_residual(one_axis, torch.arange(4)) <= 1e-12


def test_keys_that_turn_the_other_way_break_the_relative_law():
    assert relative_law_residual(Contrary(D, layout="half_split"), torch.arange(4)) > 0.1


@pytest.mark.parametrize("base", [10_000.0, 100.0])
def test_decay_of_rope_is_a_sum_of_cosines(base):
    rotary, distances = RotaryEncoding(64, layout="half_split", base=base), torch.arange(-40, 41)
    frequencies = base ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    expected = 2 * torch.cos(distances[:, None] * frequencies).sum(-1)
    torch.testing.assert_close(score_decay(rotary, distances), expected, atol=1e-11, rtol=0)


def test_decay_is_what_random_tokens_average_to():
    rotary, distances = RotaryEncoding(D, layout="half_split"), torch.arange(6)
    drawn = score_decay(rotary, distances, vectors(40_000, D))
    torch.testing.assert_close(drawn, score_decay(rotary, distances), atol=0.15, rtol=0)  # 5 standard errors are 0.1


def test_decay_of_given_tokens():
    rotary, q, k = RotaryEncoding(D, layout="half_split"), vectors(5, D), vectors(5, D, seed=1)
    got = score_decay(rotary, torch.tensor([-4, 0, 7]), q, k)
    for scores, (m, n) in zip(got, [(10, 14), (3, 3), (8, 1)], strict=True):
        turned = rotary(q, torch.full((5,), m)), rotary(k, torch.full((5,), n))
        torch.testing.assert_close(scores, (turned[0] * turned[1]).sum(-1).mean(), atol=1e-12, rtol=0)


def test_decay_by_head_and_on_two_axes():
    generators = torch.stack([skew(2, D, D, seed=head) for head in range(3)])
    places = grid_positions(2, 2)
    got = score_decay(Exponential(generators), places)
    assert got.shape == (3, 4)
    for head in range(3):
        turned = torch.matrix_exp(torch.einsum("np,pij->nij", places.double(), generators[head]))
        torch.testing.assert_close(got[head], turned.diagonal(dim1=-2, dim2=-1).sum(-1), atol=1e-11, rtol=0)


def test_decay_of_a_bias_is_the_bias():
    distances = torch.tensor([-3, 0, 5])
    expected = -ALiBi(4).slopes()[:, None] * distances.abs()
    torch.testing.assert_close(score_decay(ALiBi(4), distances), expected, atol=0, rtol=0)


def test_a_bias_that_counts_from_0_is_asked_nothing_below():
    class FromZero(ALiBi):
        negative = False

    torch.testing.assert_close(
        score_decay(FromZero(2), torch.arange(-3, 4)), score_decay(ALiBi(2), torch.arange(-3, 4))
    )


def test_sinusoidal_similarity_depends_on_distance_alone():
    similarity = position_similarity(SinusoidalEncoding(64), torch.arange(30))
    torch.testing.assert_close(similarity[1:, 1:], similarity[:-1, :-1], atol=1e-12, rtol=0)
    frequencies = 10_000.0 ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    expected = torch.cos(torch.arange(30)[:, None] * frequencies).mean(-1)  # pairs of norm 1
    torch.testing.assert_close(similarity[0], expected, atol=1e-12, rtol=0)


def test_similarity_of_vectors():
    table = LearnedEncoding(D, 6).weight
    similarity = position_similarity(table)
    torch.testing.assert_close(similarity, position_similarity(3 * table))
    torch.testing.assert_close(similarity.diagonal(), torch.ones(6))
    of_encoding = LearnedEncoding(D, 6)
    expected = position_similarity(of_encoding.weight.double()[2:5])
    torch.testing.assert_close(position_similarity(of_encoding, torch.arange(2, 5)), expected)
    far = position_similarity(torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0], [0.0, 0.0]]))
    torch.testing.assert_close(far[0], torch.tensor([1.0, 0.0, -1.0, 0.0]))
    assert position_similarity(vectors(3, 2, 6, D)).shape == (3, 2, 6, 6)


ROTARY = RotaryEncoding(D, layout="half_split")


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: commutator_norm(torch.zeros(3, 3)), ShapeError, r"generators: expected at least 3 dim.*; give"),
        (lambda: commutator_norm(torch.zeros(0, 3, 3)), ShapeError, r"generators: expected at least one, got .*; give"),
        (lambda: commutator_norm(torch.zeros(2, 3, 4)), ShapeError, r"X: expected square matrices .*; drop"),
        (lambda: commutator_norm(torch.zeros(2, 3, 3).long()), DtypeError, r"generators: expected a floating"),
        (lambda: relative_law_residual(ALiBi(2), torch.arange(3)), TypeError, r"RotationEncoding, got ALiBi; for"),
        (lambda: relative_law_residual(ROTARY, torch.ones(3).bool()), DtypeError, r"positions: expected integers, got"),
        (lambda: score_decay(SinusoidalEncoding(4), torch.arange(3)), TypeError, r"encoding: .* got Sinus.*; for pos"),
        (lambda: score_decay(Contextual(2), torch.arange(3)), TypeError, r"not contextual, got Contextual; for"),
        (
            lambda: score_decay(ALiBi(2), torch.arange(3), torch.zeros(1, D)),
            ShapeError,
            r"query: expected None .*; its",
        ),
        (
            lambda: score_decay(ROTARY, torch.arange(3), torch.zeros(1, 4)),
            ShapeError,
            r"query: expected .*\(S, 8\).*; m",
        ),
        (
            lambda: score_decay(ROTARY, torch.arange(3), key=torch.zeros(1, D)),
            ShapeError,
            r"key: expected None .*; give",
        ),
        (lambda: position_similarity(ROTARY, torch.arange(3)), TypeError, r"vectors: .* got RotaryEncoding; take"),
        (lambda: position_similarity(SinusoidalEncoding(4)), ShapeError, r"positions: expected a tensor .* None; e\.g"),
        (
            lambda: position_similarity(torch.zeros(3, 4), torch.arange(3)),
            ShapeError,
            r"positions: expected None .*; in",
        ),
        (lambda: position_similarity(torch.zeros(4)), ShapeError, r"vectors: expected at least 2 dimensions"),
    ],
)
def test_wrong_kinds(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_numbers_of_learned_encodings_keep_no_graph():
    assert not score_decay(CayleyString(8, 2), torch.arange(4)).requires_grad


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32])
def test_small_integers_are_positions(dtype):
    """Differences of uint8 are not below 0: a residual of a law that holds came out as 1.8."""
    encoding, at = RotaryEncoding(8, layout="half_split"), torch.arange(5)
    assert relative_law_residual(encoding, at.to(dtype)) < 1e-12
    assert torch.equal(score_decay(encoding, at.to(dtype)), score_decay(encoding, at))
