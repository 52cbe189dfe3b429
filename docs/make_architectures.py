"""Write docs/architectures.md from the declarations, the configs of public checkpoints and the results of the tests.

python -m pytest tests/test_law.py tests/test_gradients.py -n 2 --junitxml=laws.xml
python docs/make_architectures.py laws.xml

`docs/checkpoints.json` holds one checkpoint for each row of `tests/architectures.py`: its id on the Hub, where its
config was read, and of that config what fixes the recurrent layers, or what the config class asks for, named as the
config class in transformers names it. What is not listed is the class's default. Leave a row out rather than guess.
"""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from architectures import ARCHITECTURES, Architecture, mixers  # noqa: E402

from peft_s0.mixers import find_mixer, registered_mixers  # noqa: E402

PAGE = ROOT / "docs" / "architectures.md"
CHECKPOINTS: dict[str, dict[str, Any]] = json.loads((ROOT / "docs" / "checkpoints.json").read_text())

HEAD = """# Architectures

Written by `docs/make_architectures.py` from the declarations in `peft_s0/mixers`, the results of `tests/test_law.py`
and `tests/test_gradients.py`, and what public checkpoints have in their configs. [`checkpoints.json`](checkpoints.json)
holds that, and where it was read: in the config itself, in a copy, or where others report it. An architecture without a
known checkpoint shows no sizes.

A state has the shape [heads, ...] as the kernel takes it. S0 at full rank has as many parameters as the states of all
recurrent layers together, and keeps them in float32 (1 MB is 10^6 bytes). A law is one test function, run on a tiny
model of the architecture; what a base model itself cannot do is named below. Offsets: whether `variant="offset"` and
`"both"` can be had; the laws of these are in `tests/test_offset.py`.

"""
COLUMNS = (
    "architecture",
    "model",
    "recurrent layer",
    "checkpoint",
    "state of a layer",
    "layers",
    "S0 parameters",
    "file",
    "alpha",
    "offsets",
    "laws held",
)


def results(file: Path) -> dict[str, str]:
    """How many laws each architecture holds, of those that were asked of it."""
    laws: dict[str, dict[str, bool]] = {row.name: {} for row in ARCHITECTURES}
    for case in ElementTree.parse(file).iter("testcase"):
        law, _, variant = case.get("name", "").partition("[")
        name = re.split(r"[-\]]", variant)[0]
        if name in laws and case.find("skipped") is None:
            failed = case.find("failure") is not None or case.find("error") is not None
            laws[name][law] = laws[name].get(law, True) and not failed
    return {name: f"{sum(held.values())} of {len(held)}" for name, held in laws.items()}


def recurrent_layers(row: Architecture, config: Any) -> list[nn.Module]:
    """The recurrent layers of a model, which takes no memory."""
    with torch.device("meta"):
        return mixers(row.model_class(config))


def checkpoint_config(row: Architecture) -> Any:
    """The config of an architecture's checkpoint, as far as its recurrent layers go."""
    return type(row.config())(**CHECKPOINTS[row.name]["config"])


def states(layers: list[nn.Module]) -> list[tuple[int, ...]]:
    """The shapes of the states of recurrent layers."""
    return [find_mixer(type(layer)).state_shape(layer) for layer in layers]


def millions(number: int) -> str:
    """A number in millions: one decimal, three where there is less than a million."""
    return f"{number / 1e6:.{1 if number >= 1e6 else 3}f}"


def sizes(row: Architecture) -> tuple[str, ...]:
    """Checkpoint, state of a layer, number of layers, parameters and file size."""
    if row.name not in CHECKPOINTS:
        return ("none known", "", "", "", "")
    shapes = states(recurrent_layers(row, checkpoint_config(row)))
    parameters = sum(map(math.prod, shapes))
    checkpoint = CHECKPOINTS[row.name]["checkpoint"]
    return (
        f"[{checkpoint}](https://huggingface.co/{checkpoint})",
        ", ".join(" x ".join(map(str, shape)) for shape in dict.fromkeys(shapes)),
        str(len(shapes)),
        f"{millions(parameters)} M",
        f"{millions(4 * parameters)} MB",
    )


def cells(row: Architecture, held: str) -> tuple[str, ...]:
    """One line of the table."""
    layer = type(recurrent_layers(row, row.config())[0])
    mixer = find_mixer(layer)
    family, model = mixer.family, row.model_class.__name__
    offsets = "no" if mixer.readout is None else "yes"
    return (f"`{row.name}`", model, f"{layer.__name__} ({family.name})", *sizes(row), str(family.alpha), offsets, held)


def table(header: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    return "".join("| " + " | ".join(line) + " |\n" for line in (header, ("---",) * len(header), *lines))


def limits() -> str:
    """What base models cannot do: an item for each architecture and reason."""
    laws: dict[tuple[str, str], list[str]] = {}
    for row in ARCHITECTURES:
        for law, reason in row.lacks:
            laws.setdefault((row.name, reason), []).append(law.replace("_", " "))
    return "".join(f"- `{name}`: {reason} ({', '.join(names)}).\n" for (name, reason), names in laws.items())


def other_layers() -> list[tuple[str, ...]]:
    """The declared layers that no row of the table has."""
    shown = {find_mixer(type(layer)) for row in ARCHITECTURES for layer in recurrent_layers(row, row.config())}
    rest = [mixer for mixer in registered_mixers() if mixer not in shown]
    return [(f"`{mixer.path}`", mixer.family.name, str(mixer.family.alpha)) for mixer in rest]


def page(held: dict[str, str]) -> str:
    """The page, from what the tests found for each architecture."""
    return (
        HEAD
        + table(COLUMNS, [cells(row, held[row.name]) for row in ARCHITECTURES])
        + "\n## Layers of other packages\n\nTested in `tests/kernels`. They take no offsets.\n\n"
        + table(("layer", "recurrence", "alpha"), other_layers())
        + "\n## What base models cannot do\n\n"
        + limits()
    )


if __name__ == "__main__":
    PAGE.write_text(page(results(Path(sys.argv[1]))))
