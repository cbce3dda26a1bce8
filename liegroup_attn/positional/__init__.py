"""How a position acts on queries and keys."""

from liegroup_attn.positional.rotary import RotaryEncoding

__all__ = ["RotaryEncoding"]
