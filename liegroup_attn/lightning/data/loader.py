"""A DataLoader that knows which batch comes next, so that training resumes in mid-epoch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler

__all__ = ["ResumableLoader"]


class ResumableLoader(DataLoader):
    """A `DataLoader` that resumes at the batch after the last one it handed out.

    Lightning stores ``state_dict()`` in its checkpoints and gives it back before the first batch of a resumed fit.
    Batches are counted when handed out, not when a worker prefetches them; skipped examples are never made.
    With ``shuffle=True`` the order is a function of the generator's seed and the epoch, which Lightning counts, so that it is
    the same in a resumed fit. Under DDP Lightning puts in a sampler that shuffles by its own seed and epoch: resume with the
    same ``seed_everything``. Random numbers that a dataset draws are not resumed: draw them by the index. An epoch cut short by ``limit_train_batches`` counts as unfinished: shorten the dataset instead.

    Args:
        dataset: a map-style dataset.
        **options: those of `DataLoader`; ``generator=torch.Generator().manual_seed(7)`` chooses another order. Torch's random
            samplers are refused, since their order is lost on resuming; one with ``set_epoch``, as a `DistributedSampler`,
            will do.

    Raises:
        ValueError: a sampler's order is random or the dataset is iterable.

    Example:
        >>> loader = ResumableLoader(range(10), batch_size=2)
        >>> batches = iter(loader)
        >>> next(batches), next(batches)
        (tensor([0, 1]), tensor([2, 3]))
        >>> resumed = ResumableLoader(range(10), batch_size=2)
        >>> resumed.load_state_dict(loader.state_dict())
        >>> next(iter(resumed))
        tensor([4, 5])
    """

    _start = 0  # the batch at which the running (or else the next) epoch starts
    _handed_out = 0  # batches of this epoch that the caller has, skipped ones included

    def __init__(self, dataset: Dataset, **options: Any) -> None:
        # A generator of its own: by default a loader draws a number from torch's global one whenever it starts, and a
        # resumed run, whose loaders start at other times, would then have other dropout.
        options["generator"] = options.get("generator") or torch.Generator()
        if not isinstance(dataset, IterableDataset) and options.pop("shuffle", False):
            options["sampler"] = _ByEpoch(dataset, options["generator"])
        super().__init__(dataset, **options)
        sampler: Any = getattr(self.batch_sampler, "sampler", self.sampler)
        if isinstance(dataset, IterableDataset) or (
            hasattr(sampler, "generator") and not hasattr(sampler, "set_epoch")
        ):
            raise ValueError(
                f"ResumableLoader: expected a map-style dataset in an order that can be found again, got "
                f"{type(dataset).__name__} with {type(sampler).__name__}; pass shuffle=True, or a sampler with set_epoch"
            )

    @property
    def _index_sampler(self) -> _From:
        # torch iterates over this, in the main process and for its workers alike: the one place to skip for free.
        return _From(self, super()._index_sampler)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator: nothing runs, and no worker starts, before the first batch is asked for.
        self._handed_out = self._start
        batches = super().__iter__()
        self._start = 0  # torch has its (shortened) list of indices by now; the next epoch is a whole one
        for batch in batches:
            self._handed_out += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The number of batches handed out in this epoch, and of all its batches."""
        return {"batches": self._handed_out, "length": len(self)}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Start the next epoch where ``state_dict`` was taken; a finished epoch starts anew.

        Args:
            state_dict: from :meth:`state_dict` of a loader of equal length.

        Raises:
            ValueError: the lengths differ, so that the order of batches does.
        """
        if state_dict["length"] != len(self):
            raise ValueError(
                f"ResumableLoader: expected {state_dict['length']} batches an epoch as in the checkpoint, got"
                f" {len(self)}; resume with the same data, batch size and number of processes"
            )
        self._start = self._handed_out = state_dict["batches"] % len(self)


class _ByEpoch(RandomSampler):
    """An order for every epoch; Lightning says which one it is, outside it each iteration has the next."""

    def __init__(self, dataset: Any, generator: torch.Generator) -> None:
        super().__init__(dataset, generator=generator)
        self.seed = generator.initial_seed()

    def set_epoch(self, epoch: int) -> None:
        self.generator.manual_seed(self.seed + epoch)


class _From:
    """The batches of indices from the loader's start on."""

    def __init__(self, loader: ResumableLoader, indices: Any) -> None:
        self.loader, self.indices = loader, indices

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self.indices), self.loader._start, None)

    def __len__(self) -> int:
        return len(self.indices)
