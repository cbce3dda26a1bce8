"""The table's models of x-transformers and LitGPT."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from experiments.drop_in.guest_cases import LIT_CASES, X_CASES, Case
from experiments.drop_in.subjects import NEW, Inputs, Subject, prompt, state_dict_reloaded, tokens

__all__ = ["of_litgpt", "of_x_transformers"]

X_NAMES = {
    "Decoder-plain": "Decoder",
    "Encoder-plain": "Encoder",
    "Decoder-grouped-flash-alibi": "Decoder, grouped heads, flash, ALiBi",
    "Encoder-clamped-residual": "Encoder, clamped scores, residual attention",
    "Decoder-window": "Decoder, sliding window",
}
LIT_NAMES = {
    "pythia": "GPT, as Pythia",
    "llama": "GPT, as Llama",
    "gemma": "GPT, as Gemma 2",
    "gemma-window": "GPT, as Gemma 2, sliding window",
}


def of_x_transformers() -> list[Subject]:
    """Wrappers of decoders and encoders."""
    return [_subject(case, X_NAMES[case.name], "x_transformers", _run_x, None) for case in _chosen(X_CASES, X_NAMES)]


def of_litgpt() -> list[Subject]:
    """Its GPT in several configurations."""
    # A window shorter than the text leaves nothing to go on from, so it is not decoded with a cache.
    return [
        _subject(case, LIT_NAMES[case.name], "litgpt", _run_lit, None if "window" in case.name else _generate_lit)
        for case in _chosen(LIT_CASES, LIT_NAMES)
    ]


def _chosen(cases: tuple[Case, ...], names: dict[str, str]) -> list[Case]:
    return [case for case in cases if case.name in names]


def _subject(
    case: Case,
    name: str,
    library: str,
    run: Callable[[Any, Inputs], Tensor],
    generate: Callable[[nn.Module, bool], tuple[Tensor, Tensor]] | None,
) -> Subject:
    def build() -> nn.Module:
        return case.model().eval()

    def inputs(changed: str = "", padded: bool = False) -> Inputs:
        given = tokens(changed, padded)
        return {**given, "ids": given["ids"] % 23}  # as many tokens as these models have

    reload = state_dict_reloaded(build, case.options)
    pads = library == "x_transformers"  # LitGPT has no padding mask
    return Subject(name, library, build, inputs, run, reload, case.causal, pads, generate, case.options)


def _run_x(model: Any, inputs: Inputs) -> Tensor:
    return model(inputs["ids"], mask=inputs["keep"])


def _run_lit(model: Any, inputs: Inputs) -> Tensor:
    return model(inputs["ids"])


def _generate_lit(model: Any, cached: bool) -> tuple[Tensor, Tensor]:
    """The most probable tokens, by LitGPT's cache or by all tokens anew; and their scores."""
    ids, start, scores = prompt() % 23, 0, []
    if cached:
        model.set_kv_cache(batch_size=len(ids), max_seq_length=ids.size(1) + NEW)
    for _ in range(NEW):
        logits = model(ids[:, start:], torch.arange(start, ids.size(1))) if cached else model(ids)
        scores.append(logits[:, -1])
        start = ids.size(1) if cached else 0
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    model.clear_kv_cache()
    return ids, torch.stack(scores, 1)
