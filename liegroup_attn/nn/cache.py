"""What attention layers keep of the tokens they have seen, so that new tokens cost one row of scores each."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from liegroup_attn.errors import CacheError

__all__ = ["AttentionCache", "TransformerCache"]


class AttentionCache:
    """Keys and what else one causal layer needs of earlier tokens; made by the layer's ``new_cache``.

    Softmax attention keeps values, Lie attention the iterates that tokens jump from: one vector a token with the
    exponential clock, as many as softmax; s with the Erlang clock; K with the fixed one.

    Args:
        layer: the attention that fills it.
        keys: (B, H_kv, T, E), room for T tokens.
        values: (B, H or H_kv, T, any width).
        settings: what the kept values depend on besides the tokens.
    """

    def __init__(
        self, layer: nn.Module | None, keys: Tensor, values: Tensor, settings: tuple[object, ...] = ()
    ) -> None:
        self._layer = (lambda: None) if layer is None else weakref.ref(layer)
        self.keys, self.values, self.settings = keys, values, settings
        self.length = 0

    def __copy__(self) -> AttentionCache:
        twin = AttentionCache(self._layer(), self.keys.clone(), self.values.clone(), self.settings)
        twin.length = self.length
        return twin

    @property
    def max_tokens(self) -> int:
        """T, how many tokens there is room for."""
        return self.keys.size(-2)

    @property
    def batch_size(self) -> int:
        """B."""
        return self.keys.size(0)

    def check(self, layer: nn.Module, keys: Tensor, settings: tuple[object, ...]) -> None:
        """Raise CacheError unless new keys (B, H_kv, N, E) of this layer fit behind those kept; nothing is written."""
        if self._layer() is not layer:
            raise CacheError(
                "cache: expected one made by this layer's new_cache, got another layer's; keep one a layer"
            )
        if keys.size(0) != self.batch_size:
            raise CacheError(
                f"cache: expected a batch of {self.batch_size}, got {keys.size(0)}; reorder(indices) changes the batch"
            )
        if keys.dtype != self.keys.dtype or keys.device != self.keys.device:
            raise CacheError(
                f"cache: expected {self.keys.dtype} on {self.keys.device}, got {keys.dtype} on {keys.device}; give "
                "new_cache the dtype and device of the layer's keys"
            )
        if self.length + keys.size(-2) > self.max_tokens:
            raise CacheError(
                f"cache: expected at most max_tokens={self.max_tokens} tokens, got {self.length} + {keys.size(-2)}; "
                "give new_cache more room, or crop"
            )
        if settings != self.settings:
            raise CacheError(
                f"cache: expected the settings it was made with {self.settings}, got {settings}; fill a new one after "
                "scale_time or a change of tol"
            )
        if torch.is_grad_enabled() and (keys.requires_grad or any(p.requires_grad for p in layer.parameters())):
            raise CacheError("cache: expected no gradient, got one; decode under torch.no_grad()")

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Keep new tokens, (B, H_kv, N, E) and (B, ·, N, ·)."""
        stop = self.length + keys.size(-2)
        self.keys[:, :, self.length : stop] = keys
        self.values[:, :, self.length : stop] = values
        self.length = stop

    def reorder(self, indices: Tensor | Sequence[int]) -> None:
        """Take these batch items in this order: beams that survive, or one prompt shared by several continuations.

        Args:
            indices: (any,), each in 0 … B − 1; B becomes their number.

        Raises:
            CacheError: an index outside the batch.
        """
        chosen = _indices(indices, self.batch_size).to(self.keys.device)
        self.keys, self.values = self.keys.index_select(0, chosen), self.values.index_select(0, chosen)

    def crop(self, length: int) -> None:
        """Forget all but the first ``length`` tokens.

        Raises:
            CacheError: negative, or more than are kept.
        """
        if not 0 <= length <= self.length:
            raise CacheError(
                f"length: expected 0 … {self.length}, got {length}; a cache can only forget its last tokens"
            )
        self.length = length


class TransformerCache:
    """The caches of a Transformer's layers; made by its ``new_cache``. Methods as in ``AttentionCache``.

    ``copy.copy`` gives one that shares nothing with it, as of an ``AttentionCache``.
    """

    def __init__(self, layers: list[AttentionCache]) -> None:
        self.layers = layers

    def __copy__(self) -> TransformerCache:
        return TransformerCache([copy.copy(layer) for layer in self.layers])

    def __iter__(self) -> Iterator[AttentionCache]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def length(self) -> int:
        """Tokens kept.

        Raises:
            CacheError: the layers keep different numbers of tokens.
        """
        lengths = {layer.length for layer in self.layers}
        if len(lengths) > 1:
            raise CacheError(
                f"cache: expected one length in all layers, got {sorted(lengths)}; crop them, or fill a new one"
            )
        return lengths.pop() if lengths else 0

    @property
    def max_tokens(self) -> int:
        """How many tokens there is room for."""
        return min((layer.max_tokens for layer in self.layers), default=0)

    def reorder(self, indices: Tensor | Sequence[int]) -> None:  # noqa: D102
        for layer in self.layers:
            layer.reorder(indices)

    def crop(self, length: int) -> None:  # noqa: D102
        for layer in self.layers:
            layer.crop(length)


def _indices(indices: Tensor | Sequence[int], batch: int) -> Tensor:
    chosen = torch.as_tensor(indices)
    if chosen.dim() != 1 or chosen.is_floating_point() or chosen.dtype == torch.bool:
        raise CacheError(f"indices: expected a list of integers, got {indices!r}; name batch items 0 … {batch - 1}")
    if chosen.numel() and not (int(chosen.min()) >= 0 and int(chosen.max()) < batch):
        raise CacheError(f"indices: expected 0 … {batch - 1}, got {chosen.tolist()}; name batch items that are kept")
    return chosen.long()
