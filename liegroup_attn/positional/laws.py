"""Laws of positions as numbers: do generators commute, does the relative law hold, how do scores fall with distance."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from liegroup_attn.algebra import bracket
from liegroup_attn.checks import check_shape
from liegroup_attn.errors import ShapeError
from liegroup_attn.positional.base import AbsoluteEncoding, PositionalEncoding, RotationEncoding
from liegroup_attn.positional.bias import BiasEncoding

__all__ = ["commutator_norm", "position_similarity", "relative_law_residual", "score_decay"]


def commutator_norm(generators: Tensor) -> Tensor:
    """Largest Frobenius norm of [A_p, A_q] over pairs of axes; R(x) = exp(Σ x_p A_p) is a group action iff it is 0.

    Args:
        generators: (..., P, D, D), one a position axis, e.g. with heads in front.

    Returns:
        (...), 0 on one axis.

    Raises:
        DtypeError: not floating point.
        ShapeError: not square, or no axis of generators.

    Example:
        >>> about_z = torch.tensor([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
        >>> about_x = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, -1.0], [0.0, 1.0, 0.0]])
        >>> commutator_norm(torch.stack([about_z, about_x]))  # a rotation about y, of norm √2
        tensor(1.4142)

    Source: [Hall2015]_, chapter 3.
    """
    check_shape("generators", generators, least_rank=3, remedy="give (..., axes, width, width)")
    if not generators.size(-3):
        raise ShapeError(
            f"generators: expected at least one, got shape {tuple(generators.shape)}; give (..., axes, width, width)"
        )
    brackets = bracket(generators.unsqueeze(-3), generators.unsqueeze(-4))  # (..., P, P, D, D)
    return torch.linalg.matrix_norm(brackets).amax((-2, -1))


def relative_law_residual(encoding: RotationEncoding, positions: Tensor) -> float:
    """How far the relative law R(x)ᵀR(y) = R(y − x) is from true: the largest entry of the difference, over all pairs.

    Where keys are acted on by another matrix than queries, R′, it is R(x)ᵀR′(y) = R(0)ᵀR′(y − x).

    Args:
        encoding: of queries and keys.
        positions: (N,) or (N, P); N² matrices D × D are formed for each head.

    Returns:
        The residual, computed in float64: about 1e-15 times the largest angle where the law holds.

    Raises:
        TypeError: another kind of encoding.
        ShapeError, DtypeError, ValueError: see ``PositionalEncoding.coordinates``.

    Example:
        >>> from liegroup_attn.positional import RotaryEncoding
        >>> relative_law_residual(RotaryEncoding(8, layout="half_split"), torch.arange(16)) < 1e-14
        True

    Source: [Su2021]_, section 3.
    """
    if not isinstance(encoding, RotationEncoding):
        raise TypeError(
            f"encoding: expected a RotationEncoding, got {type(encoding).__name__}; for others compare outputs at shifted "
            "positions"
        )
    positions = _signed(positions)
    queries, keys = _columns(encoding, positions)
    n = len(positions)
    apart = (positions.unsqueeze(0) - positions.unsqueeze(1)).flatten(0, 1)  # y − x, pairs in the order of products
    origin, _ = _columns(encoding, torch.zeros_like(positions[:1]))
    _, differences = _columns(encoding, apart)
    products = torch.einsum("ihxd,jhyd->hxyij", queries, keys)
    expected = torch.einsum("ihd,jhxyd->hxyij", origin.squeeze(2), differences.unflatten(2, (n, n)))
    return float((products - expected).abs().max())


def score_decay(
    encoding: PositionalEncoding, distances: Tensor, query: Tensor | None = None, key: Tensor | None = None
) -> Tensor:
    """What an encoding alone makes of distance: ⟨R(m)q, R(n)k⟩ against m − n, or the bias itself.

    Without ``query`` it is the mean over q = k with independent entries of variance 1. That mean is the trace of
    R(m)ᵀR(n), so nothing is drawn; RoPE's is 2 Σ cos((m − n)θ_i). Scores of a layer are these divided by √D.

    Args:
        encoding: of queries and keys, or of scores where that is not ``contextual``.
        distances: m − n, (N,) or (N, P). Where the relative law fails, n = 0 matters, or the least n that keeps m ≥ 0.
        query: (S, D), averaged over; default as above. Not for biases.
        key: (S, D); default ``query``.

    Returns:
        (N,), or (H, N) where heads differ; float64.

    Raises:
        TypeError: an encoding of tokens, or one that is ``contextual``.
        ShapeError: a query for a bias, a key without a query, or another width.
        DtypeError, ValueError: see ``PositionalEncoding.coordinates``.

    Example:
        >>> from liegroup_attn.positional import ALiBi, RotaryEncoding
        >>> score_decay(RotaryEncoding(4, layout="half_split"), torch.arange(3))
        tensor([4.0000, 3.0805, 1.1673], dtype=torch.float64)
        >>> score_decay(ALiBi(2), torch.arange(1, 3))[0]
        tensor([-0.0625, -0.1250], dtype=torch.float64)

    Source: [Su2021]_, section 3.4.3.
    """
    distances = _signed(distances)
    origin = (-distances.amin(0, keepdim=True)).clamp(min=0)  # of keys; queries stay where every encoding has a meaning
    if isinstance(encoding, BiasEncoding) and not encoding.contextual:
        if query is not None or key is not None:
            raise ShapeError("query: expected None beside a BiasEncoding, got a tensor; its bias knows no tokens")
        like = torch.zeros((), dtype=torch.float64, device=distances.device)
        here = encoding.coordinates(distances + origin, distances.shape[:1], like)
        there = encoding.coordinates(origin, torch.Size([1]), like)
        return encoding.between(here, there.mT).squeeze(-1).detach()
    if not isinstance(encoding, RotationEncoding):
        raise TypeError(
            f"encoding: expected a RotationEncoding, or a BiasEncoding that is not contextual, got {type(encoding).__name__}; "
            "for positions on tokens take position_similarity"
        )
    queries, _ = _columns(encoding, distances + origin)  # (D, H, N, D): column, head, position, entry
    _, keys = _columns(encoding, origin)
    products = torch.einsum("ihnd,jhd->hnij", queries, keys.squeeze(2))  # R(m)ᵀR(n)
    if query is None and key is not None:
        raise ShapeError("key: expected None without a query, got a tensor; give both, or none")
    if query is None:
        scores = products.diagonal(dim1=-2, dim2=-1).sum(-1)
    else:
        pair = [_vectors(name, x, encoding.head_width) for name, x in (("query", query), ("key", key)) if x is not None]
        scores = torch.einsum("si,hnij,sj->hn", pair[0], products, pair[-1]) / len(pair[0])
    return scores.squeeze(0) if encoding.num_heads is None else scores


def position_similarity(vectors: Tensor | AbsoluteEncoding, positions: Tensor | None = None) -> Tensor:
    """Cosine similarity of the vectors of any two positions.

    Args:
        vectors: (..., N, C), e.g. a learned table; or an encoding of tokens, whose vectors are taken at ``positions``.
        positions: (N,) or (N, P), of an encoding alone.

    Returns:
        (..., N, N), 1 on the diagonal, 0 beside a vector of zeros; float64 of an encoding, else the dtype of ``vectors``.

    Raises:
        TypeError: another kind of encoding.
        ShapeError: positions beside vectors, or an encoding without; or see ``PositionalEncoding.coordinates``.
        DtypeError: vectors that are not floating point.

    Example:
        >>> from liegroup_attn.positional import SinusoidalEncoding
        >>> position_similarity(SinusoidalEncoding(64), torch.tensor([0, 1, 50]))[0]
        tensor([1.0000, 0.9662, 0.4898], dtype=torch.float64)

    Source: [Vaswani2017]_, section 3.5.
    """
    if isinstance(vectors, PositionalEncoding):
        if not isinstance(vectors, AbsoluteEncoding):
            raise TypeError(
                f"vectors: expected a tensor or an AbsoluteEncoding, got {type(vectors).__name__}; take score_decay for others"
            )
        if positions is None:
            raise ShapeError("positions: expected a tensor beside an encoding, got None; e.g. torch.arange(100)")
        zeros = torch.zeros(len(positions), vectors.embed_dim, dtype=torch.float64, device=positions.device)
        with torch.no_grad():
            return position_similarity(vectors(zeros, positions))
    if positions is not None:
        raise ShapeError("positions: expected None beside vectors, got a tensor; index the vectors instead")
    check_shape("vectors", vectors, least_rank=2, remedy="give (..., positions, width)")
    unit = F.normalize(vectors, dim=-1)
    return unit @ unit.mT


def _signed(positions: Tensor) -> Tensor:
    """Integers of which differences may be taken."""
    integer = not (positions.is_floating_point() or positions.is_complex() or positions.dtype == torch.bool)
    return positions.long() if integer else positions


@torch.no_grad()
def _columns(encoding: RotationEncoding, positions: Tensor) -> tuple[Tensor, Tensor]:
    """What acts on queries and on keys, by columns: (D, H, N, D), float64."""
    width, heads = encoding.head_width, encoding.num_heads or 1
    eye = torch.eye(width, dtype=torch.float64, device=positions.device)
    columns = eye[:, None, None].expand(width, heads, len(positions), width)
    return encoding.rotate(columns, columns, positions)


def _vectors(name: str, x: Tensor, width: int) -> Tensor:
    check_shape(name, x, least_rank=2, remedy="give (samples, width)")
    if x.dim() != 2 or x.size(-1) != width:
        raise ShapeError(f"{name}: expected shape (S, {width}), got {tuple(x.shape)}; match head_width")
    return x.double()
