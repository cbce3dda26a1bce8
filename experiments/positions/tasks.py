"""Four tasks: text, recall, counting and digits; their data, and what is measured on them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from experiments.counts import as_numbers, log_frequencies
from experiments.positions.encodings import ENCODINGS, IMAGE_ENCODINGS, Choice
from liegroup_attn.lightning import ByteCorpus, Digits, ImageClassifier, LanguageModel
from liegroup_attn.lightning.data.text import read_splits

__all__ = ["SETTINGS", "TASKS", "Always", "Batch", "Data", "Task", "counting", "recall"]

Batch = dict[str, Tensor]
NO_TARGET = -100  # what cross-entropy leaves out
ALWAYS = "the most frequent answer"
_MODEL = {"width": 64, "depth": 2, "num_heads": 4, "weight_decay": 0.01}
# What the result files say of a task; "lengths" are those of the tests, the first is that of training.
SETTINGS: dict[str, dict[str, Any]] = {
    "text": {
        "steps": 500,
        "batch_size": 8,
        "lengths": [256, 512, 1024, 2048],
        "test_bytes": 32_768,
        "model": {**_MODEL, "learning_rate": 3e-3, "warmup_steps": 20},
    },
    "recall": {
        "steps": 900,
        "batch_size": 16,
        "lengths": [64, 128, 256],
        "test_sequences": 128,
        "keys": 8,
        "values": 8,
        "pairs": 4,
        "queries": 24,
        "model": {**_MODEL, "learning_rate": 3e-3, "warmup_steps": 50},
    },
    "counting": {
        "steps": 350,
        "batch_size": 16,
        "lengths": [64, 128, 256],
        "test_sequences": 128,
        "letters": 8,
        "most": 9,
        "chances": {"reset": 0.04, "mark": 0.2, "ask": 0.2},
        "model": {**_MODEL, "learning_rate": 3e-3, "warmup_steps": 50},
    },
    "digits": {
        "steps": 500,
        "batch_size": 16,
        "lengths": [64],
        "patch_size": 1,
        "model": {**_MODEL, "learning_rate": 3e-3, "warmup_steps": 50},
    },
}


class Data(L.LightningDataModule):
    """Batches that are made before the training.

    Args:
        train: in their order.
        validation: batches.
        tests: length → batches.
        references: title → what is known without attention, tokens → scores.
        facts: where they come from.
    """

    def __init__(
        self,
        train: list[Batch],
        validation: list[Batch],
        tests: dict[int, list[Batch]],
        references: Mapping[str, nn.Module],
        facts: dict[str, Any],
    ) -> None:
        super().__init__()
        self.train, self.validation, self.tests = train, validation, tests
        self.references, self.facts = references, facts

    def train_dataloader(self) -> DataLoader:
        """Every batch once."""
        return DataLoader(self.train, batch_size=None, generator=torch.Generator())  # type: ignore[arg-type]


@dataclass(frozen=True)
class Task:
    """A question that positions help to answer.

    Args:
        title: in words.
        encodings: name → what is compared on it.
        data: setting, seed, corpus, path → batches.
        model: setting, attention, encoding → LightningModule.
        measure: scores of the model, a batch, tokens trained on → sums and counts, see ``cell.measured``.
        unit: of the number in tables.
        better: "lower" or "higher".
    """

    title: str
    encodings: dict[str, Choice]
    data: Callable[[dict[str, Any], int, str, str | None], Data]
    model: Callable[[dict[str, Any], dict[str, Any], dict[str, Any] | None], L.LightningModule]
    measure: Callable[[Tensor, Batch, int], dict[str, tuple[float, int]]]
    unit: str
    better: str


class Always(nn.Module):
    """The same scores whatever is read, highest for the answer that is most frequent.

    Args:
        answers: integers, of the training.
        classes: how many there are.
    """

    scores: Tensor

    def __init__(self, answers: Tensor, classes: int) -> None:
        super().__init__()
        self.register_buffer("scores", torch.bincount(answers, minlength=classes).float())

    def forward(self, tokens: Tensor) -> Tensor:
        """One answer a token, or one an image: (B, N) → (B, N, classes), (B, N, F) → (B, classes)."""
        return self.scores.expand(*(tokens.shape if tokens.dim() == 2 else tokens.shape[:1]), -1)


# text


def _text(setting: dict[str, Any], seed: int, corpus: str, path: str | None) -> Data:
    """Training windows at random places; the same test bytes at every length, in one piece, cut into windows."""
    context, size = setting["lengths"][0], setting["batch_size"]
    source = ByteCorpus(
        corpus, path=path, seed=seed, context=context, batch_size=size, train_windows=setting["steps"] * size
    )
    source.prepare_data()
    source.setup("fit")
    text = read_splits(source.source, source.path or source.folder)
    total, longest = setting["test_bytes"], max(setting["lengths"])
    if total % longest or len(text["test"]) <= total:
        raise ValueError(
            f"corpus: expected more than test_bytes = {total} bytes to test on, a multiple of {longest}, got "
            f"{len(text['test'])}; take a longer text"
        )
    tests = {length: _windows(text["test"][: total + 1], length, longest) for length in setting["lengths"]}
    held = text["validation"][: total + 1]
    read = as_numbers(text["train"])
    counted = {"counts of pairs of bytes": nn.Embedding.from_pretrained(log_frequencies(read[:-1], read[1:]))}
    return Data(list(source.train_dataloader()), _windows(held, context, context), tests, counted, source.facts())


def _windows(text: bytes, length: int, longest: int) -> list[Batch]:
    """Windows of a stretch of text, and which of them end where one of the longest would."""
    count = (len(text) - 1) // length
    numbers = as_numbers(text)
    tokens, targets = (numbers[shift : shift + count * length].view(count, length) for shift in (0, 1))
    ends = (torch.arange(1, count + 1) * length) % longest == 0
    size = max(1, 2048 // length)
    batches = list(_batches(tokens, targets, size))
    return [batch | {"ends": part} for batch, part in zip(batches, ends.split(size), strict=True)]


def _batches(tokens: Tensor, targets: Tensor, size: int, name: str = "targets") -> Iterator[Batch]:
    for at in range(0, len(tokens), size):
        yield {"tokens": tokens[at : at + size], name: targets[at : at + size]}


# recall


def recall(generator: np.random.Generator, count: int, length: int, setting: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Pairs of key and value, then keys alone, each to be answered by its value; fillers before pairs and queries.

    Tokens: keys from 0, then values, then the filler. Keys of a sequence differ; queries are drawn from them with
    replacement. A value stands right after its key at every length, so that longer sequences have more fillers only.

    Returns:
        Tokens and targets (count, length); targets at queries alone, else ``NO_TARGET``.
    """
    keys, values, pairs, queries = (setting[name] for name in ("keys", "values", "pairs", "queries"))
    filler, items = keys + values, pairs + queries
    spare = length - 2 * pairs - queries
    if spare < 0 or pairs > keys:
        raise ValueError(f"recall: expected length ≥ {2 * pairs + queries} and pairs ≤ keys, got {length}; change one")
    tokens = np.full((count, length), filler)
    targets = np.full((count, length), NO_TARGET)
    key = generator.permuted(np.tile(np.arange(keys), (count, 1)), axis=1)[:, :pairs]
    value = generator.integers(keys, keys + values, (count, pairs))
    asked = generator.integers(pairs, size=(count, queries))
    # Before which item each filler stands; pairs and queries are items.
    before = np.sort(generator.integers(items, size=(count, spare)), 1)
    passed = (before[:, None, :] <= np.arange(items)[:, None]).sum(-1)  # (count, items) fillers before an item
    place = passed + np.concatenate([2 * np.arange(pairs), 2 * pairs + np.arange(queries)])
    row = np.arange(count)[:, None]
    tokens[row, place[:, :pairs]] = key
    tokens[row, place[:, :pairs] + 1] = value
    tokens[row, place[:, pairs:]] = np.take_along_axis(key, asked, 1)
    targets[row, place[:, pairs:]] = np.take_along_axis(value, asked, 1)
    return torch.from_numpy(tokens), torch.from_numpy(targets)


