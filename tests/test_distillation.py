"""TRL's trainers that follow a teacher: Distillation and GKD, three steps each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import Architecture
from datasets import Dataset
from torch import Tensor, nn
from trainers import ARGUMENTS, logged, tokenizer, train, twin, words
from trl import DistillationConfig, DistillationTrainer

from peft_s0 import S0Config


@torch.no_grad()
def divergence(student: nn.Module, teacher: nn.Module, ids: Tensor, mask: Tensor, counts: Tensor) -> float:
    """KL(student || teacher), the mean over the tokens that count, from each row by itself.

    Args:
        student: what is trained.
        teacher: what it follows.
        ids: [rows, tokens].
        mask: bool [rows, tokens], False at pads.
        counts: bool [rows, tokens], the tokens whose prediction counts.
    """
    found = []
    for row, real, counting in zip(ids, mask, counts, strict=True):
        of_student, of_teacher = (model(row[real][None]).logits.log_softmax(-1)[0, :-1] for model in (student, teacher))
        found.append((of_student.exp() * (of_student - of_teacher)).sum(-1)[counting[real][1:]])
    return float(torch.cat(found).mean())


class RecordingDistillationTrainer(DistillationTrainer):
    """Keeps the first batch that it trains on."""

    def _compute_loss(self, unwrapped_student, inputs, num_items_in_batch):
        vars(self).setdefault("first", inputs)
        return super()._compute_loss(unwrapped_student, inputs, num_items_in_batch)


def test_distillation(architecture: Architecture, tmp_path: Path) -> None:
    """On what the student samples, through the model inside of the PeftModel."""
    teacher = architecture.build(seed=1)
    trainer = RecordingDistillationTrainer(
        model=architecture.build(),
        teacher_model=teacher,
        args=DistillationConfig(output_dir=str(tmp_path), max_completion_length=6, beta=1.0, **ARGUMENTS),
        train_dataset=Dataset.from_dict({"prompt": [words(2 + 3 * row, row) for row in range(4)]}),
        processing_class=tokenizer(),
        peft_config=S0Config(alpha=1.0, init_weights=1.0),
    )
    before = twin(trainer, architecture)
    train(trainer)
    batch = trainer.first
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1).bool()
    counts = torch.cat([torch.zeros_like(batch["prompt_mask"]), batch["completion_mask"]], dim=1).bool()
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    assert bool((~mask[:, 0]).any()), "no row is padded on the left"
    assert logged(trainer)[0] == pytest.approx(divergence(before, teacher, ids, mask, counts), rel=1e-5)


@pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'")
@pytest.mark.parametrize("on_policy", [0.0, 1.0], ids=["off_policy", "on_policy"])
def test_gkd(architecture: Architecture, tmp_path: Path, on_policy: float) -> None:
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    class RecordingGKDTrainer(GKDTrainer):
        def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            vars(self).setdefault("first", (inputs, int(kwargs["num_items_in_batch"])))
            return super().compute_loss(model, inputs, *args, **kwargs)

    teacher = architecture.build(seed=1)
    turns = [
        [
            {"role": "user", "content": words(2 + 3 * row, row)},
            {"role": "assistant", "content": words(8 - row, 9 + row)},
        ]
        for row in range(4)
    ]
    trainer = RecordingGKDTrainer(
        model=architecture.build(),
        teacher_model=teacher,
        args=GKDConfig(
            output_dir=str(tmp_path), lmbda=on_policy, beta=1.0, max_new_tokens=6, max_length=64, **ARGUMENTS
        ),
        train_dataset=Dataset.from_dict({"messages": turns}),
        processing_class=tokenizer(),
        peft_config=S0Config(alpha=1.0, init_weights=1.0),
    )
    before = twin(trainer, architecture)
    train(trainer)
    batch, divisor = trainer.first
    counts = batch["labels"] != -100
    mean = divergence(before, teacher, batch["input_ids"], batch["attention_mask"].bool(), counts)
    # TRL divides by the number of tokens in the data, also where it trains on the student's own.
    assert logged(trainer)[0] == pytest.approx(mean * int(counts.sum()) / divisor, rel=1e-5)
    if not on_policy:
        assert logged(trainer)[2] < logged(trainer)[0]
