"""What the command line prints of a model and of its numbers, within 100 columns."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.callbacks import ModelSummary, RichModelSummary
from lightning.pytorch.utilities.rank_zero import rank_zero_only

__all__ = ["Summary", "listing", "say"]

_COLUMNS = 100


class Summary(ModelSummary):
    """Lightning's table of a model's parts; with FLOPs only where there is an ``example_input_array`` to count them on."""

    @staticmethod
    def summarize(
        summary_data: list[tuple[str, list[str]]],
        total_parameters: int,
        trainable_parameters: int,
        model_size: float,
        total_training_modes: dict[str, int],
        total_flops: int,
        **options: Any,
    ) -> None:
        if total_flops:
            RichModelSummary.summarize(
                summary_data,
                total_parameters,
                trainable_parameters,
                model_size,
                total_training_modes,
                total_flops,
                **options,
            )
            return
        from rich import get_console
        from rich.table import Table

        columns = {name.strip(): values for name, values in summary_data if name != "FLOPs"}
        table = Table(*columns)
        for row in zip(*columns.values(), strict=True):
            table.add_row(*row)
        get_console().print(table, width=min(get_console().width, _COLUMNS))
        fixed = total_parameters - trainable_parameters
        print(f"{trainable_parameters:,} parameters that learn, {fixed:,} that do not; {model_size:.3g} MB")


def listing(metrics: Mapping[str, Any]) -> str:
    """Numbers by name, a line each; those whose names end in a number, as ``accuracy_at_depth_07``, share one.

    Args:
        metrics: name → number.

    Returns:
        Lines of at most 100 columns.

    Example:
        >>> print(listing({"test/loss": 1.5, "test/at_0": 0.25, "test/at_1": 0.5}))
        test/at_0 … 1  0.25 0.5
        test/loss      1.5
    """
    groups: dict[str, list[tuple[str, str]]] = {}
    for name in sorted(metrics):
        ends = re.fullmatch(r"(.*_)(\d+)", name)
        # What tells data loaders apart is no row of numbers.
        stem = ends[1] if ends and not name.endswith(f"dataloader_idx_{ends[2]}") else name
        groups.setdefault(stem, []).append((name, f"{float(metrics[name]):.4g}"))
    shown = {
        names[0] if len(names) == 1 else f"{names[0]} … {names[-1].removeprefix(stem)}": " ".join(values)
        for stem, group in groups.items()
        for names, values in [tuple(zip(*group, strict=True))]
    }
    left = max(map(len, shown), default=0) + 2
    return "\n".join(
        line
        for name, values in shown.items()
        for line in textwrap.wrap(values, _COLUMNS, initial_indent=name.ljust(left), subsequent_indent=" " * left)
    )


@rank_zero_only
def say(metrics: Mapping[str, Any]) -> None:
    """Print the listing, once for all processes."""
    print(listing(metrics))
