from __future__ import annotations

import hashlib
from itertools import chain, islice
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.data import _is_dataloader_shuffled, _update_dataloader
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from liegroup_attn.lightning.data import ByteCorpus, RandomForests, ResumableLoader
from liegroup_attn.lightning.data.text import PUBLIC, SPLITS

SHARED = Path(__file__).parents[2] / "../shared/data"


def splits_of(data: ByteCorpus) -> dict[str, bytes]:
    data.setup()
    return data._splits


@pytest.fixture
def text_file(tmp_path):
    file = tmp_path / "text.txt"
    file.write_bytes(bytes(torch.randint(97, 123, (4000,), generator=torch.Generator().manual_seed(1)).tolist()))
    return file


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "texts"
    for i in range(100):
        file = root / f"part{i % 3}" / f"{i}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"<{i}>" * 50)
    return root


# corpus: splits


def test_a_file_is_cut_in_place(text_file):
    splits = splits_of(ByteCorpus(str(text_file), context=8))
    assert b"".join(splits.values()) == text_file.read_bytes()
    assert [len(splits[name]) for name in SPLITS] == [3600, 200, 200]


def test_a_folder_is_cut_between_files_in_hash_order(folder):
    (folder / ".hidden").write_text("hidden" * 100)
    (folder / "binary").write_bytes(b"\xff\xfe" * 100)
    splits = splits_of(ByteCorpus(str(folder), context=8))
    names = sorted(
        (p.relative_to(folder).as_posix() for p in folder.glob("part*/*")),
        key=lambda name: hashlib.sha256(name.encode()).hexdigest(),
    )
    assert b"".join(splits.values()) == b"".join((folder / name).read_bytes() + b"\n" for name in names)
    found = [set(text.split(b"\n")) - {b""} for text in splits.values()]
    assert not found[0] & found[1]
    assert not found[1] & found[2]
    assert not found[0] & found[2]
    assert sum(map(len, found)) == 100
    assert abs(len(splits["train"]) / sum(map(len, splits.values())) - 0.9) < 0.02


