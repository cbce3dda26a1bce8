"""LieMultiheadAttention: the contract of torch.nn.MultiheadAttention, mixing by exp(tQ)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liegroup_attn.errors import DtypeError, MaskError, NestedTensorError, ShapeError
from liegroup_attn.masks import check_closed
from liegroup_attn.nn.lie_flow import LieFlow

__all__ = ["LieMultiheadAttention"]


class _Part:
    """A third of ``in_proj_weight`` once the module is built; else the parameter of that name."""

    def __init__(self, name: str) -> None:
        self.index = "qkv".index(name)
        self.key = f"{name}_proj_weight"

    def __get__(self, module: nn.MultiheadAttention | None, kind: type) -> Tensor | None:
        if module is None or "lie" not in {*module.__dict__, *module._modules}:
            raise AttributeError(self.key)  # nn.Module then looks among its parameters
        own = module._parameters[self.key]
        return module.in_proj_weight.chunk(3)[self.index] if own is None else own


class LieMultiheadAttention(nn.MultiheadAttention):
    """``torch.nn.MultiheadAttention`` whose values flow on along exp(tQ) after the first hop.

    Constructor, forward, masks (bool True = is ignored, as there) and state-dict keys are torch's; beside them
    ``lie.time``, ``lie.rate_weight`` and ``lie.rate_bias``. Time starts at 0, where the result is that of torch's module,
    and learns from there. It works inside ``nn.TransformerEncoderLayer`` and ``nn.TransformerDecoderLayer``, which never
    take their fused softmax path around it.

    Queries and keys must be the same tokens, passed as one and the same tensor: only then is S square and has a generator. Across
    different tokens only time 0 exists: such a call is softmax attention while time is 0, and an error after. With a
    ``kdim`` or ``vdim`` of its own the module has nothing to learn and is softmax attention altogether, and so it is
    with ``add_bias_kv`` or ``add_zero_attn``. A row whose
    targets are all ignored keeps its own value (torch gives NaN or 0). ``need_weights`` returns the true mixing matrix.

    Args:
        embed_dim: as in torch, and so for all up to ``dtype``.
        num_heads: H.
        dropout: probability of dropping an entry of S, in training.
        bias: of the projections.
        add_bias_kv: another key makes S other than square: a warning, and softmax attention that stays so.
        add_zero_attn: the same.
        kdim: width of the keys.
        vdim: width of the values.
        batch_first: (B, N, C) instead of (N, B, C).
        device: of the parameters.
        dtype: of the parameters.
        **lie_options: those of ``LieFlow``: ``time``, ``max_time``, ``clock`` …

    Raises:
        ShapeError: a time > 0 beside ``add_bias_kv``, ``add_zero_attn``, ``kdim`` or ``vdim``.
        GeneratorError: see ``LieFlow``.

    Example:
        >>> layer = LieMultiheadAttention(16, 2, batch_first=True)
        >>> x = torch.randn(3, 5, 16)
        >>> y, weights = layer(x, x, x)
        >>> y.shape, weights.shape
        (torch.Size([3, 5, 16]), torch.Size([3, 5, 5]))

    Source: [Vaswani2017]_; docs/mathematics.
    """

    plain: ClassVar[type[nn.Module]] = nn.MultiheadAttention
    lie: LieFlow | None
    # Whoever honours ``_qkv_same_embed_dim``, which says False here, reads three weights: they are parts of the one.
    q_proj_weight, k_proj_weight, v_proj_weight = (_Part(name) for name in ("q", "k", "v"))  # type: ignore[assignment]

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **lie_options: Any,
    ) -> None:
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        flow = LieFlow(num_heads, self.head_dim, device=device, dtype=dtype, **lie_options)
        reason = why_not_square(self)
        if reason is not None and lie_options.get("time", 0) > 0:
            raise ShapeError(
                f"{reason}: expected none of it beside time={lie_options['time']:g}, got it; keys that are not the queries' "
                "tokens make S other than square, and only softmax attention (time 0) exists"
            )
        if reason in ("add_bias_kv", "add_zero_attn"):
            warnings.warn(
                f"{reason} makes S other than square: this LieMultiheadAttention has no generator, it is softmax "
                "attention and stays so; leave it out to learn a time",
                stacklevel=2,
            )
        self.carry(flow if reason is None else None)

    @staticmethod
    def why_not(module: Any, parents: Sequence[nn.Module]) -> str | None:
        """Why torch's module stays softmax attention, None if it need not."""
        if any(isinstance(p, nn.TransformerDecoderLayer) and p.multihead_attn is module for p in parents[:1]):
            return "cross-attention: only time 0 exists"
        reason = why_not_square(module)
        return None if reason is None else f"{reason}: S is not square, only time 0 exists"

    @staticmethod
    def flow_of(module: Any, **options: Any) -> LieFlow:
        """A flow of the module's sizes, dtype and device."""
        weight = module.out_proj.weight
        return LieFlow(module.num_heads, module.head_dim, device=weight.device, dtype=weight.dtype, **options)

    def carry(self, flow: LieFlow | None) -> None:
        """Take the flow; from here on torch's fused paths, which run softmax, keep away."""
        self.lie = flow
        self._qkv_same_embed_dim = False

    def drop(self) -> None:
        """Become torch's module again."""
        del self.lie
        self._qkv_same_embed_dim = self.in_proj_weight is not None

    def reset_parameters(self) -> None:
        """Start values, drawn anew where they are random."""
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        self._qkv_same_embed_dim = self.in_proj_weight is not None
        super()._reset_parameters()
        if hasattr(self, "lie"):
            self._qkv_same_embed_dim = False
            if self.lie is not None:
                self.lie.reset_parameters()

    def forward(  # noqa: D102
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if query.is_nested or key.is_nested or value.is_nested:
            raise NestedTensorError(
                "LieMultiheadAttention does not support NestedTensor outside of its fast path, and has none: expected padded "
                "tensors, got a nested one; build nn.TransformerEncoder with enable_nested_tensor=False"
            )
        flow = self.lie
        if (
            flow is None
            or query
            is not key  # two views of one tensor are two tensors: addresses mean nothing under compile or torch.func
            or query.dim() not in (2, 3)
            or value.shape[:-1] != key.shape[:-1]
        ):
            return self._across(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        F._mha_shape_check(query, key, value, key_padding_mask, attn_mask, self.num_heads)  # type: ignore[attr-defined]
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        q, k, v = self._project(query, key, value)  # (B, H, N, D) each
        mask = self._mask(flow, q, attn_mask, key_padding_mask, is_causal)
        drop = self.dropout if self.training else 0.0
        generator = flow.generator(q, k, v, visible=mask, is_causal=is_causal, dropout_p=drop, closed=True)
        weights = None
        if need_weights:
            weights = F.dropout(flow.mixing(generator, v), drop)
            mixed = weights @ v
        else:
            mixed = flow(generator, v)
        out = self.out_proj(mixed.transpose(1, 2).flatten(2))  # (B, N, C)
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if query.dim() == 2:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Three of (B, H, N, D)."""
        one = query is key is value
        if query.dim() == 2:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        if one:  # one product instead of three
            parts = F.linear(query, self.in_proj_weight, _as(self.in_proj_bias, query)).chunk(3, -1)
        else:
            weights = self.in_proj_weight.chunk(3)
            biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
            parts = tuple(
                F.linear(x, w, _as(b, x)) for x, w, b in zip((query, key, value), weights, biases, strict=True)
            )
        return tuple(x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in parts)

    def _mask(
        self,
        flow: LieFlow,
        query: Tensor,
        attn_mask: Tensor | None,
        key_padding_mask: Tensor | None,
        is_causal: bool,
    ) -> Tensor | None:
        """Torch's two masks (True = ignored) as one (True = takes part), beside a causal one if that is what ``attn_mask`` is.

        What both allow is closed if each is. So torch's ``attn_mask`` is looked at alone, since both together would be
        N³ work for every item of the batch, and padding of keys, which is closed, not at all.
        """
        batch, _, n, _ = query.shape
        masks = []
        if key_padding_mask is not None:
            if key_padding_mask.shape not in ((batch, n), *([(n,)] if batch == 1 else [])):
                raise MaskError(
                    f"key_padding_mask: expected {(batch, n)}, got {tuple(key_padding_mask.shape)}; one row an item, one entry a key"
                )
            masks.append(_taking_part("key_padding_mask", key_padding_mask.reshape(batch, 1, 1, n), query.dtype))
        if attn_mask is not None and not is_causal:
            if attn_mask.shape not in ((n, n), (batch * self.num_heads, n, n)):
                raise MaskError(
                    f"attn_mask: expected {(n, n)} or {(batch * self.num_heads, n, n)}, got {tuple(attn_mask.shape)}; give one "
                    "for all, or one per item and head"
                )
            wide = attn_mask if attn_mask.dim() == 2 else attn_mask.view(batch, -1, n, n)
            mask = _taking_part("attn_mask", wide, query.dtype)
            if not (flow.allow_open_mask or flow.is_still()):
                check_closed(mask)
            masks.append(mask)
        if len(masks) < 2:
            return masks[0] if masks else None
        if all(mask.dtype == torch.bool for mask in masks):
            return masks[0] & masks[1]
        biases = (
            torch.zeros_like(m, dtype=query.dtype).masked_fill(~m, -torch.inf) if m.dtype == torch.bool else m
            for m in masks
        )
        return sum(biases, torch.zeros((), dtype=query.dtype, device=query.device))

    def _across(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
        average_attn_weights: bool,
        is_causal: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Softmax attention across different tokens, torch's own."""
        if self.lie is not None and not self.lie.is_softmax(by_value=True):
            raise ShapeError(
                f"key: expected the query itself, got another tensor of shape {tuple(key.shape)} beside a query of shape "
                f"{tuple(query.shape)}; across different tokens there is no generator, only softmax attention (time 0): "
                "pass one tensor as both if they are the same tokens, else exclude this module from the conversion"
            )
        if self.lie is not None and torch.is_grad_enabled() and self.lie.time.requires_grad and self.training:
            warnings.warn(
                "LieMultiheadAttention: expected the query itself as the key, got another tensor; such a call is softmax "
                "attention and its time has no gradient: pass one tensor as both, or exclude this module from the conversion",
                stacklevel=3,
            )
        swap = self.batch_first and query.dim() == 3
        if swap:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        packed = self.in_proj_weight is not None
        out, weights = F.multi_head_attention_forward(
            query,
            key,
            value,
            self.embed_dim,
            self.num_heads,
            self.in_proj_weight,
            self.in_proj_bias,
            self.bias_k,
            self.bias_v,
            self.add_zero_attn,
            self.dropout,
            self.out_proj.weight,
            self.out_proj.bias,
            training=self.training,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            use_separate_proj_weight=not packed,
            q_proj_weight=self.q_proj_weight,
            k_proj_weight=self.k_proj_weight,
            v_proj_weight=self.v_proj_weight,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )
        return (out.transpose(0, 1) if swap else out), weights


def _as(bias: Tensor | None, x: Tensor) -> Tensor | None:
    """A bias may have a dtype of its own, which torch's module takes."""
    return None if bias is None else bias.to(x.dtype)


def _taking_part(name: str, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Torch's mask as ours: bool True = takes part, or float."""
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise DtypeError(
            f"{name}: expected torch.bool (True = is ignored) or a floating-point mask, got {mask.dtype}; convert it, e.g. mask == 0"
        )
    return ~mask if mask.dtype == torch.bool else mask.to(dtype)


def why_not_square(module: nn.MultiheadAttention) -> str | None:
    """The argument for which a module's S is never square over its own tokens; None if it may be."""
    if module.bias_k is not None:
        return "add_bias_kv"
    if module.add_zero_attn:
        return "add_zero_attn"
    return "kdim or vdim" if module.in_proj_weight is None else None
