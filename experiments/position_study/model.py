"""A small Transformer on bytes: an encoder, which fills in masked bytes, or a decoder, which predicts the next."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liegroup_attn.lightning.modules import Trained

__all__ = ["IGNORED", "MASK", "PositionModel", "hidden_at", "mask_tokens"]

MASK = 256  # the token after the last byte
IGNORED = -100  # label of a position that is not asked for
SHARE = 0.15
_VALIDATION = 10**12  # far from every seed of training


def mask_tokens(tokens: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Hide 15 % of each window's positions, at least one: 80 % behind MASK, 10 % behind a random byte, 10 % as they are.

    Args:
        tokens: (B, N), bytes.
        generator: what is hidden is a function of it alone.

    Returns:
        inputs (B, N), and labels (B, N), IGNORED where nothing is asked.

    Source: [Devlin2019]_, section 3.1.
    """
    count = max(1, round(SHARE * tokens.size(1)))
    order = torch.rand(tokens.shape, generator=generator).argsort(-1)
    asked = torch.zeros_like(tokens, dtype=torch.bool).scatter(-1, order[:, :count], True)
    kind = torch.rand(tokens.shape, generator=generator)
    other = torch.randint(MASK, tokens.shape, generator=generator)
    hidden = torch.where(kind < 0.8, MASK, torch.where(kind < 0.9, other, tokens))
    return torch.where(asked, hidden, tokens), tokens.masked_fill(~asked, IGNORED)


def hidden_at(tokens: Tensor, batch_idx: int) -> Tensor:
    """Labels of a batch of the validation, where the same positions are hidden from every model."""
    return mask_tokens(tokens, torch.Generator().manual_seed(_VALIDATION + batch_idx))[1]


class PositionModel(Trained):
    """One Transformer for both; they differ in the mask of attention and in what is asked.

    Args:
        attention: recipe.
        encoding: recipe of the positions.
        is_causal: a decoder; else an encoder.
        width: C.
        depth: number of blocks.
        num_heads: H.
        seed: of what the encoder's training hides.
        weight_decay: 0, so that nothing but the loss shapes the table of positions.
        **options: those of ``Trained``.
    """

    def __init__(
        self,
        attention: dict[str, Any],
        encoding: dict[str, Any] | None,
        is_causal: bool,
        width: int = 64,
        depth: int = 2,
        num_heads: int = 2,
        seed: int = 0,
        weight_decay: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(encoding=encoding, weight_decay=weight_decay, **options)
        self.is_causal, self.seed = is_causal, seed
        self.embedding = nn.Embedding(MASK + 1, width)
        self.transformer = self.new_transformer(width, depth, num_heads, attention, is_causal=is_causal)
        self.head = nn.Linear(width, MASK, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores of bytes, (B, N) → (B, N, 256)."""
        return self.head(self.transformer(self.embedding(tokens)))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self._loss(batch, self.seed * 1_000_003 + batch_idx)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        loss = self._loss(batch, _VALIDATION + batch_idx)
        self.log("validation/loss", loss, batch_size=len(batch["tokens"]))

    def _loss(self, batch: dict[str, Tensor], seed: int) -> Tensor:
        inputs, labels = batch["tokens"], batch["targets"]
        if not self.is_causal:
            inputs, labels = mask_tokens(inputs, torch.Generator().manual_seed(seed))
        return F.cross_entropy(self(inputs).flatten(0, 1), labels.flatten(), ignore_index=IGNORED)

    @torch.no_grad()
    def states(self, tokens: Tensor) -> list[Tensor]:
        """What enters the first block and what leaves each, depth + 1 tensors (B, N, C)."""
        seen: list[Tensor] = []
        blocks = self.transformer.blocks
        hooks = [blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))]
        hooks += [block.register_forward_hook(lambda _, args, out: seen.append(out)) for block in blocks]
        try:
            self.eval()(tokens)
        finally:
            for hook in hooks:
                hook.remove()
        return seen

    def table(self, tokens: int) -> Tensor | None:
        """The vectors added at positions 0 … tokens − 1, (N, C); None where nothing is added."""
        absolute = self.transformer.absolute
        if absolute is None:
            return None
        with torch.no_grad():
            return absolute(torch.zeros(tokens, absolute.embed_dim))
