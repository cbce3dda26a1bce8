"""Generators from files: the rate files of PAML, and a matrix as text."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import torch
from torch import Tensor

from liegroup_attn.algebra import is_rate_matrix
from liegroup_attn.errors import GeneratorError, ShapeError

__all__ = ["generator_from", "read_generator", "read_paml"]

_ROUNDING = 1e-4  # frequencies are printed with six digits or so; a sum that is off by more gets a warning
_WRONG = 1e-2


def read_generator(path: str | Path) -> Tensor:
    """Q from a text file: either n lines of n numbers, Q itself, or a rate file of PAML (``read_paml``).

    Args:
        path: the file. Lines that begin with ``#`` are skipped. A matrix is taken as it is, not normalized; a rate file
            of PAML gives Q with mean exit rate 1.

    Returns:
        (n, n), float64.

    Raises:
        FileNotFoundError: there is no such file.
        ShapeError: a wrong number of entries.
        GeneratorError: entries that make no generator.

    Example:
        >>> file = getfixture("tmp_path") / "two_states.txt"
        >>> _ = file.write_text("-1 1\\n3 -3\\n")
        >>> read_generator(file)
        tensor([[-1.,  1.],
                [ 3., -3.]], dtype=torch.float64)

    Source: Yang 2007, doi:10.1093/molbev/msm088 (the format of rate files).
    """
    lines, _ = _numbers(path)
    n = len(lines)
    if n < 2 or any(len(line) != n for line in lines):
        return generator_from(*read_paml(path))
    matrix = torch.tensor(lines, dtype=torch.float64)
    off = matrix - torch.diag(matrix.diagonal())
    exits, total = off.sum(-1), matrix.sum(-1).abs().max()
    ok, reason = is_rate_matrix(matrix, atol=_ROUNDING * max(float(exits.max()), 1e-300))
    if not ok or float(off.min()) < 0:
        raise GeneratorError(
            f"{path}: expected a rate matrix, got one of which {reason or 'an off-diagonal entry is negative'}; "
            "off-diagonals are rates ≥ 0, rows sum to 0"
        )
    return matrix if float(total) == 0 else off - torch.diag(exits)  # the rounding of a printed diagonal


def read_paml(path: str | Path) -> tuple[Tensor, Tensor]:
    """Exchangeabilities and frequencies from a rate file of PAML.

    The file has the lower triangle of the symmetric exchangeabilities row by row, n(n − 1)/2 numbers, then n
    frequencies, then any text that begins with a word. White space is free and n, here any number from 2 on, follows
    from the count of numbers; amino acids have n = 20, in the order A R N D C Q E G H I L K M F P S T W Y V.

    Args:
        path: the file. Lines that begin with ``#`` are skipped.

    Returns:
        s (n, n), symmetric with zero diagonal, and π (n,), float64. π is divided by its sum: silently when that is
        within 1e-4 of 1, with a warning within 1e-2.

    Raises:
        FileNotFoundError: there is no such file.
        ShapeError: the count of numbers is not n(n + 1)/2.
        GeneratorError: a negative or non-finite number, a frequency of 0, frequencies that do not sum to 1.

    Example:
        >>> file = getfixture("tmp_path") / "three_states.dat"
        >>> _ = file.write_text("1\\n2 4\\n0.5 0.25 0.25\\nthe rest is text")
        >>> exchangeabilities, frequencies = read_paml(file)
        >>> exchangeabilities
        tensor([[0., 1., 2.],
                [1., 0., 4.],
                [2., 4., 0.]], dtype=torch.float64)
        >>> frequencies
        tensor([0.5000, 0.2500, 0.2500], dtype=torch.float64)

    Source: Yang 2007, doi:10.1093/molbev/msm088.
    """
    lines, stop = _numbers(path)
    numbers = torch.tensor([number for line in lines for number in line], dtype=torch.float64)
    n = math.isqrt(2 * len(numbers))
    if n < 2 or n * (n + 1) // 2 != len(numbers):
        raise ShapeError(
            f"{path}: expected n(n − 1)/2 exchangeabilities and n frequencies (1 + 2 for n = 2, 190 + 20 for n = 20), "
            f"got {len(numbers)} numbers before {stop}; complete the file"
        )
    if not bool(torch.isfinite(numbers).all()) or float(numbers.min()) < 0:
        raise GeneratorError(
            f"{path}: expected finite numbers ≥ 0, got {float(numbers.min()):g}; exchangeabilities and frequencies are "
            "not negative"
        )
    triangle, frequencies = numbers[:-n], numbers[-n:]
    off = abs(float(frequencies.sum()) - 1)
    if off > _WRONG or float(frequencies.min()) == 0:
        raise GeneratorError(
            f"{path}: expected {n} positive frequencies that sum to 1 within {_WRONG:g}, got the sum "
            f"{float(frequencies.sum()):g} and the least {float(frequencies.min()):g}; check that no number is missing"
        )
    if off > _ROUNDING:
        warnings.warn(f"{path}: frequencies sum to {float(frequencies.sum()):g}; they are divided by it", stacklevel=2)
    rows, columns = torch.tril_indices(n, n, -1)
    exchangeabilities = torch.zeros(n, n, dtype=torch.float64)
    exchangeabilities[rows, columns] = exchangeabilities[columns, rows] = triangle
    return exchangeabilities, frequencies / frequencies.sum()


def generator_from(exchangeabilities: Tensor, frequencies: Tensor, normalize: bool = True) -> Tensor:
    """The reversible generator Q_ij = s_ij π_j, i ≠ j, of which π is the stationary distribution.

    Args:
        exchangeabilities: s (n, n), symmetric, ≥ 0; the diagonal is ignored.
        frequencies: π (n,), > 0, summing to 1.
        normalize: scale Q to the mean exit rate Σ π_i(−Q_ii) = 1, so that t counts expected jumps.

    Returns:
        Q (n, n), dtype of the arguments.

    Raises:
        ShapeError: sizes that do not fit.
        GeneratorError: s not symmetric or negative, π not a distribution, no transition at all.

    Example:
        >>> generator_from(torch.ones(2, 2), torch.tensor([0.5, 0.5]))
        tensor([[-1.,  1.],
                [ 1., -1.]])

    Source: Yang 2007, doi:10.1093/molbev/msm088; Norris 1997, *Markov Chains*, section 3.7 (detailed balance).
    """
    s, pi = exchangeabilities, frequencies
    n = pi.size(0) if pi.dim() == 1 else 0
    if n == 0 or s.shape != (n, n):
        raise ShapeError(
            f"exchangeabilities, frequencies: expected (n, n) and (n,), got {tuple(s.shape)} and {tuple(pi.shape)}; "
            "give one frequency per state"
        )
    off = s - torch.diag(s.diagonal())
    if not torch.equal(off, off.mT) or not float(off.min()) >= 0:
        raise GeneratorError(
            "exchangeabilities: expected a symmetric matrix of numbers ≥ 0, got another; fill both triangles"
        )
    if not float(pi.min()) > 0 or not abs(float(pi.sum()) - 1) <= _ROUNDING:
        raise GeneratorError(
            f"frequencies: expected positive numbers that sum to 1, got the least {float(pi.min()):g} and the sum "
            f"{float(pi.sum()):g}; divide by the sum"
        )
    rates = off * pi
    exits = rates.sum(-1)
    mean = float(pi @ exits)
    if normalize and mean == 0:
        raise GeneratorError("exchangeabilities: expected some transition, got 0 everywhere; pass normalize=False")
    generator = rates - torch.diag(exits)
    return generator / mean if normalize else generator


def _numbers(path: str | Path) -> tuple[list[list[float]], str]:
    """The numbers a file begins with, by line, and what stands behind them."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"path: expected a file of rates, got {str(path)!r}, which is none; correct the path")
    lines: list[list[float]] = []
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        found: list[float] = []
        for word in [] if line.lstrip().startswith("#") else line.split():
            try:
                found.append(float(word))
            except ValueError:
                return [*lines, found] if found else lines, f"{word!r} in line {number}"
        if found:
            lines.append(found)
    return lines, "the end"
