"""TRL's trainers that sample from the model while they train it: GRPO and RLOO, three steps each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import Architecture
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch import Tensor
from trainers import ARGUMENTS, logged, tokenizer, train, twin, words
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from tuned import tune

from peft_s0 import S0Config

# Of different lengths, so that they are padded on the left.
PROMPTS = Dataset.from_dict({"prompt": [words(2 + 3 * row, row) for row in range(4)]})


def even_words(completions: list[str], **kwargs: Any) -> list[float]:
    """The reward: how many words of a completion are even."""
    return [float(sum(word[1:].isdigit() and int(word[1:]) % 2 == 0 for word in text.split())) for text in completions]


class Recording:
    """Keeps what log-probabilities a trainer computed: whether to train on them, ids, mask, log-probabilities."""

    recorded: list[tuple[bool, Tensor, Tensor, Tensor]]

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, *args, **kwargs):
        found = super()._get_per_token_logps_and_entropies(model, input_ids, attention_mask, *args, **kwargs)
        vars(self).setdefault("recorded", []).append(
            (torch.is_grad_enabled(), input_ids, attention_mask.bool(), found[0].detach())
        )
        return found


class RecordingGRPOTrainer(Recording, GRPOTrainer):
    pass


class RecordingRLOOTrainer(Recording, RLOOTrainer):
    pass


@torch.no_grad()
def assert_as_of_rows_alone(model: PeftModel, ids: Tensor, mask: Tensor, logps: Tensor) -> None:
    """Log-probabilities of the completions in a batch padded on both sides are those of each row by itself."""
    assert bool((~mask[:, 0]).any()), "no row is padded on the left"
    for row, real, found in zip(ids, mask, logps, strict=True):
        alone = model(row[real][None]).logits.log_softmax(-1)[0]
        expected = alone[:-1].gather(1, row[real][1:, None]).squeeze(1)
        count = int(real[-len(found) :].sum())
        torch.testing.assert_close(found[:count], expected[-count:], atol=2e-5, rtol=0)


@pytest.mark.parametrize("reference", ["base", "ref"])
@pytest.mark.parametrize(
    ("trainer_class", "config_class", "arguments"),
    [(RecordingGRPOTrainer, GRPOConfig, {"steps_per_generation": 2}), (RecordingRLOOTrainer, RLOOConfig, {})],
    ids=["grpo", "rloo"],
)
def test_rl(
    architecture: Architecture, tmp_path: Path, trainer_class: Any, config_class: Any, arguments: Any, reference: str
) -> None:
    """States that are scaled otherwise in training: what samples, and what is trained on, is the training's model."""
    config = S0Config(alpha=0.5, train_alpha=1.0, init_weights=True if reference == "base" else 1.0)
    base = architecture.build()
    trainer = trainer_class(
        **({"model": base, "peft_config": config} if reference == "base" else {"model": get_peft_model(base, config)}),
        reward_funcs=even_words,
        args=config_class(
            output_dir=str(tmp_path),
            **{**ARGUMENTS, "per_device_train_batch_size": 8},
            **arguments,
            num_generations=4,
            max_completion_length=6,
            beta=0.1,
            temperature=1.0,
        ),
        train_dataset=PROMPTS,
        processing_class=tokenizer(),
    )
    assert list(trainer.model.peft_config) == (["default"] if reference == "base" else ["default", "ref"])
    before = twin(trainer, architecture)
    train(trainer)

    (_, ids, mask, old), _ = (entry for entry in trainer.recorded[:2] if not entry[0])
    assert_as_of_rows_alone(before, ids, mask, old)
    # The policy's and the reference's are the same before the first step, to the last bit.
    assert torch.equal(trainer.recorded[0][3], trainer.recorded[1][3])
    # The first step trains on rows of that generation, with a ratio of 1.
    _, trained_ids, trained_mask, new = next(entry for entry in trainer.recorded if entry[0])
    real = trained_mask[:, -new.shape[1] :]
    rows = [int((ids == row).all(1).nonzero()[0]) for row in trained_ids]
    torch.testing.assert_close((new - old[rows]).exp()[real], torch.ones(int(real.sum())), atol=1e-5, rtol=0)
    kl = logged(trainer, "kl")
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert abs(kl[-1]) > 1e-5


def test_generation_in_training_mode(architecture: Architecture) -> None:
    """Left-padded prompts, greedy: as the naive twin goes on, with the scale of training."""
    tuned, expected = tune(architecture, alpha=0.3, train_alpha=0.7), tune(architecture, alpha=0.7)
    prompts = [tuned.ids(1, length, seed=length)[0] for length in (2, 5, 9)]
    width = max(len(prompt) for prompt in prompts)
    ids = torch.stack([torch.cat([torch.zeros(width - len(prompt), dtype=torch.long), prompt]) for prompt in prompts])
    tuned.model.train()
    found = tuned.model.generate(
        input_ids=ids, attention_mask=(ids != 0).long(), do_sample=False, max_new_tokens=5, eos_token_id=None
    )
    for prompt, row in zip(prompts, found, strict=True):
        going_on = prompt[None]
        for _ in range(5):
            going_on = torch.cat([going_on, expected.expected(going_on)[:, -1:].argmax(-1)], dim=1)
        assert row[width:].tolist() == going_on[0, len(prompt) :].tolist()
