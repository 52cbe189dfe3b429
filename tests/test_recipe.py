"""The recipe of the paper's authors through trainers: the states of a plain loop, for both means of the loss."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from architectures import Architecture
from datasets import Dataset
from peft import get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from trainers import ARGUMENTS, copies, logged, sft, token_rows, tokenizer, weights
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import DPOConfig, DPOTrainer

from peft_s0 import S0Config
from peft_s0.training import average_over_examples

L2_LAMBDA = 5e-4
STEPS = (1, 5, 20)
ROWS = 4
# So that the states move the loss enough for gradients to be clipped.
CONFIG = {"alpha": 4.0}


def plain_loop(architecture: Architecture, mean: str) -> dict[int, list[Tensor]]:
    """Adam at 1e-3, all rows in each step and one at a time, loss and penalty clipped to a norm of 1 together.

    Returns:
        The states after so many steps.
    """
    model = get_peft_model(architecture.build(), S0Config(**CONFIG, l2_lambda=0.0)).train()
    rows, parameters, found = token_rows(ROWS), weights(model), {}
    optimizer = torch.optim.Adam(parameters, lr=1e-3)
    tokens = sum(label != -100 for row in rows for label in row["labels"][1:])
    for step in range(1, max(STEPS) + 1):
        optimizer.zero_grad()
        for row in rows:
            logits = model(torch.tensor([row["input_ids"]]), use_cache=False).logits[0, :-1]
            labels = torch.tensor(row["labels"][1:])
            if mean == "tokens":
                loss = cross_entropy(logits, labels, reduction="sum") / tokens
            else:
                loss = cross_entropy(logits, labels) / len(rows)
            loss.backward()
        (L2_LAMBDA * sum(parameter.square().sum() for parameter in parameters)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step in STEPS:
            found[step] = copies(parameters)
    return found


class Snapshots(TrainerCallback):
    """Keeps the states after so many steps."""

    def __init__(self) -> None:
        self.found: dict[int, list[Tensor]] = {}

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        if state.global_step in STEPS:
            self.found[state.global_step] = copies(weights(model))


@pytest.fixture(scope="module")
def expected() -> Callable[[Architecture, str], dict[int, list[Tensor]]]:
    """The plain loop, run once for each architecture and mean."""
    return cache(plain_loop)


@pytest.mark.parametrize("mean", ["tokens", "examples"])
@pytest.mark.parametrize("name", ["sft", "plain"])
def test_states_of_a_plain_loop(
    architecture: Architecture,
    expected: Callable[[Architecture, str], dict[int, list[Tensor]]],
    tmp_path: Path,
    name: str,
    mean: str,
) -> None:
    rows, snapshots = token_rows(ROWS), Snapshots()
    arguments = {
        **ARGUMENTS,
        "max_steps": max(STEPS),
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": ROWS,
    }
    config, callbacks = S0Config(**CONFIG, l2_lambda=L2_LAMBDA), [snapshots]
    if name == "sft":
        trainer = sft(architecture, tmp_path, config, train_dataset=rows, callbacks=callbacks, **arguments)
    else:
        trainer = Trainer(
            model=get_peft_model(architecture.build(), config),
            args=TrainingArguments(output_dir=str(tmp_path), **arguments),
            train_dataset=rows,
            callbacks=callbacks,
        )
    if mean == "examples":
        average_over_examples(trainer)
    trainer.train()
    assert all(norm > 1 for norm in logged(trainer, "grad_norm")), "nothing was clipped"
    found, other = snapshots.found, expected(architecture, {"tokens": "examples", "examples": "tokens"}[mean])
    for step, states in expected(architecture, mean).items():
        for a, b in zip(found[step], states, strict=True):
            # Rounding, of which Adam makes the most, is below 1e-5; without the penalty they differ by 6e-4.
            torch.testing.assert_close(a, b, atol=5e-5, rtol=0)
        assert max(float((a - b).abs().max()) for a, b in zip(found[step], other[step], strict=True)) > 1e-3


def test_mean_over_examples_where_it_cannot_be(architecture: Architecture, tmp_path: Path) -> None:
    for arguments, message in (
        ({"per_device_train_batch_size": 4}, r"per_device_train_batch_size=1 and packing=False, found 4 and False"),
        ({"per_device_train_batch_size": 1, "packing": True, "max_length": 24}, "found 1 and True"),
    ):
        with pytest.raises(ValueError, match=message):
            average_over_examples(sft(architecture, tmp_path, **arguments))
    preferences = Dataset.from_dict({"prompt": ["w5"], "chosen": [" w6"], "rejected": [" w7"]})
    args = DPOConfig(output_dir=str(tmp_path), **{**ARGUMENTS, "per_device_train_batch_size": 1})
    trainer = DPOTrainer(
        architecture.build(), args=args, train_dataset=preferences, processing_class=tokenizer(), peft_config=S0Config()
    )
    with pytest.raises(ValueError, match="this DPOTrainer computes its loss in a way of its own"):
        average_over_examples(trainer)
