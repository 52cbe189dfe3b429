"""Tiny models in mlx-lm beside the same models in transformers, in float32 on a CPU."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, Architecture
from mlx_lm.utils import load_model
from torch import Tensor
from transformers import PreTrainedModel
from tuned import Tuned, tune

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

# What mlx-lm must be told of their configs: it reads those of models on the Hub, of which some are older.
NAMES: dict[str, dict[str, Any]] = {
    "qwen3_5": {"model_type": "qwen3_5"},
    "qwen3_5_moe": {"model_type": "qwen3_5_moe"},
    "qwen3_next": {"partial_rotary_factor": 0.25},
    "falcon_h1": {},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba"], "position_embedding_type": "nope"},
    "mamba2": {"intermediate_size": 128},
    "nemotron_h": {},
}


def for_mlx(architecture: Architecture) -> Architecture:
    """An architecture that mlx-lm runs as transformers do."""

    def config() -> Any:
        made = architecture.config()
        if architecture.name == "mamba2":
            made.n_groups = 1
        return made

    return dataclasses.replace(architecture, config=config)


ROWS = {row.name: for_mlx(row) for row in ARCHITECTURES if row.name in NAMES}


def save_for_mlx(model: PreTrainedModel, folder: Path, **changes: Any) -> Path:
    """A model's folder as mlx-lm loads it."""
    # On the Hub, the experts of Qwen3.5 are one tensor.
    model.save_pretrained(folder, save_original_format=changes.get("model_type") != "qwen3_5_moe")
    config = json.loads((folder / "config.json").read_text())
    theta = (config.get("rope_parameters") or {}).get("rope_theta")
    if theta is not None:
        config["rope_theta"] = theta
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


@dataclass
class Case:
    """One architecture with random states, and the base model in mlx-lm."""

    name: str
    tuned: Tuned
    model: Any

    def logits(self, ids: Tensor, cache: list[Any] | None = None) -> Tensor:
        """Of mlx-lm, float32 [rows, tokens, vocabulary]."""
        return torch.from_numpy(np.array(self.model(mx.array(ids.numpy()), cache=cache).astype(mx.float32)))


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The base models, by the names of the table."""
    folder = tmp_path_factory.mktemp("mlx")
    return {name: save_for_mlx(ROWS[name].build(), folder / name, **NAMES[name]) for name in NAMES}


@pytest.fixture
def make_case(folders: dict[str, Path]) -> Callable[..., Case]:
    """Makes a case from an architecture's name and fields of S0Config."""

    def make(name: str, **config: Any) -> Case:
        return Case(name, tune(ROWS[name], **config), load_model(folders[name])[0])

    return make


@pytest.fixture(params=NAMES)
def case(request: pytest.FixtureRequest, make_case: Callable[..., Case]) -> Case:
    return make_case(request.param)
