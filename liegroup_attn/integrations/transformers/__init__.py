"""Hugging Face Transformers: the attention implementation "lie", exact ``generate`` and checkpoints that come back.

``nn.convert_attention`` imports this for models of Transformers, and so does the unpickling of a converted one. Importing it
calls ``register()``: do so before ``from_pretrained`` reads a converted model. It needs ``pip install "liegroup-attn[transformers]"``.
"""

try:
    import transformers as _transformers  # noqa: F401
except ImportError as error:
    raise ImportError(
        'liegroup_attn.integrations.transformers: expected Hugging Face Transformers, got none; pip install "liegroup-attn[transformers]"'
    ) from error

from liegroup_attn.integrations.transformers.attention import lie_attention_forward

# What ``nn.convert_attention`` asks for; not for users.
from liegroup_attn.integrations.transformers.convert import (  # noqa: F401
    DROP_INS,
    WHOLE_MODELS,
    convert_model,
    restore_model,
)
from liegroup_attn.integrations.transformers.loading import register
from liegroup_attn.integrations.transformers.masks import lie_mask

__all__ = ["lie_attention_forward", "lie_mask", "register"]

register()  # a converted model that was pickled imports this by its hooks, and calls nothing else
