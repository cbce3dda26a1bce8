"""Transition counts of a chain that is seen at some times only: simulated from a generator, or from a file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from experiments.rate_recovery.paml import read_generator
from experiments.rate_recovery.published import PUBLISHED, download_generator
from liegroup_attn.algebra import stationary_distribution
from liegroup_attn.errors import GeneratorError, ShapeError
from liegroup_attn.functional import transition_matrix
from liegroup_attn.generators import DenseGenerator
from liegroup_attn.lightning.data.loader import ResumableLoader

__all__ = ["TransitionCounts", "read_counts", "simulate_counts"]


class TransitionCounts(L.LightningDataModule):
    """How often a chain went from i to j within time t; every batch is all of the data.

    A batch is ``{"counts": (T, n, n), "times": (T,)}``, float64. The pairs (state, state after t) are independent, the
    first state is drawn from the stationary distribution: then the counts are multinomial with probabilities
    π_i P_ij(t), and are drawn as such.

    Args:
        path: Q to simulate: ``"lg"`` or ``"wag"``, two published generators of amino acids, downloaded; or a file that
            ``read_generator`` reads.
        counts: file of observed counts for ``read_counts``, used instead of a simulation; ``path`` is then ignored.
        times: T times > 0, in units in which Q has mean exit rate 1.
        transitions: number of pairs in all, divided evenly among the times.
        seed: of the simulation, ≥ 0.
        steps: steps a training epoch, ≥ 1; each sees all counts.
        cache_dir: folder for downloads, default ``~/.cache/liegroup_attn`` (below ``XDG_CACHE_HOME`` if set).

    Raises:
        ValueError: times, transitions, seed or steps out of range, or a wrong file.
        FileNotFoundError: there is no such file.
        ConnectionError: the download failed.

    Example:
        >>> file = getfixture("tmp_path") / "two_states.txt"
        >>> _ = file.write_text("-1 1\\n3 -3\\n")
        >>> data = TransitionCounts(str(file), times=[0.5, 1.0], transitions=100)
        >>> data.setup()
        >>> batch = next(iter(data.train_dataloader()))
        >>> batch["counts"].shape, batch["counts"].sum((1, 2))
        (torch.Size([2, 2, 2]), tensor([50., 50.], dtype=torch.float64))

    Source: Kalbfleisch and Lawless 1985, doi:10.1080/01621459.1985.10478195.
    """

    def __init__(
        self,
        path: str = "lg",
        counts: str | None = None,
        times: Sequence[float] = (0.1, 0.3, 1.0),
        transitions: int = 100_000,
        seed: int = 0,
        steps: int = 1000,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        # Paths and tuples would keep the checkpoint from loading with weights_only=True.
        path, counts, cache_dir = str(path), counts and str(counts), cache_dir and str(cache_dir)
        times = [float(time) for time in times]
        for name, number, least in (("transitions", transitions, 1), ("seed", seed, 0), ("steps", steps, 1)):
            if number < least:
                raise ValueError(f"{name}: expected at least {least}, got {number}; raise it")
        check_times(times)
        self.save_hyperparameters(logger=False)
        self.path, self.counts_file, self.times, self.steps = path, counts, times, steps
        self.transitions, self.seed = transitions, seed
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "liegroup_attn"
        self.folder = Path(cache_dir or cache).expanduser() / "generators"  # where downloads lie
        self.generator: Tensor | None = None  # the truth, if it is known
        self.counts: Tensor | None = None

    def prepare_data(self) -> None:
        """Download the generator if it is public and not here yet."""
        if self.counts_file is None and self.path in PUBLISHED:
            download_generator(self.path, self.folder)

    def setup(self, stage: str | None = None) -> None:
        """Read or simulate the counts, once."""
        if self.counts is not None:
            return
        if self.counts_file is not None:
            self.counts, self.times = read_counts(self.counts_file, self.times)
            return
        public = self.path in PUBLISHED
        self.generator = read_generator(download_generator(self.path, self.folder) if public else self.path)
        self.counts = simulate_counts(self.generator, self.times, self.transitions, self.seed)

    def batch(self) -> dict[str, Tensor]:
        """All of the data."""
        self.setup()
        return {"counts": self.counts, "times": torch.tensor(self.times, dtype=torch.float64)}  # type: ignore[dict-item]

    def train_dataloader(self) -> ResumableLoader:
        """The same batch ``steps`` times."""
        return ResumableLoader([self.batch()] * self.steps, batch_size=None)  # type: ignore[arg-type]

    def test_dataloader(self) -> DataLoader:
        """The batch once, and the generator it was simulated from."""
        truth = {} if self.generator is None else {"generator": self.generator}
        return DataLoader([self.batch() | truth], batch_size=None, generator=torch.Generator())  # type: ignore[arg-type]

    def predict_dataloader(self) -> DataLoader:
        """What the tests see."""
        return self.test_dataloader()


def simulate_counts(generator: Tensor, times: Sequence[float], transitions: int, seed: int) -> Tensor:
    """Multinomial counts of transitions from the stationary start; a pure function of its arguments.

    Args:
        generator: Q (n, n), irreducible, float64.
        times: T times > 0.
        transitions: in all; divided evenly, the first times take what is left over.
        seed: ≥ 0.

    Returns:
        (T, n, n), float64, whole numbers.

    Raises:
        GeneratorError: not a rate matrix, not irreducible, or a time not > 0.

    Example:
        >>> simulate_counts(torch.tensor([[-1.0, 1.0], [1.0, -1.0]]), [1.0], 10, seed=0).sum()
        tensor(10., dtype=torch.float64)
    """
    check_times(times)
    generator = generator.double()
    pi = stationary_distribution(generator)
    if not float(pi.min()) > 0:
        raise GeneratorError(
            f"generator: expected a chain that comes back to every state, got one that leaves state {int(pi.argmin())} for "
            "good; drop such states, they are never seen at rest"
        )
    when = torch.tensor([float(time) for time in times], dtype=torch.float64)
    joint = pi[:, None] * transition_matrix(DenseGenerator(generator), when[:, None])  # (T, n, n)
    draw = np.random.default_rng(seed)
    sizes = [transitions // len(when) + (k < transitions % len(when)) for k in range(len(when))]
    counts = [draw.multinomial(size, p / p.sum()) for size, p in zip(sizes, joint.flatten(1).numpy(), strict=True)]
    return torch.from_numpy(np.stack(counts)).double().view_as(joint)


def read_counts(path: str | Path, times: Sequence[float]) -> tuple[Tensor, list[float]]:
    """Counts from a file: ``.npz`` with ``counts`` and, if it likes, ``times``; or text, one n×n block after the other.

    Args:
        path: the file.
        times: of the blocks, unless the file has its own.

    Returns:
        counts (T, n, n), float64, and T times.

    Raises:
        FileNotFoundError: there is no such file.
        ShapeError: not (T, n, n).
        GeneratorError: negative or non-finite counts, none at all, or a time not > 0.

    Example:
        >>> file = getfixture("tmp_path") / "counts.txt"
        >>> _ = file.write_text("90 10\\n20 80\\n")
        >>> read_counts(file, [0.5])[0].shape
        torch.Size([1, 2, 2])
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(
            f"counts: expected a file of counts, got {str(path)!r}, which is none; correct the path"
        )
    try:
        if file.suffix == ".npz":
            with np.load(file, allow_pickle=False) as stored:
                counts, times = stored["counts"], stored["times"].tolist() if "times" in stored else times
        else:
            counts = np.loadtxt(file, ndmin=2)
            counts = counts.reshape(-1, counts.shape[1], counts.shape[1])
    except (ValueError, KeyError) as error:
        raise ShapeError(
            f"{path}: expected counts (T, n, n), got {error}; give an .npz with an array counts, or T·n lines of n numbers"
        ) from error
    if counts.ndim != 3 or counts.shape[1] != counts.shape[2] or len(counts) != len(times):
        raise ShapeError(
            f"{path}: expected counts (T, n, n) for T = {len(times)} times, got {counts.shape}; give one block per time"
        )
    table = torch.from_numpy(counts.astype(np.float64))
    if not bool(torch.isfinite(table).all()) or float(table.min()) < 0 or float(table.sum()) == 0:
        raise GeneratorError(f"{path}: expected counts ≥ 0, not all 0, got others; count transitions i → j in row i")
    check_times(times)
    return table, [float(time) for time in times]


def check_times(times: Sequence[float]) -> None:
    """Raise GeneratorError unless there are times and all are positive and finite."""
    if len(times) == 0 or not all(0 < time < float("inf") for time in times):
        raise GeneratorError(f"times: expected positive numbers, got {list(times)}; P(0) = I says nothing about Q")
