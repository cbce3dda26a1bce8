"""Length scaling: RoPE's frequencies changed for sequences longer than those trained on."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from liegroup_attn.errors import ShapeError

__all__ = ["DynamicNTK", "FrequencyScaling", "LinearScaling", "Llama3Scaling", "LongRoPE", "YaRN"]


class FrequencyScaling(ABC):
    """The contract: frequencies in, frequencies and a factor of cosines and sines out; no state."""

    fixed = True  # whether all calls have the same frequencies, however long

    @abstractmethod
    def frequencies(self, frequencies: Tensor, base: float, longest: Tensor) -> tuple[Tensor, float]:
        """Scaled frequencies.

        Args:
            frequencies: θ, (r/2,).
            base: θ_i = base^(−2i/r).
            longest: largest position of each sequence of this call, (..., 1, 1).

        Returns:
            Broadcastable to (..., 1, r/2), and what multiplies cosines and sines (scores by its square).
        """


@dataclass(frozen=True)
class LinearScaling(FrequencyScaling):
    """Position interpolation: θ/s.

    Args:
        factor: s ≥ 1.

    Example:
        >>> LinearScaling(4.0).frequencies(torch.tensor([1.0, 0.5]), 4.0, torch.zeros(1, 1))
        (tensor([0.2500, 0.1250]), 1.0)

    Source: [Chen2023]_.
    """

    factor: float

    def __post_init__(self) -> None:
        _at_least_1(factor=self.factor)

    def frequencies(self, frequencies: Tensor, base: float, longest: Tensor) -> tuple[Tensor, float]:  # noqa: D102
        return frequencies / self.factor, 1.0


@dataclass(frozen=True)
class DynamicNTK(FrequencyScaling):
    """The base grows by (s·n/L − s + 1)^(r/(r−2)) once a sequence's length n exceeds L.

    n is the largest position of this call plus one, for each sequence; nothing is kept. While decoding with a cache,
    keys stay turned by the frequencies of the call that wrote them, so results differ from reading all at once.

    Args:
        factor: s ≥ 1.
        original_length: L, trained on.

    Example:
        >>> scaling = DynamicNTK(2.0, original_length=8)  # at 16 tokens: 2·16/8 − 1 = 3
        >>> scaling.frequencies(torch.tensor([1.0, 0.1, 0.01]), 1000.0, torch.tensor([[15.0]]))[0]
        tensor([[1.0000, 0.0577, 0.0033]])

    Source: [Peng2024]_.
    """

    factor: float
    original_length: int
    fixed = False

    def __post_init__(self) -> None:
        _at_least_1(factor=self.factor, original_length=self.original_length)

    def frequencies(self, frequencies: Tensor, base: float, longest: Tensor) -> tuple[Tensor, float]:  # noqa: D102
        pairs = frequencies.size(-1)
        if pairs == 1:
            return frequencies, 1.0  # θ_0 = 1 whatever the base
        ratio = (longest + 1).clamp(min=self.original_length) / self.original_length
        growth = self.factor * ratio - (self.factor - 1)
        index = torch.arange(pairs, device=frequencies.device, dtype=frequencies.dtype)
        return frequencies * growth ** (-index / (pairs - 1)), 1.0


@dataclass(frozen=True)
class YaRN(FrequencyScaling):
    """Slow pairs are interpolated, fast ones left, with a ramp between.

    The ramp is linear in the pair's index, as in the published code and in checkpoints; the paper's formula has it linear
    in turns, which is ``Llama3Scaling(factor, beta_slow, beta_fast, original_length)``.

    Args:
        factor: s ≥ 1.
        original_length: L, trained on.
        beta_fast: pairs with more turns within L are left.
        beta_slow: pairs with fewer are interpolated.
        attention_factor: multiplies cosines and sines; default √(1/t) = 0.1 ln s + 1.
        truncate: round the ramp's ends outwards to whole pairs, as the published code does.

    Raises:
        ValueError: numbers out of range, or so short an L that no pair turns ``beta_slow`` times.

    Example:
        >>> scaled, factor = YaRN(4.0, 2048).frequencies(torch.tensor([1.0, 0.01]), 10_000.0, torch.zeros(1, 1))
        >>> round(factor, 4)
        1.1386

    Source: [Peng2024]_.
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        _at_least_1(factor=self.factor, original_length=self.original_length)
        if not 0 < self.beta_slow < self.beta_fast:
            raise ValueError(f"beta_slow: expected 0 < beta_slow < {self.beta_fast}, got {self.beta_slow}; swap them")
        least = 2 * math.pi * self.beta_slow
        if self.original_length <= least:
            raise ValueError(
                f"original_length: expected more than 2π·beta_slow = {least:g}, got {self.original_length}; all pairs are "
                "slow, take LinearScaling"
            )
        _positive(attention_factor=self.attention_factor)

    def frequencies(self, frequencies: Tensor, base: float, longest: Tensor) -> tuple[Tensor, float]:  # noqa: D102
        if not base > 1:
            raise ValueError(f"base: expected a number > 1 for YaRN, got {base}; later pairs must be slower")
        width = 2 * frequencies.size(-1)
        low, high = (
            width * math.log(self.original_length / (2 * math.pi * turns)) / (2 * math.log(base))
            for turns in (self.beta_fast, self.beta_slow)
        )
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low = max(low, 0)
        high = max(min(high, width - 1), low + 1e-3)  # where every pair is fast, low is beyond the last
        index = torch.arange(width // 2, device=frequencies.device, dtype=frequencies.dtype)
        ramp = ((index - low) / (high - low)).clamp(0, 1)
        factor = 0.1 * math.log(self.factor) + 1 if self.attention_factor is None else self.attention_factor
        return frequencies * (1 - ramp + ramp / self.factor), factor


@dataclass(frozen=True)
class LongRoPE(FrequencyScaling):
    """Searched divisors of each frequency: one list up to the original length, one beyond.

    The paper also leaves the first tokens of a sequence as they were; released checkpoints do not, nor does this.

    Args:
        short_factor: r/2 divisors for sequences up to L.
        long_factor: r/2 divisors for longer ones.
        original_length: L ≥ 2, trained on.
        factor: s ≥ 1, of the length.
        attention_factor: multiplies cosines and sines; default √(1 + ln s/ln L).

    Raises:
        ValueError: numbers out of range.
        ShapeError: lists of another length than r/2, once that is known.

    Example:
        >>> longrope = LongRoPE([1.0, 1.0], [1.0, 4.0], original_length=16, factor=4.0)
        >>> longrope.frequencies(torch.tensor([1.0, 0.1]), 100.0, torch.tensor([[16.0]]))
        (tensor([[1.0000, 0.0250]]), 1.224744871391589)

    Source: [Ding2024]_.
    """

    short_factor: Sequence[float]
    long_factor: Sequence[float]
    original_length: int
    factor: float = 1.0
    attention_factor: float | None = None
    fixed = False

    def __post_init__(self) -> None:
        _at_least_1(factor=self.factor)
        if not self.original_length >= 2:
            raise ValueError(f"original_length: expected a number ≥ 2, got {self.original_length}; ln L divides")
        _positive(attention_factor=self.attention_factor)
        for name in ("short_factor", "long_factor"):
            divisors = tuple(getattr(self, name))
            _positive(**{f"{name}[{i}]": divisor for i, divisor in enumerate(divisors)})
            object.__setattr__(self, name, divisors)

    def frequencies(self, frequencies: Tensor, base: float, longest: Tensor) -> tuple[Tensor, float]:  # noqa: D102
        for name, listed in (("short_factor", self.short_factor), ("long_factor", self.long_factor)):
            if len(listed) != frequencies.size(-1):
                raise ShapeError(f"{name}: expected {frequencies.size(-1)} numbers, got {len(listed)}; one per pair")
        short, long = (frequencies / frequencies.new_tensor(f) for f in (self.short_factor, self.long_factor))
        factor = self.attention_factor
        if factor is None:
            factor = math.sqrt(1 + math.log(self.factor) / math.log(self.original_length))
        return torch.where(longest + 1 > self.original_length, long, short), factor


@dataclass(frozen=True)
class Llama3Scaling(FrequencyScaling):
    """Wavelengths beyond L/low are interpolated, below L/high left, with a smooth passage between.

    Args:
        factor: s ≥ 1.
        low_frequency_factor: low.
        high_frequency_factor: high > low.
        original_length: L, trained on.

    Example:
        >>> llama = Llama3Scaling(8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_length=8192)
        >>> llama.frequencies(torch.tensor([1.0, 1e-4]), 1e8, torch.zeros(1, 1))[0]
        tensor([1.0000e+00, 1.2500e-05])

    Source: [Grattafiori2024]_.
    """

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_length: int

    def __post_init__(self) -> None:
        _at_least_1(factor=self.factor, original_length=self.original_length)
        if not 0 < self.low_frequency_factor < self.high_frequency_factor:
            raise ValueError(
                f"low_frequency_factor: expected 0 < low < high = {self.high_frequency_factor}, "
                f"got {self.low_frequency_factor}; swap them"
            )

    def frequencies(self, frequencies: Tensor, base: float, longest: Tensor) -> tuple[Tensor, float]:  # noqa: D102
        turns = self.original_length * frequencies / (2 * math.pi)
        low, high = self.low_frequency_factor, self.high_frequency_factor
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return frequencies * (kept + (1 - kept) / self.factor), 1.0


def _at_least_1(**numbers: float) -> None:
    for name, number in numbers.items():
        if not 1 <= number < math.inf:
            raise ValueError(f"{name}: expected a number ≥ 1, got {number}; scaling lengthens")


def _positive(**numbers: float | None) -> None:
    for name, number in numbers.items():
        if number is not None and not 0 < number < math.inf:
            raise ValueError(f"{name}: expected a number > 0, got {number}; it multiplies or divides")
