"""Exact decoding: layers of Transformers' caches that keep the iterates of their tokens beside keys and values."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, EncoderDecoderCache

from liegroup_attn.errors import CacheError, ConversionError
from liegroup_attn.nn.lie_flow import LieFlow

__all__ = ["KeptLayer", "cache_layer", "check_call", "forget", "note_call", "take_call"]


# Of the calls under way in this thread: several may serve one model.
_noted = threading.local()


def _calls() -> dict[int, tuple[Cache | None, bool]]:
    return getattr(_noted, "calls", {})


def note_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of an attention: its cache and whether weights are wanted, which its function is not told."""
    cache = next((x for x in (*kwargs.values(), *args) if isinstance(x, Cache)), None)
    _noted.calls = {**_calls(), id(module): (cache, bool(kwargs.get("output_attentions")))}


def take_call(module: nn.Module) -> tuple[Cache | None, bool]:
    """What ``note_call`` noted, once."""
    calls = _calls()
    _noted.calls = {key: call for key, call in calls.items() if key != id(module)}
    return calls.get(id(module), (None, False))


def check_call(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook of an attention: what was noted has to have been taken, or it went on with softmax.

    Raises:
        ConversionError: time may pass, and the function of the implementation "lie" was not called.
    """
    if id(module) not in _calls():
        return
    take_call(module)
    flow: LieFlow = module.lie  # type: ignore[assignment]
    if flow.is_softmax():
        return
    got = getattr(getattr(module, "config", None), "_attn_implementation", None)
    raise ConversionError(
        f'{type(module).__name__} of layer {getattr(module, "layer_idx", "?")}: expected the attention implementation "lie", whose function '
        f'lets time pass, got softmax attention by {got!r} (config._attn_implementation); call model.set_attn_implementation("lie"), or '
        "restore_attention(model) to take the flows out"
    )


class _Keeping:
    """Iterates that move with the keys and values of a cache layer."""

    lie_past: Tensor | None = None  # (B, H, P, kept_width)
    lie_settings: tuple[object, ...] = ()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._pick(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        if self.lie_past is not None:
            self.lie_past = self.lie_past[indices, ...]

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        if self.lie_past is not None:
            self.lie_past = self.lie_past.repeat_interleave(repeats, 0)

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)  # type: ignore[misc]
        if self.lie_past is not None:
            stop = self.lie_past.size(2) - abs(tokens_to_remove)
            self.lie_past = self.lie_past[:, :, max(0, stop - self._num_keys()) : max(0, stop)]

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.lie_past = None

    def _pick(self, indices: Tensor) -> None:
        if self.lie_past is not None:
            self.lie_past = self.lie_past.index_select(0, indices.to(self.lie_past.device))

    def _num_keys(self) -> int:
        keys: Tensor | None = self.keys  # type: ignore[attr-defined]
        return 0 if keys is None or not keys.numel() else keys.size(-2)

    def iterates(self, flow: LieFlow, batch: int, past: int, like: Tensor) -> Tensor:
        """What was kept of the ``past`` tokens before the new ones, (B, H, P, kept_width)."""
        if past == 0:
            kept = (
                torch.float64 if like.dtype == torch.float64 else torch.float32
            )  # half precision would round each hop
            return like.new_empty(batch, flow.num_heads, 0, flow.kept_width, dtype=kept)
        found, windowed = self.lie_past, isinstance(self, DynamicSlidingWindowLayer)
        if found is None or found.size(2) < past or (found.size(2) > past and not windowed) or len(found) != batch:
            got = "none" if found is None else f"those of {found.size(2)} tokens and {len(found)} sequences"
            raise CacheError(
                f"cache: expected the iterates of its {past} tokens and {batch} sequences, got {got}; fill it by this converted model under "
                "torch.no_grad(), not while its time was 0, or pass use_cache=False"
            )
        if self.lie_settings != flow.settings:
            raise CacheError(
                f"cache: expected the settings it was filled with {self.lie_settings}, got {flow.settings}; fill a new one"
            )
        return found[:, :, found.size(2) - past :]

    def keep(self, flow: LieFlow, past: Tensor, new: Tensor) -> None:
        """Keep new iterates behind those before them, as many as there are keys."""
        known = past if self.lie_past is None or not past.size(2) else self.lie_past
        both = torch.cat([known.to(new.device), new], 2)
        self.lie_past = both[:, :, both.size(2) - self._num_keys() :]
        self.lie_settings = flow.settings


class KeptLayer(_Keeping, DynamicLayer):
    """``DynamicLayer`` with iterates."""


class KeptWindow(_Keeping, DynamicSlidingWindowLayer):
    """``DynamicSlidingWindowLayer`` with iterates, of the tokens in its window."""


_KEEPING: dict[type, Any] = {DynamicLayer: KeptLayer, DynamicSlidingWindowLayer: KeptWindow}


def _layer(cache: Cache, module: nn.Module) -> Any:
    own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    index = getattr(module, "layer_idx", None)
    return own, (own.layers[index] if isinstance(index, int) and index < len(own.layers) else None)


def forget(cache: Cache | None, module: nn.Module) -> None:
    """Nothing is kept of this call, so that a later one cannot go on from it."""
    layer = None if cache is None else _layer(cache, module)[1]
    if isinstance(layer, _Keeping):
        layer.lie_past = None


def cache_layer(cache: Cache, module: nn.Module) -> KeptLayer | KeptWindow:
    """The module's layer of a cache, from here on one that keeps iterates.

    Raises:
        CacheError: a cache that cannot keep them.
    """
    own, layer = _layer(cache, module)
    if type(layer) in _KEEPING and not own.offloading:
        plain, kind = layer, _KEEPING[type(layer)]
        layer = object.__new__(kind)
        vars(layer).update(vars(plain))
        own.layers[module.layer_idx] = layer
    if not isinstance(layer, KeptLayer | KeptWindow) or own.offloading:
        got = f"{type(own).__name__} of {type(layer).__name__}" + (" with offloading" if own.offloading else "")
        raise CacheError(
            f"cache: expected a DynamicCache, which can keep iterates, got {got}; use cache_implementation=None (dynamic), or "
            "use_cache=False"
        )
    return layer