def test_the_standard_library_leaves_tests_out(tmp_path, monkeypatch):
    for name in ("a/ok.py", "test/no.py", "b/tests/no.py", "site-packages/no.py", "idlelib/no.py", "no.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    for i in range(60):
        (tmp_path / f"m{i}.py").write_text(f"ok = {i:010}")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    data = ByteCorpus(context=8)
    text = b"".join(splits_of(data).values())
    assert b"no." not in text
    assert b"a/ok.py" in text
    assert data.facts()["python"].count(".") == 2


def test_max_bytes_keeps_the_head_of_each_split(text_file):
    whole, part = (ByteCorpus(str(text_file), context=8, max_bytes=n) for n in (None, 1000))
    assert part.facts()["bytes"] == 1000
    assert all(splits_of(whole)[name].startswith(splits_of(part)[name]) for name in SPLITS)
    assert whole.corpus_sha256 == hashlib.sha256(text_file.read_bytes()).hexdigest() != part.corpus_sha256


@pytest.mark.parametrize("source", ["tinyshakespeare", "wikitext-2"])
def test_public_corpora(source):
    if not (path := SHARED / source).exists():
        pytest.skip(f"no local copy of {source} at {path}")
    data = ByteCorpus(source, path=str(path))
    data.prepare_data()  # must not want the network
    splits = splits_of(data)
    if source == "tinyshakespeare":
        assert data.corpus_sha256 in PUBLIC[source].values()
        assert len(splits["train"]) == int(0.9 * 1115394)
    else:
        assert splits["train"] + splits["validation"] == (path / "valid.txt").read_bytes()
        assert splits["test"] == (path / "test.txt").read_bytes()


# corpus: windows


def test_windows_are_functions_of_seed_and_index(text_file):
    def first(n: int, **options: int) -> list[list[int]]:
        data = ByteCorpus(str(text_file), context=8, **options)
        data.setup()
        dataset = data.train_dataloader().dataset
        return [dataset[i]["tokens"].tolist() for i in range(n)]

    assert first(20, seed=3, train_windows=20) == first(20, seed=3, train_windows=500, batch_size=2)
    assert first(20, seed=3) != first(20, seed=4)


def test_training_windows_reach_both_ends_and_targets_are_the_next_bytes(text_file):
    data = ByteCorpus(str(text_file), context=8, train_windows=50_000)
    text = splits_of(data)["train"]
    dataset = data.train_dataloader().dataset
    assert (dataset.starts.min(), dataset.starts.max()) == (0, len(text) - 9)
    for i in range(50):
        start, item = int(dataset.starts[i]), dataset[i]
        assert bytes(item["tokens"].tolist()) == text[start : start + 8]
        assert bytes(item["targets"].tolist()) == text[start + 1 : start + 9]
        assert item["tokens"].dtype == torch.long


@pytest.mark.parametrize(("eval_windows", "expected"), [(5, 5), (256, 200 // 9), (1, 1)])
def test_evaluation_windows_do_not_overlap(text_file, eval_windows, expected):
    data = ByteCorpus(str(text_file), context=8, eval_windows=eval_windows)
    data.setup()
    for loader in (data.val_dataloader(), data.test_dataloader()):
        starts = loader.dataset.starts
        assert len(starts) == expected
        assert (starts.diff() >= 9).all()
        assert starts[0] == 0
        assert len(starts) == 1 or starts[-1] == 200 - 9


# corpus: what can go wrong


@pytest.mark.parametrize("name", ["context", "batch_size", "train_windows", "eval_windows", "max_bytes"])
def test_sizes_are_positive(name):
    with pytest.raises(ValueError, match=f"{name}: expected .* at least 1, got 0"):
        ByteCorpus(**{name: 0})


def test_what_is_missing_or_too_small(tmp_path, text_file):
    with pytest.raises(FileNotFoundError, match=r"nowhere.*correct the path"):
        ByteCorpus(str(tmp_path / "nowhere")).setup()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty.*with none; add some"):
        ByteCorpus(str(tmp_path / "empty")).setup()
    with pytest.raises(ValueError, match=r"tiny corpus.*at least context \+ 1 = 201 bytes for validation, got 200"):
        ByteCorpus(str(text_file), context=200).setup()
    ByteCorpus(str(text_file), context=199).setup()
    (tmp_path / "none.txt").touch()
    with pytest.raises(ValueError, match=r"tiny corpus.*for train, got 0"):
        ByteCorpus(str(tmp_path / "none.txt"), max_bytes=10).setup()
    with pytest.raises(ValueError, match="path: expected with one of the sources"):
        ByteCorpus(str(text_file), path=str(text_file))
    with pytest.raises(FileNotFoundError, match=r"prepare_data\(\)"):
        ByteCorpus("tinyshakespeare", cache_dir=str(tmp_path)).setup()


def test_a_copy_with_a_wrong_hash_is_refused_and_left_alone(text_file):
    before = text_file.read_bytes()
    data = ByteCorpus("tinyshakespeare", path=str(text_file))
    got = hashlib.sha256(before).hexdigest()
    with pytest.raises(
        ValueError, match=rf"expected sha256 86c4e6aa\w+ of the public file, got {got}; .*own goes in as the source"
    ):
        data.setup()
    assert text_file.read_bytes() == before


def test_download(tmp_path, text_file, monkeypatch):
    sha256 = hashlib.sha256(text_file.read_bytes()).hexdigest()
    cache = tmp_path / "cache"
    data = ByteCorpus("tinyshakespeare", cache_dir=str(cache), context=8)

    def files() -> list[Path]:
        return [p for p in cache.rglob("*") if p.is_file()]

    monkeypatch.setitem(PUBLIC, "tinyshakespeare", {text_file.as_uri(): "0" * 64})
    with pytest.raises(ValueError, match=rf'expected "0{{64}}", got "{sha256}".*path='):
        data.prepare_data()
    assert files() == []
    monkeypatch.setitem(PUBLIC, "tinyshakespeare", {(tmp_path / "nowhere.txt").as_uri(): sha256})
    with pytest.raises(ConnectionError, match=r"check the network, or pass path="):
        data.prepare_data()
    assert files() == []
    monkeypatch.setitem(PUBLIC, "tinyshakespeare", {text_file.as_uri(): sha256})
    data.prepare_data()
    assert files() == [cache / "tinyshakespeare" / "text.txt"]
    assert data.corpus_sha256 == sha256


def test_the_cache_respects_xdg(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert ByteCorpus("wikitext-2").folder == tmp_path / "liegroup_attn" / "wikitext-2"


# forests


def follow(tokens: torch.Tensor) -> tuple[list[int], list[int]]:
    """Roots and depths, one pointer at a time."""
    parent = dict(tokens.tolist())
    roots, depths = [], []
    for node in tokens[:, 0].tolist():
        hops = 0
        while parent[node] != node:
            node, hops = parent[node], hops + 1
        roots.append(node)
        depths.append(hops)
    return roots, depths


FORESTS = [
    {},
    {"num_nodes": 1, "max_depth": 0},
    {"num_nodes": 2, "max_depth": 1},
    {"num_nodes": 7, "max_depth": 0},
    {"num_nodes": 12, "max_depth": 11, "deep_nodes": 5, "deep_depth": 4},
    {"num_nodes": 30, "max_depth": 1, "test_nodes": 63},
]


@pytest.mark.parametrize("options", FORESTS)
def test_labels_and_depths_are_those_of_a_pointer_chase(options):
    data = RandomForests(**options, val_size=30, test_size=30)
    sizes = [(data.num_nodes, data.max_depth)] * 2
    sizes += [(options.get("test_nodes", data.num_nodes), data.max_depth), (data.deep_nodes, data.deep_depth)]
    loaders = [data.train_dataloader(), data.val_dataloader(), *data.test_dataloader()]
    for loader, (nodes, max_depth) in zip(loaders, sizes, strict=True):
        for item in islice(loader.dataset, 30):
            assert item["tokens"].shape == (nodes, 2)
            assert len(set(item["tokens"][:, 0].tolist())) == nodes
            assert item["tokens"].min() >= 0
            assert item["tokens"].max() < data.vocab_size
            roots, depths = follow(item["tokens"])
            assert item["labels"].tolist() == roots
            assert item["depth"].tolist() == depths
            assert max(depths) <= max_depth
            assert {value.dtype for value in item.values()} == {torch.long}


def test_every_depth_is_well_represented():
    data = RandomForests()
    for dataset, depth, least in (
        (data.train_dataloader().dataset, 11, 0.04),
        (data.test_dataloader()[1].dataset, 28, 0.01),
    ):
        depths = torch.cat([dataset[i]["depth"] for i in range(2000)])
        share = torch.bincount(depths) / len(depths)
        assert len(share) == depth + 1
        assert share.min() > least
        assert all(len(set(dataset[i]["labels"].tolist())) >= 2 for i in range(200))


def test_a_root_cannot_be_told_by_place_or_id():
    items = [RandomForests().train_dataloader().dataset[i] for i in range(2000)]
    is_root = torch.stack([item["depth"] == 0 for item in items]).float()  # (2000, 24)
    assert (is_root.mean(0) - is_root.mean()).abs().max() < 0.04  # five standard errors
    roots = torch.cat([item["labels"][item["depth"] == 0] for item in items])
    counts = torch.bincount(roots, minlength=48)
    assert counts.max() < 2 * counts.min()


def test_examples_are_functions_of_seed_split_and_index():
    def tokens(data: RandomForests) -> list[list[str]]:
        loaders = [data.train_dataloader(), data.val_dataloader(), *data.test_dataloader()]
        return [[str(loader.dataset[i]["tokens"].tolist()) for i in range(50)] for loader in loaders]

    first, again = tokens(RandomForests(seed=1)), tokens(RandomForests(seed=1, batch_size=3, train_size=50))
    other = tokens(RandomForests(seed=2))
    assert first == again
    everything = list(chain.from_iterable(first + other))
    assert len(set(everything)) == len(everything)  # no example twice: not across splits, not across seeds


def test_training_sees_the_ids_of_the_deep_test():
    data = RandomForests()
    items = [data.train_dataloader().dataset[i]["tokens"] for i in range(200)]
    assert set(torch.cat(items)[:, 0].tolist()) == set(range(data.vocab_size)) == set(range(48))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"max_depth": 24}, "max_depth < num_nodes, got depth 24 and 24 nodes"),
        ({"max_depth": -1}, "0 <= max_depth"),
        ({"test_nodes": 11}, "max_depth < test_nodes, got depth 11 and 11 nodes"),
        ({"deep_depth": 48}, "deep_depth < deep_nodes"),
        ({"num_nodes": 0}, "max_depth < num_nodes"),
        ({"train_size": 0}, "train_size: expected at least 1, got 0"),
        ({"batch_size": -2}, "batch_size: expected at least 1, got -2"),
        ({"seed": -1}, "seed: expected at least 0"),
    ],
)
def test_impossible_forests(options, match):
    with pytest.raises(ValueError, match=match):
        RandomForests(**options)


# loader


class Recorded(Dataset):
    def __init__(self, size: int) -> None:
        self.size, self.made = size, []

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        self.made.append(index)
        return index


def batches(loader: DataLoader) -> list[list[int]]:
    return [batch.tolist() for batch in loader]


def test_skipped_examples_are_not_made():
    loader = ResumableLoader(Recorded(11), batch_size=2)
    loader.load_state_dict({"batches": 4, "length": 6})
    assert loader.state_dict()["batches"] == 4
    assert batches(loader) == [[8, 9], [10]]
    assert loader.dataset.made == [8, 9, 10]
    assert len(loader) == 6
    assert batches(loader) == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10]]  # the next epoch is whole


