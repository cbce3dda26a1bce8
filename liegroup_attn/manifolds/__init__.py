"""geoopt manifolds for what must stay where it is: times in their interval, generators in their cone, frames, rotations.

The only door to geoopt but the optimizer; what geoopt already has is named here, not rewritten.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from liegroup_attn.manifolds.every import *  # noqa: F403
else:  # a type checker would take it for every name

    def __getattr__(name: str) -> Any:
        # On first use: geoopt brings SciPy, which takes most of a second, and most layers have nothing on a manifold.
        return getattr(importlib.import_module(f"{__name__}.every"), name)


def __dir__() -> list[str]:
    return [*importlib.import_module(f"{__name__}.every").__all__]
