"""Made-up inputs for one forward of somebody else's model."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from liegroup_attn.errors import ConversionError

__all__ = ["dummy_inputs", "example"]

_TOKENS = 6


@contextmanager
def example(model: PreTrainedModel) -> Iterator[None]:
    """Eval mode, no gradient, and random states as before; training modes come back module by module."""
    modes = {module: module.training for module in model.modules()}
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            model.eval()
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def dummy_inputs(model: PreTrainedModel) -> dict[str, Any]:
    """Two short inputs, the second padded where the model takes a mask; made from the configuration.

    Raises:
        ConversionError: the model takes something else than tokens, images or spectrograms.
    """
    config: Any = model.config
    takes = inspect.signature(model.forward).parameters
    main = getattr(model, "main_input_name", "input_ids")
    if main == "input_ids":
        inputs: dict[str, Any] = {"input_ids": _tokens(model, _TOKENS)}
        if "attention_mask" in takes:
            inputs["attention_mask"] = torch.ones(2, _TOKENS, dtype=torch.long, device=model.device)
            inputs["attention_mask"][1, -2:] = 0
    elif main == "pixel_values":
        inputs = {"pixel_values": _numbers(model, 2, *_image_shape(config))}
    elif main == "input_features" and hasattr(config, "num_mel_bins"):
        frames = 2 * config.max_source_positions
        inputs = {"input_features": _numbers(model, 2, config.num_mel_bins, frames)}
    else:
        raise ConversionError(
            f"{type(model).__name__}: expected a model of input_ids, pixel_values or input_features, got one of {main}; give example_inputs"
        )
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in takes:
        inputs["decoder_input_ids"] = _tokens(model, _TOKENS - 1)
    if "use_cache" in takes:
        inputs["use_cache"] = False
    return inputs


def _tokens(model: PreTrainedModel, length: int) -> Tensor:
    vocab = model.config.get_text_config().vocab_size
    ids = 3 + torch.arange(2 * length, device=model.device).view(2, length) % max(1, vocab - 3)
    return ids.clamp(max=vocab - 1)


def _numbers(model: PreTrainedModel, *shape: int) -> Tensor:
    count = torch.Size(shape).numel()
    return torch.linspace(0, 20, count, device=model.device).sin().view(shape).to(model.dtype)


def _image_shape(config: Any) -> tuple[int, int, int]:
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    return getattr(vision, "num_channels", 3), height, width