@pytest.mark.parametrize("persistent", [False, True])
def test_prefetched_batches_do_not_count(persistent):
    def new() -> ResumableLoader:
        return ResumableLoader(range(20), batch_size=2, num_workers=2, persistent_workers=persistent)

    loader, resumed = new(), new()
    running = iter(loader)
    for k in range(3):
        next(running)
        assert loader.state_dict() == {"batches": k + 1, "length": 10}
    resumed.load_state_dict(loader.state_dict())
    assert batches(resumed) == batches(DataLoader(range(20), batch_size=2))[3:]
    assert len(batches(resumed)) == 10


def test_what_has_resumed_is_saved_again():
    """In the rest of its epoch, too: it has handed out what came before the resume."""
    whole, loader, stopped_at = (
        batches(ResumableLoader(range(20), batch_size=2)),
        ResumableLoader(range(20), batch_size=2),
        0,
    )
    for more in (2, 3, 1):
        running = iter(loader)
        assert [next(running).tolist() for _ in range(more)] == whole[stopped_at : stopped_at + more]
        stopped_at += more
        assert loader.state_dict() == {"batches": stopped_at, "length": 10}
        state, loader = loader.state_dict(), ResumableLoader(range(20), batch_size=2)
        loader.load_state_dict(state)
    assert batches(loader) == whole[stopped_at:]


