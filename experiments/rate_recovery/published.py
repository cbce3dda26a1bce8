"""Two published generators of amino acids, to be downloaded."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

__all__ = ["PUBLISHED", "download_generator"]

_PAML = "https://raw.githubusercontent.com/abacus-gene/paml"
# name → (address, sha256 of the text with \n at the ends of lines: distributions differ in those alone)
PUBLISHED = {
    "lg": (
        f"{_PAML}/1121cf84e4b79df31babef8644cfe546e18b13c8/dat/lg.dat",
        "bf05bee9a1917601feb688e6729a63205289b4324486ae2194333f181811cf44",
    ),
    "wag": (
        f"{_PAML}/68aced0e38be634b32ade65b999e58d7f60fecc3/wag.dat",
        "600e4392a09fb9471dc346b1a58bbd7158748a2e9635430db481ecddc7f2e9a9",
    ),
}


def download_generator(name: str, folder: Path) -> Path:
    """The file of a published generator, fetched if ``folder`` lacks it, its hash checked either way.

    Args:
        name: one of ``PUBLISHED``: ``"lg"`` (Le and Gascuel 2008) or ``"wag"`` (Whelan and Goldman 2001).
        folder: where downloads are kept.

    Returns:
        Its path.

    Raises:
        ValueError: unknown name, or the wrong hash; what arrived is then not kept.
        ConnectionError: nothing arrived.
    """
    if name not in PUBLISHED:
        raise ValueError(f"name: expected one of {sorted(PUBLISHED)}, got {name!r}; check the spelling")
    url, sha256 = PUBLISHED[name]
    target = folder / Path(url).name
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix(".part")
        try:
            torch.hub.download_url_to_file(url, str(part), progress=False)
        except OSError as error:
            raise ConnectionError(
                f"expected to download {url}, got {error!r}; check the network, or pass path=… with a local copy"
            ) from error
        _check_hash(part, sha256)
        part.replace(target)
    _check_hash(target, sha256)
    return target


def _check_hash(path: Path, sha256: str) -> None:
    got = hashlib.sha256(path.read_bytes().replace(b"\r\n", b"\n")).hexdigest()
    if got != sha256:
        path.unlink()
        raise ValueError(f"{path}: expected sha256 {sha256}, got {got}; it was deleted, try again to download it anew")
