"""The generator whose jump chain is softmax attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from liegroup_attn.checks import check_dropout, check_jump_rates, check_scale, check_scores, check_shape
from liegroup_attn.deprecated import renamed
from liegroup_attn.errors import DtypeError, GeneratorError, ShapeError
from liegroup_attn.generators.base import Generator
from liegroup_attn.generators.dense import DenseGenerator
from liegroup_attn.generators.rows import Blockwise, SoftmaxRows
from liegroup_attn.masks import biased_mask, check_closed, read_mask
from liegroup_attn.scores import Score, TensorBias, read_score
from liegroup_attn.tensors import at_least_float32, without_autocast
from liegroup_attn.visible import Causal, Everything, Visible

__all__ = ["SoftmaxGenerator"]


class SoftmaxGenerator(Generator):
    """Q = diag(ρ)(S − I) with the jump chain S = softmax(score(scale · q kᵀ)) over what is visible; it never forms N×N to act.

    Args:
        query: (..., N, E).
        key: (..., N, E), same tokens as the query.
        score: what acts on the scores before the softmax, see ``scores``: ``SoftCap``, a bias encoding's ``score(…)``, or a
            tensor of finite numbers that is added, broadcastable to (..., N, N). It hides nothing.
        visible: who sees whom, e.g. ``Causal() & Window(256) & Documents(ids)``, or a mask broadcastable to (..., N, N),
            bool (True = takes part) or float (added to the scores), transitively closed. A row without a target keeps its
            value.
        is_causal: ``Causal() & visible``.
        jump_rates: ρ, broadcastable to (..., N), in [0, 1]; None means 1.
        scale: of the scores; default 1/√E.
        dropout_p: probability of dropping an entry of S, drawn anew in each jump (``dense`` drops none).
        allow_open_mask: accept a mask that is not transitively closed; exp(tQ) then fills it.
        past: tokens before the first query, of which there are keys alone: ``rows`` from there on are all that it gives, which
            is what decoding asks for.

    Raises:
        ShapeError: wrong rank, N = 0, or other tokens in the key than in the query.
        DtypeError: mixed dtypes.
        MaskError: a mask of another shape, or one that is not transitively closed.
        GeneratorError: NaN, inf or an overflow in scores or bias, ρ outside [0, 1] (CPU); leaves on another device.

    Example:
        >>> q = torch.zeros(1, 2, 4)
        >>> SoftmaxGenerator(q, q).dense()
        tensor([[[-0.5000,  0.5000],
                 [ 0.5000, -0.5000]]])

    Source: docs/mathematics, "From scores to a generator".
    """

    blockwise = True
    drops_in_hops = True
    jumps_on_uniformized = True

    @renamed(attn_mask="visible", score_bias="score")
    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        *,
        score: Score | Tensor | None = None,
        visible: Visible | Tensor | None = None,
        is_causal: bool = False,
        jump_rates: Tensor | float | None = None,
        scale: float | None = None,
        dropout_p: float = 0.0,
        allow_open_mask: bool = False,
        past: int = 0,
    ) -> None:
        batch = _check_tokens(query, key, past)
        check_dropout(dropout_p)
        check_scale(scale)
        n = key.size(-2)
        self.num_states, self.batch_shape, self.past = n, batch, past
        self.query, self.key = query, key
        self.scale = 1 / math.sqrt(query.size(-1)) if scale is None else scale
        if not past:  # in decoding a look at each token would cost more than its attention
            check_scores(query, key, self.scale)
        self.dropout_p = dropout_p
        self.jump_rates = check_jump_rates(jump_rates, torch.Size([*batch, n - past]), query, not past)
        self._see(score, visible, is_causal, allow_open_mask)
        self._kernel: dict[bool, tuple[Tensor | None, Tensor | None]] = {}  # with and without gradients

    def _see(
        self, score: Score | Tensor | None, visible: Visible | Tensor | None, is_causal: bool, allow_open: bool
    ) -> None:
        shape = torch.Size([*self.batch_shape, self.num_states - self.past, self.num_states])
        self.score = read_score(score, shape, self.past)
        if isinstance(visible, Visible):
            whole = torch.Size([*self.batch_shape, self.num_states, self.num_states])
            visible.check(whole)
        elif visible is not None:
            visible, bias = read_mask(visible, self.query.dtype, self.past)
            visible.check(shape)
            if bias is not None:
                of_mask = TensorBias(bias, self.past)
                self.score = of_mask if self.score is None else self.score | of_mask
        visible = Everything() if visible is None else visible
        self.visible = Causal() & visible if is_causal and not visible.is_causal else visible
        self.is_causal = self.visible.is_causal
        self.leaves = () if self.score is None else self.score.leaves
        for tensor in (*self.leaves, *self.visible.tensors):
            if tensor.device != self.query.device:
                raise GeneratorError(
                    f"score, visible: expected tensors on {self.query.device} as the query, got one on {tensor.device}; move it"
                )
        if not (allow_open or self.past):
            check_closed(self.visible, self.num_states)

    def first(self, items: int, tokens: int) -> SoftmaxGenerator:
        """The chain among the first tokens of the first items of a batch (B, H): under a causal mask a part of this one."""
        few = copy(self)
        few.query, few.key = (x[:items, :, :tokens] for x in (self.query, self.key))
        few.num_states = tokens
        few.batch_shape = torch.broadcast_shapes(few.query.shape[:-2], few.key.shape[:-2])
        few.score = None if self.score is None else self.score.of_items(items)
        few.leaves = () if few.score is None else few.score.leaves
        few.visible, few._kernel, few.dropout_p = self.visible.of_items(items), {}, 0.0
        if self.jump_rates is not None:
            rates = self.jump_rates.expand(*self.batch_shape, self.num_states)
            few.jump_rates = rates[:items, :, :tokens]
        return few

    @property
    def has_mask(self) -> bool:
        """Whether more than causality hides tokens."""
        return not all(isinstance(part, Causal) for part in self.visible.parts)

    def softmax_rows(self, batch: torch.Size, dtype: torch.dtype) -> Blockwise:  # noqa: D102
        dtype = torch.promote_types(dtype, at_least_float32(self.query).dtype)
        flat = (x.expand(*batch, *x.shape[-2:]).reshape(batch.numel(), *x.shape[-2:]) for x in (self.query, self.key))
        query, key = (x.to(dtype) for x in flat)
        rows = SoftmaxRows(batch, self.score, self.visible, self.past)
        return Blockwise(rows, (self.scale * query, key, *self.leaves, *self.visible.tensors), self.jump_rates)

    def rows(self, start: int, stop: int) -> Tensor:  # noqa: D102
        if not self.past <= start < stop <= self.num_states:
            raise ShapeError(
                f"start, stop: expected {self.past} ≤ start < stop ≤ {self.num_states}, got {start}, {stop}; name rows that "
                "there are queries of"
            )
        with without_autocast(self.query):
            rows, tensors, _ = self.softmax_rows(self.batch_shape, self.query.dtype)
            columns = stop if self.is_causal else self.num_states
            return rows.chain(tensors, start, stop, columns).view(*self.batch_shape, stop - start, columns)

    def apply(self, value: Tensor) -> Tensor:  # noqa: D102
        moved = self.jump(value) - value
        return moved if self.jump_rates is None else self.jump_rates.unsqueeze(-1).to(value.dtype) * moved

    def jump(self, value: Tensor) -> Tensor:  # noqa: D102
        if self.score is not None and not self.score.adds:  # no kernel knows it
            return self._jump_by_rows(value)
        # Iterates may be wider than the scores' dtype; the kernels want one dtype, and S only averages, if not too often.
        batch = torch.broadcast_shapes(self.batch_shape, value.shape[:-2])
        dtype = torch.float64 if value.dtype == torch.float64 else self.query.dtype
        mask, no_target = self._kernel_mask()
        query, key, values = (x.to(dtype).expand(*batch, *x.shape[-2:]) for x in (self.query, self.key, value))
        moved = F.scaled_dot_product_attention(
            query,
            key,
            values,
            attn_mask=mask if mask is None or mask.dtype == torch.bool else mask.to(dtype),
            dropout_p=self.dropout_p,
            is_causal=self.is_causal and mask is None,
            scale=self.scale,
        ).to(value.dtype)
        return moved if no_target is None else torch.where(no_target, value, moved)

    def prepare(self) -> None:  # noqa: D102
        if self.score is None or self.score.adds:
            self._kernel_mask()

    def _jump_by_rows(self, value: Tensor) -> Tensor:
        """A block of rows of S at a time."""
        found = []
        for start in range(0, self.num_states, _BLOCK):
            chain = self.rows(start, min(start + _BLOCK, self.num_states))
            chain = F.dropout(chain, self.dropout_p) if self.dropout_p else chain
            with without_autocast(value):
                dtype = torch.promote_types(chain.dtype, value.dtype)
                found.append((chain.to(dtype) @ value[..., : chain.size(-1), :].to(dtype)).to(value.dtype))
        return torch.cat(found, -2)

    def _kernel_mask(self) -> tuple[Tensor | None, Tensor | None]:
        """What kernels take, with rows without a target opened, and these rows (..., N, 1): formed once for all jumps."""
        wanted = torch.is_grad_enabled()
        if wanted not in self._kernel:
            n, no_target = self.num_states, None
            with without_autocast(self.query):
                bias = None if self.score is None else self.score.formed(n, n)
            # A bias or mask leaves no room for a kernel's own causal mask.
            allowed = self.allowed() if self.has_mask else None
            if allowed is not None and not self.visible.own:
                no_target = ~allowed.any(-1, keepdim=True)
                allowed = allowed | no_target
            causal = self.is_causal and allowed is None
            self._kernel[wanted] = biased_mask(bias, allowed, causal, self.query, self.key), no_target
        return self._kernel[wanted]

    def scores(self) -> Tensor:
        """What the softmax is taken of, (..., N, N), float32 or float64; anything where hidden."""
        with without_autocast(self.query):
            query, key = at_least_float32(self.query), at_least_float32(self.key)
            scores = (self.scale * query) @ key.mT
            return (
                scores
                if self.score is None
                else self.score.acted(scores, 0, self.score.at(self.leaves, 0, self.num_states))
            )

    def allowed(self) -> Tensor | None:
        """Which targets take part, bool, broadcastable to (..., N, N); None means all."""
        n = self.num_states
        return self.visible.rows(0, n, n, self.visible.tensors, self.query.device)

    def jump_chain(self) -> Tensor:
        """S as a matrix (..., N, N), float32 or float64."""
        scores, allowed = self.scores(), self.allowed()
        if allowed is None:
            return scores.softmax(-1)
        if not self.visible.own:  # a row without a target jumps to itself
            eye = torch.eye(self.num_states, dtype=torch.bool, device=scores.device)
            allowed = allowed | (eye & ~allowed.any(-1, keepdim=True))
        return scores.masked_fill(~allowed, -torch.inf).softmax(-1)

    def with_rates(self, rate_fn: Callable[[Tensor], Tensor]) -> DenseGenerator:
        """Q = diag(ρ)(R − diag(R1)), R = rate_fn(scores), 0 where hidden; scores, mask, ρ and dropout are those of the chain.

        Args:
            rate_fn: scores → rates ≥ 0, entry by entry, e.g. ``softplus``.

        Raises:
            GeneratorError: no function, or rates that are negative or not finite (CPU).
            ShapeError: rates of another shape.
        """
        if not callable(rate_fn):
            raise GeneratorError(
                f"rate_fn: expected a function of scores, got {rate_fn!r}; pass liegroup_attn.softplus itself"
            )
        scores, allowed = self.scores(), self.allowed()  # (..., N, N)
        if allowed is not None:  # a rate function may have no gradient at −inf; a row without a target has no rates
            allowed = allowed & allowed.any(-1, keepdim=True)
            scores = scores.masked_fill(~allowed, 0)
        rates = rate_fn(scores)
        if not isinstance(rates, Tensor) or rates.shape != scores.shape:
            got = tuple(rates.shape) if isinstance(rates, Tensor) else type(rates).__name__
            raise ShapeError(
                f"rate_fn: expected rates of the scores' shape {tuple(scores.shape)}, got {got}; map entry by entry"
            )
        if allowed is not None:
            rates = rates.masked_fill(~allowed, 0)
        generator = DenseGenerator.from_rates(rates, jump_rates=self.jump_rates)
        generator.is_causal, generator.dropout_p = self.is_causal, self.dropout_p
        return generator

    def dense(self) -> Tensor:  # noqa: D102
        chain = self.jump_chain()
        moved = chain - torch.eye(self.num_states, dtype=chain.dtype, device=chain.device)
        return moved if self.jump_rates is None else self.jump_rates.unsqueeze(-1).to(chain.dtype) * moved

    def uniformized(self) -> tuple[Tensor, Tensor | None]:  # noqa: D102
        return self.jump_chain(), self.jump_rates

    def jump_intensities(self) -> Tensor:  # noqa: D102
        if self.jump_rates is None:
            return torch.ones(1, dtype=at_least_float32(self.query).dtype, device=self.query.device)
        return at_least_float32(self.jump_rates)

    def rate_bound(self) -> float:
        """1, whatever ρ: the number of hops is known from the time alone, before data is seen."""
        return 1.0


_BLOCK = 128  # rows


def _check_tokens(query: Tensor, key: Tensor, past: int) -> torch.Size:
    """Raise unless both are of the same tokens but for those past; their batch."""
    check_shape("query", query, least_rank=2, remedy="give (..., tokens, width)")
    check_shape("key", key, least_rank=2, remedy="give (..., tokens, width)")
    n = query.size(-2)
    if not isinstance(past, int) or past < 0:
        raise ShapeError(f"past: expected a whole number from 0, got {past!r}; count the tokens before the first query")
    if n == 0:
        raise ShapeError(
            f"query: expected at least 1 token, got shape {tuple(query.shape)}; drop empty sequences from the batch"
        )
    if key.size(-2) != n + past or key.size(-1) != query.size(-1):
        raise ShapeError(
            f"key: expected the query's tokens and width {tuple(query.shape)}, got {tuple(key.shape)}; a generator "
            "needs queries and keys to be the same tokens; across tokens there is softmax attention alone"
        )
    if query.dtype != key.dtype:
        raise DtypeError(f"key: expected {query.dtype} as the query, got {key.dtype}; convert one of them")
    if query.size(-1) == 0:
        raise ShapeError(f"query: expected a width of at least 1, got shape {tuple(query.shape)}; scores need features")
    if query.shape[:-2] == key.shape[:-2]:
        return query.shape[:-2]
    try:
        return torch.broadcast_shapes(query.shape[:-2], key.shape[:-2])
    except RuntimeError:
        raise ShapeError(
            f"key: expected a batch that broadcasts with the query's {tuple(query.shape)}, got {tuple(key.shape)}; "
            "give every query head a key head"
        ) from None