def test_a_finished_epoch_starts_anew():
    loader = ResumableLoader(range(6), batch_size=2)
    whole = batches(loader)
    loader.load_state_dict(loader.state_dict())
    assert batches(loader) == whole


def test_loaders_without_a_fixed_order_or_of_another_length_are_refused():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(range(6))

    for sampler in (
        RandomSampler(range(6)),
        RandomSampler(range(6), generator=torch.Generator()),
        SubsetRandomSampler(range(3)),
        WeightedRandomSampler([0.5] * 6, 6),
    ):
        words = (
            f"order that can be found again, got range with {type(sampler).__name__}; pass shuffle=True, or a sampler"
        )
        with pytest.raises(ValueError, match=words):
            ResumableLoader(range(6), sampler=sampler)
        with pytest.raises(ValueError, match=words):
            ResumableLoader(range(6), batch_sampler=BatchSampler(sampler, 2, drop_last=False))
    with pytest.raises(ValueError, match="got Stream"):
        ResumableLoader(Stream())
    with pytest.raises(ValueError, match="shuffle"):  # torch's own
        ResumableLoader(Stream(), shuffle=True)
    with pytest.raises(ValueError, match="expected 6 batches an epoch as in the checkpoint, got 3"):
        ResumableLoader(range(6), batch_size=2).load_state_dict({"batches": 1, "length": 6})


