"""Tiny models in llama.cpp, converted by its own converter, beside the same models in transformers."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["GGML_NO_BACKTRACE"] = "1"

import pytest
from architectures import ARCHITECTURES, Architecture
from tuned import Tuned, tune

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
sys.path.insert(0, str(EXAMPLES))
LLAMA_CPP = Path(os.environ.get("LLAMA_CPP", ROOT / ".venv-llama" / "src" / "vendor" / "llama.cpp"))

# By the names of the table: what their GGUF files call them.
NAMES = {
    "mamba2": "mamba2",
    "falcon_h1": "falcon-h1",
    "granitemoehybrid": "granitehybrid",
    "nemotron_h": "nemotron_h",
    "qwen3_5": "qwen35",
    "qwen3_5_moe": "qwen35moe",
    "qwen3_next": "qwen3next",
}


def for_llama_cpp(architecture: Architecture) -> Architecture:
    """An architecture that llama.cpp runs: it knows heads only whose keys are as long as their values."""

    def config() -> Any:
        made = architecture.config()
        if hasattr(made, "linear_value_head_dim"):
            made.linear_value_head_dim = made.linear_key_head_dim
        return made

    return dataclasses.replace(architecture, config=config)


ROWS = {row.name: for_llama_cpp(row) for row in ARCHITECTURES if row.name in NAMES}


@pytest.fixture(scope="session")
def ggufs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny models' files, by the names of the table, and that of the examples' model as "example"."""
    folder = tmp_path_factory.mktemp("ggufs")
    paths: list[Path] = []
    for name, row in ROWS.items():
        row.build().save_pretrained(folder / name)
        paths += [folder / name, folder / f"{name}.gguf"]
    paths += [EXAMPLES / "models" / "tiny-qwen3.5", folder / "example.gguf"]
    run = subprocess.run(
        [sys.executable, str(EXAMPLES / "miniature" / "to_gguf.py"), str(LLAMA_CPP), *map(str, paths)],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return {file.stem: file for file in paths[1::2]}


@dataclass
class Case:
    """One architecture with random states, and its GGUF."""

    tuned: Tuned
    gguf: Path


@pytest.fixture
def make_case(ggufs: dict[str, Path]) -> Callable[..., Case]:
    """Makes a case from an architecture's name and fields of S0Config."""

    def make(name: str, **config: Any) -> Case:
        return Case(tune(ROWS[name], **config), ggufs[name])

    return make


@pytest.fixture(params=NAMES)
def case(request: pytest.FixtureRequest, make_case: Callable[..., Case]) -> Case:
    return make_case(request.param)
