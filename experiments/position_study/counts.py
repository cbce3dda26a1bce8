"""What counting bytes is worth: a model that is no better has not learned its task."""

from __future__ import annotations

import torch
from torch import Tensor

from experiments.counts import BYTES, as_numbers, log_frequencies
from experiments.position_study.model import IGNORED, hidden_at
from liegroup_attn.lightning import ByteCorpus
from liegroup_attn.lightning.data.text import read_splits

__all__ = ["counted"]


def counted(data: ByteCorpus, is_causal: bool) -> dict[str, float]:
    """Nats per byte on the questions that the validation asks, by counts of the training text.

    Args:
        data: the text, set up.
        is_causal: whether the next byte is asked for; else those that the validation hides from an encoder.

    Returns:
        ``none``, by how often a byte occurs; ``left``, after the byte before; for an encoder also ``both``, between its two
        neighbours, which are taken as they are although they may be hidden from the model, too.
    """
    text = as_numbers(read_splits(data.source, data.path or data.folder)["train"])
    single, after = log_frequencies(text), log_frequencies(text[:-1], text[1:])
    around = None if is_causal else log_frequencies(text[:-2] * BYTES + text[2:], text[1:-1], BYTES**2)
    found: dict[str, list[Tensor]] = {}
    for index, batch in enumerate(data.val_dataloader()):
        tokens, targets = batch["tokens"], batch["targets"]
        if is_causal:
            parts = {"none": single[targets], "left": after[tokens, targets]}
        else:
            row, place = (hidden_at(tokens, index) != IGNORED).nonzero().T
            byte, last = tokens[row, place], tokens.size(1) - 1
            before, behind = tokens[row, (place - 1).clamp_min(0)], tokens[row, (place + 1).clamp_max(last)]
            left = torch.where(place > 0, after[before, byte], single[byte])
            assert around is not None
            inside = (place > 0) & (place < last)
            parts = {
                "none": single[byte],
                "left": left,
                "both": torch.where(inside, around[before * BYTES + behind, byte], left),
            }
        for name, logs in parts.items():
            found.setdefault(name, []).append(-logs.flatten())
    return {name: round(float(torch.cat(nats).mean()), 4) for name, nats in found.items()}
