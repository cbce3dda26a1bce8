"""What ``GeneratorMonitor`` can log: name → function of one attention. A new one is one line."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from liegroup_attn.algebra import detailed_balance_residual, mixing_time, spectral_gap
from liegroup_attn.algebra.chains import one_closed_class
from liegroup_attn.errors import ConvergenceError, GeneratorError
from liegroup_attn.lightning.diagnosis import Look, look_at_layer
from liegroup_attn.metrics import (
    attention_entropy,
    distance_to_softmax,
    effective_rank,
    exit_rates,
    expected_hops,
    row_stochasticity_error,
    sink_mass,
    stationary_mass,
)
from liegroup_attn.nn import SelfAttention

__all__ = ["CHEAP", "NUMBERS", "chosen_numbers", "diagnose", "numbers_of"]

HEADS = 4  # of one sequence: what is computed matrix by matrix takes up to a third of a second for each of 128 tokens

Number = Callable[["Look"], Tensor | None]  # None: this attention has none


def of_mixing(function: Callable[[Tensor], Tensor]) -> Number:
    """Mean of a function of P, (B, H, N, N) → any shape."""
    return lambda look: function(look.mixing).mean()


def of_mixing_and_chain(function: Callable[[Tensor, Tensor], Tensor]) -> Number:
    """Mean of a function of P and S."""
    return lambda look: None if look.chain is None else function(look.mixing, look.chain.float()).mean()


def of_generator(function: Callable[[Tensor], Tensor]) -> Number:
    """Mean of a function of Q over the first ``HEADS`` heads of the first sequence for which it is defined, else NaN."""

    def number(look: Look) -> Tensor | None:
        if not look.flows:
            return None
        generator = look.flows["Q"]
        found = torch.full((1,), math.nan, dtype=torch.float64, device=generator.device)
        for heads in generator.reshape(-1, *generator.shape[-3:])[:, :HEADS]:  # (≤ HEADS, N, N)
            found = torch.stack([_or_nan(function, matrix) for matrix in heads])
            if bool(found.isfinite().any()):
                break
        return found.nanmean()

    return number


# Names behind "lie/<module>/". Cheap: O(N²) beside P itself, but for expected_hops, one exponential of N × N.
NUMBERS: dict[str, Number] = {
    "time": lambda look: None if look.time is None else look.time.mean(),
    "exit_rate": lambda look: _sum([exit_rates(q).mean() for q in look.flows.values()]),
    "expected_hops": lambda look: _hops(look),
    "entropy": of_mixing(attention_entropy),
    "row_error": lambda look: row_stochasticity_error(look.mixing).max(),
    "off_manifold": lambda look: look.outside,
    # of P, in float64, O(N³):
    "effective_rank": of_mixing(effective_rank),
    "sink_mass": of_mixing(sink_mass),
    "distance_to_softmax": of_mixing_and_chain(distance_to_softmax),
    # of Q, in float64, O(N³), matrix by matrix, of one sequence and few heads:
    "stationary_mass": of_generator(stationary_mass),
    "spectral_gap": of_generator(spectral_gap),
    "mixing_time": of_generator(mixing_time),
    "detailed_balance_residual": of_generator(detailed_balance_residual),
}
CHEAP = ("time", "exit_rate", "expected_hops", "entropy", "row_error")


def numbers_of(look: Look, names: Sequence[str] = CHEAP) -> dict[str, Tensor]:
    """Numbers of ``NUMBERS`` that an attention has, by name."""
    found = {name: NUMBERS[name](look) for name in names}
    return {name: value.float() for name, value in found.items() if value is not None}


def diagnose(layer: SelfAttention, x: Tensor, names: Sequence[str] = CHEAP) -> dict[str, float]:
    """The monitor's numbers for one layer and its input (B, N, C)."""
    return {name: float(value) for name, value in numbers_of(look_at_layer(layer, x), names).items()}


def chosen_numbers(metrics: str | Sequence[str] | None) -> tuple[str, ...]:
    """Names: None is the cheap ones, "all" all, else those given.

    Raises:
        ValueError: an unknown name.
    """
    if metrics is None:
        return CHEAP
    if metrics == "all":
        return tuple(NUMBERS)
    given = [metrics] if isinstance(metrics, str) else list(metrics)
    if unknown := [name for name in given if name not in NUMBERS]:
        raise ValueError(f'metrics: expected "all" or names of {list(NUMBERS)}, got {unknown}; choose among them')
    return tuple(given)


def _hops(look: Look) -> Tensor | None:
    """Mean number of moves along all flows, the first hop included."""
    if look.time is None:
        return None
    time, resolvents = look.time.squeeze(-1), None if look.flow is None else look.flow.clock.resolvents
    total = _sum([_moves(q, time, resolvents).mean() for q in look.flows.values()])
    return None if total is None else total + float(look.hops_first)


def _moves(generator: Tensor, time: Tensor, resolvents: int | None) -> Tensor:
    """Expected moves from every token, (…, H, N); of an Erlang clock those of its stages, one after the other."""
    if resolvents is None or resolvents == 1:
        return expected_hops(generator, time, exponential=resolvents == 1)
    stage = time.double() / resolvents
    of_one = expected_hops(generator.double(), stage, exponential=True)[..., None]  # (…, H, N, 1)
    eye = torch.eye(generator.size(-1), dtype=torch.float64, device=generator.device)
    onward = eye - generator.double() * stage[..., None, None]  # (…, H, N, N)
    total = moves = of_one
    for _ in range(resolvents - 1):
        moves = torch.linalg.solve(onward, moves)
        total = total + moves
    return total[..., 0].to(generator.dtype)


def _or_nan(function: Callable[[Tensor], Tensor], generator: Tensor) -> Tensor:
    """Of one (N, N), whose rows sum to 0 anew, as those from half precision do not; NaN for several closed classes."""
    rates = generator.double().clamp_min(0).fill_diagonal_(0)
    nothing = torch.full((), math.nan, dtype=torch.float64, device=generator.device)
    try:
        if not bool(one_closed_class(rates)):
            return nothing
        return function(rates - torch.diag(rates.sum(-1)))
    except (GeneratorError, ConvergenceError):  # NaN
        return nothing


def _sum(parts: list[Tensor]) -> Tensor | None:
    return torch.stack(parts).sum() if parts else None
