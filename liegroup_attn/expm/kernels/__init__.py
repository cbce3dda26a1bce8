"""Optional Triton kernels; importing this folder does not import Triton, ``kernels.jumps`` does."""

from __future__ import annotations

__all__ = ["kernels_available"]


def kernels_available() -> tuple[bool, str | None]:
    """Whether ``liegroup_attn.expm.kernels.jumps`` can be imported, and if not, why.

    Returns:
        (True, None), or (False, reason).
    """
    try:
        from liegroup_attn.expm.kernels import jumps  # noqa: F401
    except ImportError as error:
        return False, f"Triton cannot be imported ({error}); do pip install triton"
    return True, None
