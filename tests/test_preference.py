"""TRL's trainers on preferences: DPO, KTO and Reward, three steps each."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from architectures import ARCHITECTURES, Architecture
from datasets import Dataset, load_from_disk
from peft import PeftModel, get_peft_model
from torch.nn.functional import logsigmoid
from trainers import ARGUMENTS, logged, tokenizer, train, words
from transformers import AutoModelForSequenceClassification
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer

from peft_s0 import S0Config


def pairs(rows: int = 4) -> Dataset:
    """Prompts of different lengths, so that rows are padded, each with a better and a worse answer."""
    return Dataset.from_dict(
        {
            "prompt": [words(3 + 2 * row, row) for row in range(rows)],
            "chosen": [" " + words(3 + row, 10 + row) for row in range(rows)],
            "rejected": [" " + words(6 - row, 20 + row) for row in range(rows)],
        }
    )


def with_adapter(architecture: Architecture, reference: str) -> dict[str, Any]:
    """What a trainer is given to train a new adapter, or states that are there."""
    if reference == "base":
        return {"model": architecture.build(), "peft_config": S0Config(alpha=1.0)}
    return {"model": get_peft_model(architecture.build(), S0Config(alpha=1.0, init_weights=1.0))}


def assert_reference_is_a_copy(model: PeftModel) -> None:
    assert list(model.peft_config) == ["default", "ref"]
    parameters = dict(model.named_parameters())
    names = [name for name in parameters if "s0_state.default." in name]
    assert names
    for name in names:
        assert torch.equal(parameters[name], parameters[name.replace(".default.", ".ref.")])


@pytest.mark.parametrize(
    ("reference", "arguments"),
    [("base", {}), ("ref", {}), ("ref", {"precompute_ref_log_probs": True}), ("ref", {"loss_type": ["ipo"]})],
    ids=["base", "ref", "ref_precomputed", "ref_ipo"],
)
def test_dpo(architecture: Architecture, tmp_path: Path, reference: str, arguments: dict[str, Any]) -> None:
    """Against the base model for a new adapter, against a copy for states that are trained on."""
    trainer = DPOTrainer(
        **with_adapter(architecture, reference),
        args=DPOConfig(output_dir=str(tmp_path), **ARGUMENTS, **arguments),
        train_dataset=pairs(),
        processing_class=tokenizer(),
    )
    if reference == "ref":
        assert_reference_is_a_copy(trainer.model)
    train(trainer)
    losses = logged(trainer)
    # IPO: (margin / length - 1 / (2 beta))^2 with beta = 0.1.
    assert losses[0] == pytest.approx(25.0 if arguments.get("loss_type") else math.log(2), rel=1e-6)
    assert losses[0] > losses[1] > losses[2]
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert logged(trainer, name)[0] == pytest.approx(0, abs=1e-6)
    margins = logged(trainer, "rewards/margins")
    assert margins[0] < margins[1] < margins[2]


def test_what_precomputed_references_miss(architecture: Architecture, tmp_path: Path) -> None:
    """As the docs say: `train_alpha`, and the alpha of a second training on the same states. ln 2 is right."""
    pairs().save_to_disk(tmp_path / "data")

    def first_loss(**config: Any) -> float:
        torch.manual_seed(0)
        trainer = DPOTrainer(
            get_peft_model(architecture.build(), S0Config(init_weights=1.0, **config)),
            args=DPOConfig(output_dir=str(tmp_path), precompute_ref_log_probs=True, **{**ARGUMENTS, "max_steps": 1}),
            train_dataset=load_from_disk(tmp_path / "data"),
            processing_class=tokenizer(),
        )
        trainer.train()
        return logged(trainer)[0]

    right = pytest.approx(math.log(2), rel=1e-6)
    assert first_loss(alpha=0.3) == right
    assert first_loss(alpha=1.0) != right
    datasets.disable_caching()
    try:
        assert first_loss(alpha=1.0) == right
        assert first_loss(alpha=0.3, train_alpha=1.0) != right
    finally:
        datasets.enable_caching()


@pytest.mark.parametrize("reference", ["base", "ref"])
def test_kto(architecture: Architecture, tmp_path: Path, reference: str) -> None:
    data = pairs()
    answers = {
        "prompt": [*data["prompt"], *data["prompt"]],
        "completion": [*data["chosen"], *data["rejected"]],
        "label": [True] * len(data) + [False] * len(data),
    }
    trainer = KTOTrainer(
        **with_adapter(architecture, reference),
        args=KTOConfig(output_dir=str(tmp_path), **{**ARGUMENTS, "per_device_train_batch_size": 8}),
        train_dataset=Dataset.from_dict(answers),
        processing_class=tokenizer(),
    )
    if reference == "ref":
        assert_reference_is_a_copy(trainer.model)
    train(trainer)
    losses = logged(trainer)
    assert losses[0] == pytest.approx(0.5, abs=1e-6)
    assert losses[0] > losses[1] > losses[2]
    for name in ("kl", "rewards/chosen", "rewards/rejected"):
        assert logged(trainer, name)[0] == pytest.approx(0, abs=1e-6)
    assert logged(trainer, "rewards/margins")[2] > 0


# transformers has no classifier on FalconH1; Zamba2 has the same recurrence.
@pytest.mark.parametrize("name", ["qwen3_5", "zamba2"])
def test_reward(tmp_path: Path, name: str) -> None:
    """The states and the score head, which is trained and saved whole."""
    architecture = next(entry for entry in ARCHITECTURES if entry.name == name)
    torch.manual_seed(0)
    config = architecture.config()
    config.num_labels = 1
    base = AutoModelForSequenceClassification.from_config(config)
    trainer = RewardTrainer(
        model=copy.deepcopy(base),
        args=RewardConfig(output_dir=str(tmp_path), **ARGUMENTS),
        train_dataset=pairs(),
        processing_class=tokenizer(),
        peft_config=S0Config(alpha=1.0, init_weights=1.0, modules_to_save=["score"]),
    )
    before = copy.deepcopy(trainer.model)

    def rewards(answer: str) -> torch.Tensor:
        rows = [tokenizer()(row["prompt"] + row[answer] + "<eos>", return_tensors="pt") for row in pairs()]
        return torch.stack([before(row["input_ids"]).logits.squeeze() for row in rows])

    with torch.no_grad():
        expected = float(-logsigmoid(rewards("chosen") - rewards("rejected")).mean())
    train(trainer)
    losses = logged(trainer)
    assert losses[0] == pytest.approx(expected, rel=1e-5)
    assert losses[0] > losses[1] > losses[2]
    trainer.save_model(str(tmp_path / "adapter"))
    ids = torch.tensor([[5, 6, 7, 8]])
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.equal(loaded(ids).logits, trainer.model.eval()(ids).logits)