# counting


def counting(generator: np.random.Generator, count: int, length: int, setting: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Letters, marks, resets and questions: how many marks since the last reset, up to ``most``?

    Tokens: the answers 0 … most, which are never read, then mark, reset, question and the letters. At f times the
    training length the chances of all but letters are divided by f: counts are distributed as in training, spread over f
    times as many tokens.

    Returns:
        Tokens and targets (count, length); targets at questions alone, else ``NO_TARGET``.
    """
    most = setting["most"]
    mark, reset, ask, letter = range(most + 1, most + 5)
    factor = length / setting["lengths"][0]
    chances = [setting["chances"][name] / factor for name in ("mark", "reset", "ask")]
    kind = generator.random((count, length))
    tokens = generator.integers(letter, letter + setting["letters"], (count, length))
    low = 0.0
    for token, chance in zip((mark, reset, ask), chances, strict=True):
        tokens[(low <= kind) & (kind < low + chance)] = token
        low += chance
    marks = (tokens == mark).cumsum(1)
    past = np.maximum.accumulate(np.where(tokens == reset, marks, 0), axis=1)  # marks before the last reset
    targets = np.where(tokens == ask, np.minimum(marks - past, most), NO_TARGET)
    return torch.from_numpy(tokens), torch.from_numpy(targets)


def _drawn(draw: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Data]:
    """Data of a task whose sequences are drawn; training by the seed, validation and tests the same for all."""

    def data(setting: dict[str, Any], seed: int, corpus: str, path: str | None) -> Data:
        size, first = setting["batch_size"], setting["lengths"][0]
        train = draw(np.random.default_rng((0, seed)), setting["steps"] * size, first, setting)
        held = draw(np.random.default_rng(1), setting["test_sequences"], first, setting)
        tests = {
            length: draw(np.random.default_rng((3, length)), setting["test_sequences"], length, setting)
            for length in setting["lengths"]
        }
        digest = hashlib.sha256()
        for tokens, targets in tests.values():
            digest.update(tokens.numpy().tobytes() + targets.numpy().tobytes())
        return Data(
            list(_batches(*train, size)),
            list(_batches(*held, size)),
            {length: list(_batches(*test, max(1, 4096 // length))) for length, test in tests.items()},
            {ALWAYS: Always(train[1][train[1] != NO_TARGET], _vocabulary(setting))},
            {"source": draw.__name__, "sha256": digest.hexdigest()},
        )

    return data


def _vocabulary(setting: dict[str, Any]) -> int:
    if "keys" in setting:
        return setting["keys"] + setting["values"] + 1
    return setting["most"] + 4 + setting["letters"] if "most" in setting else 256


def _language_model(
    setting: dict[str, Any], attention: dict[str, Any], encoding: dict[str, Any] | None
) -> L.LightningModule:
    return LanguageModel(attention, vocab_size=_vocabulary(setting), encoding=encoding, **setting["model"])


# digits


def _digits(setting: dict[str, Any], seed: int, corpus: str, path: str | None) -> Data:
    size = setting["batch_size"]
    source = Digits(setting["patch_size"], size, setting["steps"] * size, seed)
    source.setup()
    (length,) = setting["lengths"]
    train, tests = list(source.train_dataloader()), {length: list(source.test_dataloader())}
    always = {ALWAYS: Always(torch.cat([batch["labels"] for batch in train]), source.num_classes)}
    return Data(train, list(source.val_dataloader()), tests, always, source.facts())


def _classifier(
    setting: dict[str, Any], attention: dict[str, Any], encoding: dict[str, Any] | None
) -> L.LightningModule:
    (patches,) = setting["lengths"]
    sizes = {"num_patches": patches, "patch_values": setting["patch_size"] ** 2}
    return ImageClassifier(attention, places=False, encoding=encoding, **sizes, **setting["model"])


# what is measured


def _bits(scores: Tensor, batch: Batch, trained: int) -> dict[str, tuple[float, int]]:
    """Bits of all bytes, and of the last ones before the end of each longest window, as many as were trained on.

    The latter are the same bytes at every length, with more context the longer the window.
    """
    bits = nn.functional.cross_entropy(scores.mT, batch["targets"], reduction="none") / np.log(2)
    last = bits[batch["ends"], -trained:]
    return {"all": (float(bits.double().sum()), bits.numel()), "last": (float(last.double().sum()), last.numel())}


def _right(scores: Tensor, batch: Batch, trained: int) -> dict[str, tuple[float, int]]:
    """Answers that are right, in percent."""
    targets = batch["targets"] if "targets" in batch else batch["labels"]
    asked = targets != NO_TARGET
    return {"all": (100.0 * int((scores.argmax(-1) == targets)[asked].sum()), int(asked.sum()))}


TASKS = {
    "text": Task("text", ENCODINGS, _text, _language_model, _bits, "bits per byte", "lower"),
    "recall": Task("recall", ENCODINGS, _drawn(recall), _language_model, _right, "accuracy %", "higher"),
    "counting": Task("counting", ENCODINGS, _drawn(counting), _language_model, _right, "accuracy %", "higher"),
    "digits": Task("digits", IMAGE_ENCODINGS, _digits, _classifier, _right, "accuracy %", "higher"),
}
