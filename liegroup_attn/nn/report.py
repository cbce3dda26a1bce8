"""What a conversion found and did."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["ConversionReport", "ConvertedLayer"]


@dataclass(frozen=True)
class ConvertedLayer:
    """What became of one attention module.

    Args:
        name: its path in the model.
        kind: name of its class before.
        outcome: "converted", "already converted", "restored" or "kept".
        reason: why it was kept as it is.
    """

    name: str
    kind: str
    outcome: str
    reason: str = ""


@dataclass(frozen=True)
class ConversionReport:
    """What ``convert_attention`` found and did; prints as a table.

    Args:
        layers: one entry an attention module, in the model's order.
    """

    layers: tuple[ConvertedLayer, ...] = field(default=())

    @property
    def converted(self) -> list[str]:
        """Paths of the modules that this call converted (or restored)."""
        return [layer.name for layer in self.layers if layer.outcome in ("converted", "restored")]

    @property
    def kept(self) -> dict[str, str]:
        """Path → reason, of the modules that stay softmax attention."""
        return {layer.name: layer.reason for layer in self.layers if layer.outcome == "kept"}

    def __str__(self) -> str:
        rows = [("module", "class", "outcome", "why")]
        rows += [(layer.name or "(the model)", layer.kind, layer.outcome, layer.reason) for layer in self.layers]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = [
            "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]]).rstrip() for row in rows
        ]
        return "\n".join([lines[0], "─" * max(map(len, lines)), *lines[1:]])