def test_shuffled_epochs_differ_and_are_the_same_for_the_same_seed():
    def epochs(*seed: int) -> list[list[int]]:
        generator = {"generator": torch.Generator().manual_seed(seed[0])} if seed else {}
        loader = ResumableLoader(range(20), batch_size=4, shuffle=True, **generator)
        return [list(chain.from_iterable(batches(loader))) for _ in range(3)]

    found = [*epochs(), *epochs(1), *epochs(2)]
    assert all(sorted(epoch) == list(range(20)) for epoch in found)
    assert len(set(map(tuple, found))) == 9
    assert epochs(1) == found[3:6]


def test_lightning_shuffles_a_shuffled_loader_over_processes():
    loader = ResumableLoader(range(20), batch_size=2, shuffle=True)
    assert _is_dataloader_shuffled(loader)
    sampler = DistributedSampler(loader.dataset, num_replicas=2, rank=1, shuffle=True)
    replaced = _update_dataloader(loader, sampler)
    assert (type(replaced), replaced.sampler) == (ResumableLoader, sampler)


def test_lightning_can_replace_the_sampler():
    loader = ResumableLoader(range(20), batch_size=2, num_workers=0, drop_last=True)
    sampler = DistributedSampler(loader.dataset, num_replicas=2, rank=1, shuffle=False)
    replaced = _update_dataloader(loader, sampler)
    assert type(replaced) is ResumableLoader
    assert (replaced.batch_size, replaced.drop_last, replaced.sampler) == (2, True, sampler)
    replaced.load_state_dict({"batches": 3, "length": 5})
    assert batches(replaced) == [[13, 15], [17, 19]]


class Tiny(L.LightningModule):
    """Remembers the batches that it trains on."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[int]] = []

    def training_step(self, batch, index):
        values = batch["tokens"] if isinstance(batch, dict) else batch
        self.seen.append(values.tolist())
        return self.scale * values.float().mean()

    def validation_step(self, batch, index):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(folder: Path, *data, resume: Path | None = None, **options) -> list[list[int]]:
    model, saver = Tiny(), ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1)
    trainer = L.Trainer(
        accelerator="cpu",
        callbacks=[saver],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )
    trainer.fit(model, *data, ckpt_path=resume, weights_only=True)
    return model.seen


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
@pytest.mark.parametrize("options", [{"max_epochs": 3}, {"max_steps": 13}, {"max_epochs": 3, "val_check_interval": 2}])
@pytest.mark.parametrize("workers", [{}, {"num_workers": 1}])
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_resumed_fit_sees_the_batches_of_an_uninterrupted_one(tmp_path, options, workers, shuffle):
    def loaders() -> tuple[DataLoader, DataLoader]:
        return ResumableLoader(range(10), batch_size=2, shuffle=shuffle, **workers), DataLoader(range(2))

    whole = fit(tmp_path / "whole", *loaders(), **options)
    if shuffle:
        assert whole[:5] != whole[5:10]
    else:
        assert whole[:6] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [0, 1]]
    for k in (1, 3, 5, 7) if not workers else (7,):  # in the first epoch, at its end, in the second
        checkpoint = tmp_path / "whole" / f"step={k}.ckpt"
        assert fit(tmp_path / f"{k}", *loaders(), resume=checkpoint, **options) == whole[k:]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
@pytest.mark.parametrize("kind", [ByteCorpus, RandomForests])
def test_data_modules_resume_and_their_hyperparameters_load_with_weights_only(tmp_path, text_file, kind):
    def new():
        if kind is RandomForests:
            return RandomForests(train_size=12, val_size=2, test_size=2, batch_size=2)
        return ByteCorpus(text_file, cache_dir=tmp_path, context=8, train_windows=12, batch_size=2)  # Path objects

    whole = fit(tmp_path / "whole", new(), max_steps=8)
    checkpoint = tmp_path / "whole" / "step=4.ckpt"
    assert fit(tmp_path / "rest", new(), max_steps=8, resume=checkpoint) == whole[4:]
    assert len({str(batch) for batch in whole}) == 6
    hparams = torch.load(checkpoint, weights_only=True)["datamodule_hyper_parameters"]
    assert all(isinstance(value, str | int | None) for value in hparams.values())
    assert dict(kind.load_from_checkpoint(checkpoint, weights_only=True).hparams) == dict(new().hparams)
