"""Root finding in random forests: pointers to follow, to a depth that the task sets."""

from __future__ import annotations

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from liegroup_attn.lightning.data.loader import ResumableLoader

__all__ = ["RandomForests"]


class RandomForests(L.LightningDataModule):
    """Find each node's root; an item is ``{"tokens": (N, 2), "labels": (N,), "depth": (N,)}``, N = number of nodes.

    A token is (node id, parent id), a root's parent is the root itself, the label is the id of the token's root and
    the depth its number of edges to that root. Tokens stand in random order; the ids of an example are a random
    subset of the whole vocabulary, so that training sees the ids of the deeper test too.

    A forest starts with a few roots (two to N/6, fewer where the depth leaves no room) and grows by chains: each new
    node hangs below the one before it or, where a chain ends, below any earlier node; a chain ends at the greatest
    depth or by chance, after a mean length that is drawn per example up to the greatest depth. So forests range from
    bushes to long paths: at the defaults each depth from 0 to 11 has more than 4 % of the tokens, and in the deep
    test each from 0 to 28 more than 1 %.

    Example i of a split is a pure function of (seed, split, i).

    Args:
        num_nodes: tokens an example, N.
        max_depth: greatest depth in training, < num_nodes.
        test_nodes: tokens an example in the first test; default num_nodes.
        train_size: examples a training epoch; shorten epochs here rather than with ``limit_train_batches``.
        val_size: validation examples.
        test_size: examples of each of the two tests.
        batch_size: examples a batch.
        seed: of all examples, ≥ 0.
        num_workers: loader processes, 0 for none.
        deep_nodes: tokens an example in the second, deeper test.
        deep_depth: greatest depth there, < deep_nodes.

    Raises:
        ValueError: a size is out of range, or a depth needs more nodes.

    Example:
        >>> data = RandomForests(num_nodes=6, max_depth=3, batch_size=2)
        >>> batch = next(iter(data.train_dataloader()))
        >>> batch["tokens"].shape, data.vocab_size
        (torch.Size([2, 6, 2]), 48)
        >>> node, parent = batch["tokens"].unbind(-1)
        >>> bool(((node == parent) == (batch["depth"] == 0)).all())
        True
    """

    def __init__(
        self,
        num_nodes: int = 24,
        max_depth: int = 11,
        test_nodes: int | None = None,
        train_size: int = 100_000,
        val_size: int = 1024,
        test_size: int = 2048,
        batch_size: int = 64,
        seed: int = 0,
        num_workers: int = 0,
        deep_nodes: int = 48,
        deep_depth: int = 28,
    ) -> None:
        super().__init__()
        sizes = {"train_size": train_size, "val_size": val_size, "test_size": test_size, "batch_size": batch_size}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}; raise it")
        if seed < 0:
            raise ValueError(f"seed: expected at least 0, got {seed}; choose another")
        for nodes, depth, names in (
            (num_nodes, max_depth, "max_depth < num_nodes"),
            (num_nodes if test_nodes is None else test_nodes, max_depth, "max_depth < test_nodes"),
            (deep_nodes, deep_depth, "deep_depth < deep_nodes"),
        ):
            if not 0 <= depth < nodes:
                raise ValueError(f"expected 0 <= {names}, got depth {depth} and {nodes} nodes; take more nodes")
        self.save_hyperparameters(logger=False)
        self.num_nodes, self.max_depth, self.deep_nodes, self.deep_depth = num_nodes, max_depth, deep_nodes, deep_depth
        self.test_nodes = num_nodes if test_nodes is None else test_nodes
        self.train_size, self.val_size, self.test_size = train_size, val_size, test_size
        self.batch_size, self.seed, self.num_workers = batch_size, seed, num_workers

    @property
    def vocab_size(self) -> int:
        """The number of ids: the largest number of nodes in any split."""
        return max(self.num_nodes, self.test_nodes, self.deep_nodes)

    def train_dataloader(self) -> ResumableLoader:
        """Forests of the trained size, in an order fixed by the seed."""
        forests = self._forests(0, self.train_size, self.num_nodes, self.max_depth)
        return ResumableLoader(forests, batch_size=self.batch_size, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader:
        """Forests of the trained size."""
        return self._eval_loader(self._forests(1, self.val_size, self.num_nodes, self.max_depth))

    def test_dataloader(self) -> list[DataLoader]:
        """Two tests: at the trained depth, and with more nodes and deeper."""
        trained = self._forests(2, self.test_size, self.test_nodes, self.max_depth)
        deep = self._forests(3, self.test_size, self.deep_nodes, self.deep_depth)
        return [self._eval_loader(trained), self._eval_loader(deep)]

    def predict_dataloader(self) -> list[DataLoader]:
        """What the tests see."""
        return self.test_dataloader()

    def _forests(self, split: int, size: int, nodes: int, depth: int) -> _Forests:
        return _Forests((self.seed, split), size, nodes, depth, self.vocab_size)

    def _eval_loader(self, forests: _Forests) -> DataLoader:
        generator = torch.Generator()  # see ResumableLoader
        return DataLoader(forests, batch_size=self.batch_size, num_workers=self.num_workers, generator=generator)


class _Forests(Dataset):
    """Forests that are grown when asked for."""

    def __init__(self, seeds: tuple[int, int], size: int, nodes: int, max_depth: int, vocab_size: int) -> None:
        self.seeds, self.size, self.nodes, self.max_depth, self.vocab_size = seeds, size, nodes, max_depth, vocab_size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self.size:
            raise IndexError(f"expected an index in 0..{self.size - 1}, got {index}")
        rng = np.random.default_rng((*self.seeds, index))
        parent, root, depth = np.array(_grow(rng, self.nodes, self.max_depth))  # each (N,)
        ids = rng.permutation(self.vocab_size)[: self.nodes]  # (N,)
        order = rng.permutation(self.nodes)  # (N,)
        tokens = np.stack((ids[order], ids[parent[order]]), axis=1)  # (N, 2)
        items = {"tokens": tokens, "labels": ids[root[order]], "depth": depth[order]}
        return {name: torch.from_numpy(item) for name, item in items.items()}


def _grow(rng: np.random.Generator, nodes: int, max_depth: int) -> tuple[list[int], list[int], list[int]]:
    """Each node's parent, root and depth, nodes numbered as they grow."""
    most = min(max(2, nodes // 6), nodes - max_depth)
    roots = int(rng.integers(min(2, most), most + 1)) if max_depth else nodes
    parent, root, depth = [*range(roots)], [*range(roots)], [0] * roots
    length = max_depth * rng.random()  # of a chain, in the mean
    stay, draws = length / (1 + length), rng.random((nodes, 2)).tolist()
    open_nodes = [*range(roots)]  # those above the greatest depth
    for node in range(roots, nodes):
        coin, place = draws[node]
        extends = coin < stay and depth[-1] < max_depth
        above = node - 1 if extends else open_nodes[int(place * len(open_nodes))]
        parent.append(above)
        root.append(root[above])
        depth.append(depth[above] + 1)
        if depth[-1] < max_depth:
            open_nodes.append(node)
    return parent, root, depth
