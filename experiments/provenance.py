"""What made a result: the machine, and the code."""

from __future__ import annotations

import hashlib
import platform
import re
from pathlib import Path

import torch

import liegroup_attn

__all__ = ["code_hash", "device_name"]


def code_hash(package: Path = Path(liegroup_attn.__file__).parent) -> str:
    """Of a folder's source, by default the library's."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def device_name(device: torch.device) -> str:
    """Model of the GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return match.group(1) if match else platform.processor() or platform.machine()
