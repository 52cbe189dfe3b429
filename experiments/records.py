"""The files that runs leave: JSON, each written whole or not at all, with what is needed to make it again."""

from __future__ import annotations

import datetime
import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "peft-s0",
    "trl",
    "datasets",
    "lm-eval",
    "flash-linear-attention",
    "mamba-ssm",
)


def versions() -> dict[str, str]:
    """Of Python and of the packages that figures depend on, where they are installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def device_name(device: torch.device | str) -> str:
    """What a device is called."""
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({platform.machine()})"


def write(path: Path, arguments: dict[str, Any], result: dict[str, Any], device: torch.device | str) -> dict[str, Any]:
    """Writes a record in one step: an interrupted run leaves no half of one."""
    record = {
        "arguments": arguments,
        "result": result,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(device),
        "versions": versions(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    part.replace(path)
    return record


def read(path: Path) -> dict[str, Any]:
    """A record."""
    return json.loads(path.read_text())


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """Which arguments of a record are not those that are wanted: "seed = 1, not 2"; nothing if all are."""
    wanted = json.loads(json.dumps(wanted))
    others = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    return ", ".join(f"{name} = {found.get(name)!r}, not {wanted.get(name)!r}" for name in others)


def done(path: Path, arguments: dict[str, Any]) -> dict[str, Any] | None:
    """The record of a run, if it is there.

    Raises:
        ValueError: If it was made with other arguments; they are named.
    """
    if not path.exists():
        return None
    record = read(path)
    if others := differences(record["arguments"], arguments):
        raise ValueError(f"{path} was made with {others}. Remove it, or write to another --output.")
    return record
