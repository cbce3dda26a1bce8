"""Text from files, folders and pinned public corpora, cut into training, validation and test."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable
from pathlib import Path

import torch

__all__ = ["PUBLIC", "SPLITS", "download", "read_splits"]

SPLITS = ("train", "validation", "test")

_GITHUB = "https://raw.githubusercontent.com"
_CHAR_RNN = f"{_GITHUB}/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/data/tinyshakespeare"
_EXAMPLES = f"{_GITHUB}/pytorch/examples/77f55b912142e11fcfdf5b530231fb9c52f181e8/word_language_model/data/wikitext-2"
# corpus → {address: sha256}
PUBLIC = {
    "tinyshakespeare": {f"{_CHAR_RNN}/input.txt": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"},
    "wikitext-2": {
        f"{_EXAMPLES}/valid.txt": "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
        f"{_EXAMPLES}/test.txt": "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
    },
}
_NOT_SOURCE = {"site-packages", "dist-packages", "test", "tests", "idlelib", "turtledemo", "lib2to3"}


def download(source: str, folder: Path) -> None:
    """Fetch the files of a public corpus that ``folder`` lacks; other sources need none.

    Raises:
        ValueError: what arrived has the wrong hash; it is not kept.
        ConnectionError: nothing arrived.
    """
    for url, sha256 in PUBLIC.get(source, {}).items():
        target = folder / Path(url).name
        if target.exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        try:  # into a temporary file, which is moved to its place once its hash is right
            torch.hub.download_url_to_file(url, str(target), hash_prefix=sha256)
        except RuntimeError as error:
            raise ValueError(f"{url}: {error}; try again, or pass path=… with a local copy") from error
        except OSError as error:
            raise ConnectionError(
                f"expected to download {url}, got {error!r}; check the network, or pass path=… with a local copy"
            ) from error


def read_splits(source: str, path: str | Path) -> dict[str, bytes]:
    """The bytes of each split.

    Args:
        source: ``"stdlib"``, a public corpus, or the path of a file or folder.
        path: the folder of a public corpus, or its file if it has only one; unused for other sources.

    Raises:
        ValueError: a public file has the wrong hash, or a folder has no text.
        FileNotFoundError: there is no such file.
    """
    if source in PUBLIC:
        first, *others = (_read_checked(file, sha256) for file, sha256 in _locate(source, Path(path).expanduser()))
        # tinyshakespeare is cut in place; wikitext-2 has a test file.
        edge = len(first) * 9 // 10
        return dict(zip(SPLITS, (first[:edge], first[edge:], *others), strict=True)) if others else _cut(first)
    root = Path(sysconfig.get_path("stdlib") if source == "stdlib" else source).expanduser()
    if root.is_file():
        return _cut(root.read_bytes())
    if not root.is_dir():
        raise FileNotFoundError(
            f"source: expected 'stdlib', one of {sorted(PUBLIC)}, or the path of a file or folder, got {source!r},"
            " which does not exist; correct the path"
        )
    names = {p.relative_to(root) for p in root.rglob("*.py" if source == "stdlib" else "*") if p.is_file()}
    if source == "stdlib":
        return _cut_between_files(root, (name for name in names if not _NOT_SOURCE & {*name.parts}))
    return _cut_between_files(root, (name for name in names if not any(part[0] == "." for part in name.parts)))


def _locate(source: str, path: Path) -> list[tuple[Path, str]]:
    files = PUBLIC[source]
    if len(files) == 1 and path.is_file():
        return [(path, sha256) for sha256 in files.values()]
    return [(path / Path(url).name, sha256) for url, sha256 in files.items()]


def _read_checked(path: Path, sha256: str) -> bytes:
    if not path.is_file():
        raise FileNotFoundError(
            f"expected {path}, got no such file; correct path=…, or leave it out and call prepare_data() to download it"
        )
    data = path.read_bytes()
    if (got := hashlib.sha256(data).hexdigest()) != sha256:
        raise ValueError(
            f"{path}: expected sha256 {sha256} of the public file, got {got}; if it was downloaded, delete it and download again; "
            "a text of your own goes in as the source, not as a path"
        )
    return data


def _cut(text: bytes) -> dict[str, bytes]:
    """Contiguous 90 / 5 / 5 %."""
    first, second = len(text) * 90 // 100, len(text) * 95 // 100
    return dict(zip(SPLITS, (text[:first], text[first:second], text[second:]), strict=True))


def _cut_between_files(root: Path, names: Iterable[Path]) -> dict[str, bytes]:
    """About 90 / 5 / 5 % of the bytes, each text file whole, in the order of the names' hashes."""
    ordered = sorted(names, key=lambda name: hashlib.sha256(name.as_posix().encode()).digest())
    texts = [data + b"\n" for name in ordered if _is_text(data := (root / name).read_bytes())]
    if not texts:
        raise ValueError(f"source: expected a folder with UTF-8 text files, got {str(root)!r} with none; add some")
    total, done = sum(map(len, texts)), 0
    splits: dict[str, list[bytes]] = {name: [] for name in SPLITS}
    for text in texts:
        middle = (done + len(text) / 2) / total
        splits[SPLITS[(middle >= 0.90) + (middle >= 0.95)]].append(text)
        done += len(text)
    return {name: b"".join(parts) for name, parts in splits.items()}


def _is_text(data: bytes) -> bool:
    try:
        return "\0" not in data.decode()
    except UnicodeDecodeError:
        return False
