"""The table's models of Hugging Face Transformers."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch import Tensor, nn

from experiments.drop_in.hf_cases import CASES, Case
from experiments.drop_in.subjects import NEW, TOKENS, Inputs, Subject, prompt, tokens

__all__ = ["of_transformers"]

NAMES = {"mistral window": ", sliding window"}  # behind a class that has two rows


def of_transformers() -> list[Subject]:
    """One family a row."""
    return [_subject(case) for case in CASES]


def _subject(case: Case) -> Subject:
    image, crossing = case.kind == "image", case.kind in ("seq2seq", "speech")

    def inputs(changed: str = "", padded: bool = False) -> Inputs:
        found = tokens(changed, padded)
        if image:
            return {"pixel_values": case.inputs()["pixel_values"]}
        ids, keep = found["ids"], found["keep"]
        mask = {} if keep is None else {"attention_mask": keep.long()}
        if not crossing:
            return {"input_ids": ids, **mask}
        read = case.inputs(tokens=TOKENS)
        given = {k: v for k, v in read.items() if k in ("input_ids", "input_features")}
        return {**given, "decoder_input_ids": ids, **({} if keep is None else {"decoder_attention_mask": keep.long()})}

    def run(model: Any, given: Inputs) -> Tensor:
        return model(**given).logits

    return Subject(
        case.model + NAMES.get(case.name, ""),
        "transformers",
        case.build,
        inputs,
        run,
        _reloaded,
        causal=case.kind != "masked" and not image,
        pads=not image,
        generate=None if case.kind in ("masked", "image") else lambda m, cached: _generate(m, case, cached),
        options=case.options,
    )


def _reloaded(model: Any) -> nn.Module:
    """By way of ``save_pretrained`` and ``from_pretrained``."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return type(model).from_pretrained(folder).eval()


def _generate(model: Any, case: Case, cached: bool) -> tuple[Tensor, Tensor]:
    """Three beams, the second prompt padded on the left; with the scores of every step."""
    options: dict[str, Any] = {"max_new_tokens": NEW, "num_beams": 3, "do_sample": False, "use_cache": cached}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    if case.kind == "speech":
        found = model.generate(case.inputs()["input_features"], **options)
    else:
        read = prompt()
        mask = torch.ones_like(read)
        mask[1, :2] = 0
        found = model.generate(read, attention_mask=mask, **options)
    return found.sequences, torch.stack(found.logits, 1)
