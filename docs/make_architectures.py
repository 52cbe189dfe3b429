"""Write docs/architectures.md from the declarations, the public configurations and the results of the tests.

python -m pytest tests/test_law.py tests/test_gradients.py -n 2 --junitxml=laws.xml
python docs/make_architectures.py laws.xml
"""

from __future__ import annotations

import math
import re
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from architectures import ARCHITECTURES, Architecture, mixers  # noqa: E402

from peft_s0.mixers import find_mixer  # noqa: E402

HEAD = """# Architectures

Written by `docs/make_architectures.py` from the declarations in `peft_s0/mixers` and the results of `tests/test_law.py`
and `tests/test_gradients.py`. Shapes and numbers are those at the defaults of the model's configuration class in
transformers, not of a checkpoint: a state has the shape [heads, ...] as the kernel takes it, and
S0 has as many parameters as all states together (Qwen3.5-4B: 24 layers, 12.6 M; FalconH1-7B: 44 layers, 34.6 M). A law
is one test function; what a base model itself cannot do is named below the table.

| model | recurrent layer | state of a layer | layers | S0 parameters | alpha | laws held |
| --- | --- | --- | --- | --- | --- | --- |
"""


def results(file: Path) -> dict[str, dict[str, Counter[str]]]:
    """Outcomes by architecture and law."""
    outcomes: dict[str, dict[str, Counter[str]]] = {}
    for case in ElementTree.parse(file).iter("testcase"):
        law, _, variant = case.get("name", "").partition("[")
        rows = [row.name for row in ARCHITECTURES if re.match(rf"{row.name}\b(?!_)", variant)]
        for name in rows[:1]:
            outcome = "failed" if case.find("failure") is not None or case.find("error") is not None else "passed"
            outcome = "skipped" if case.find("skipped") is not None else outcome
            outcomes.setdefault(name, {}).setdefault(law, Counter())[outcome] += 1
    return outcomes


def line(row: Architecture, laws: dict[str, Counter[str]]) -> str:
    """One line of the table."""
    with torch.device("meta"):
        # Qwen4-Exp's defaults make no model; its line shows the tiny one of the tests.
        config = row.config() if row.name.startswith("qwen4") else type(row.config())()
        found = mixers(row.model_class(config))
    declaration = find_mixer(type(found[0]))
    shapes = [declaration.state_shape(mixer) for mixer in found]
    parameters = sum(math.prod(shape) for shape in shapes)
    held = sum(counts["passed"] > 0 and not counts["failed"] for counts in laws.values())
    asked = sum(counts["passed"] + counts["failed"] > 0 for counts in laws.values())
    sizes = (" x ".join(map(str, shapes[0])), len(found), f"{parameters / 1e6:.1f} M")
    cells = (
        row.model_class.__name__ + (" (tiny)" if row.name.startswith("qwen4") else ""),
        f"{type(found[0]).__name__} ({declaration.family.name})",
        *sizes,
        declaration.family.alpha,
        f"{held} of {asked}",
    )
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    """Write the page."""
    outcomes = results(Path(sys.argv[1]))
    lines = [line(row, outcomes[row.name]) for row in ARCHITECTURES]
    limits = [f"- **{row.name}**, {law.replace('_', ' ')}: {why}." for row in ARCHITECTURES for law, why in row.lacks]
    page = HEAD + "\n".join(lines) + "\n\n## What base models cannot do\n\n" + "\n".join(limits) + "\n"
    (ROOT / "docs" / "architectures.md").write_text(page)


if __name__ == "__main__":
    main()
