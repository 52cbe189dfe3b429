"""TRL's SFTTrainer: however it lays rows out, masks, accumulates and checkpoints, the losses and states are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import Architecture
from datasets import Dataset
from torch import Tensor
from trainers import copies, logged, reload, sft, states, token_rows, tokenizer, train, weights, words

from peft_s0 import S0Config


def run(architecture: Architecture, folder: Path, **arguments: Any) -> tuple[list[float], list[Tensor]]:
    """Losses and states after three steps."""
    trainer = sft(architecture, folder, S0Config(alpha=1.0, init_weights=0.5), **arguments)
    train(trainer)
    return logged(trainer), states(trainer)


def assert_same(found: tuple[list[float], list[Tensor]], expected: tuple[list[float], list[Tensor]]) -> None:
    assert len(expected[0]) == 3
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    for a, b in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


@pytest.fixture
def padded(architecture: Architecture, tmp_path: Path) -> tuple[list[float], list[Tensor]]:
    """All eight rows in every step."""
    return run(architecture, tmp_path / "padded", per_device_train_batch_size=8)


@pytest.mark.parametrize(
    "arguments",
    [
        {"padding_free": True, "max_length": None},
        {"packing": True, "packing_strategy": "bfd", "max_length": 24},
        {"packing": True, "packing_strategy": "bfd_split", "max_length": 24},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"packing": True, "max_length": 24, "gradient_checkpointing": True},
    ],
    ids=["padding_free", "bfd", "bfd_split", "accumulation", "reentrant", "not_reentrant", "bfd_checkpointing"],
)
def test_rows_in_every_layout(
    architecture: Architecture, padded: tuple[list[float], list[Tensor]], tmp_path: Path, arguments: dict[str, Any]
) -> None:
    assert_same(run(architecture, tmp_path / "other", **{"per_device_train_batch_size": 8, **arguments}), padded)
