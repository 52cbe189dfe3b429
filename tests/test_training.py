"""Training: the penalty, plain loops, transformers' Trainer and TRL's SFTTrainer."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from architectures import Architecture
from conftest import Tuned, tune
from datasets import Dataset
from peft import PeftModel
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from peft_s0 import S0Config

LAMBDA = 0.25


def weights(model) -> list[torch.nn.Parameter]:
    return [p for name, p in model.named_parameters() if "s0_state" in name]


def step_of(tuned: Tuned, ids: torch.Tensor) -> None:
    tuned.model(ids).logits.square().mean().backward()


def penalised(architecture: Architecture, **config: object) -> tuple[Tuned, Tuned]:
    """The same states with the penalty and without."""
    with_penalty = tune(architecture, l2_lambda=LAMBDA, **config)
    without = tune(architecture, l2_lambda=0.0, **config)
    return with_penalty, without


def difference(with_penalty: Tuned, without: Tuned) -> list[torch.Tensor]:
    return [a.grad - b.grad for a, b in zip(weights(with_penalty.model), weights(without.model), strict=True)]


@pytest.mark.parametrize("backwards", [1, 4])
def test_penalty_is_added_once_for_each_step(architecture: Architecture, backwards: int) -> None:
    """Whatever the number of accumulated batches; again after the step, and after the gradient is cleared."""
    pair = penalised(architecture)
    ids = pair[0].ids(2, 9)
    for to_none in (True, False):
        optimizers = [torch.optim.SGD(weights(tuned.model), lr=1e-3) for tuned in pair]
        for tuned in pair:
            for _ in range(backwards):
                step_of(tuned, ids)
        for weight, found in zip(weights(pair[0].model), difference(*pair), strict=True):
            torch.testing.assert_close(found, 2 * LAMBDA * weight.detach(), atol=1e-5, rtol=1e-4)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=to_none)
        for a, b in zip(weights(pair[0].model), weights(pair[1].model), strict=True):
            with torch.no_grad():
                b.copy_(a)


def test_penalty_with_two_forwards_in_one_backward(architecture: Architecture) -> None:
    pair = penalised(architecture)
    ids = pair[0].ids(2, 9)
    for tuned in pair:
        (tuned.model(ids).logits.mean() + tuned.model(ids[:1]).logits.mean()).backward()
    for weight, found in zip(weights(pair[0].model), difference(*pair), strict=True):
        torch.testing.assert_close(found, 2 * LAMBDA * weight.detach(), atol=1e-5, rtol=1e-4)


def test_penalty_survives_copies(architecture: Architecture) -> None:
    pair = penalised(architecture)
    ids = pair[0].ids(2, 9)
    step_of(pair[0], ids)
    pair[0].model.zero_grad()
    copied = copy.deepcopy(pair[0].model)
    pair[0].model = copied
    gc.collect()
    for tuned in pair:
        step_of(tuned, ids)
    for weight, found in zip(weights(copied), difference(*pair), strict=True):
        torch.testing.assert_close(found, 2 * LAMBDA * weight.detach(), atol=1e-5, rtol=1e-4)


def test_penalty_on_a_low_rank_state_is_that_of_the_state(architecture: Architecture) -> None:
    pair = penalised(architecture, rank=2)
    ids = pair[0].ids(2, 9)
    for tuned in pair:
        step_of(tuned, ids)
    layers = list(pair[0].model.base_model.tuner_layers())
    for layer, found in zip(layers, difference(*pair), strict=True):
        state = layer.s0_state["default"]
        weight = state.weight.detach().requires_grad_()
        (LAMBDA * state.compose(weight).square().sum()).backward()
        torch.testing.assert_close(found, weight.grad, atol=1e-4, rtol=1e-4)


def dataset(tuned: Tuned, rows: int = 8) -> Dataset:
    ids = [tuned.ids(1, 4 + 2 * i, seed=i)[0].tolist() for i in range(rows)]
    return Dataset.from_dict({"input_ids": ids, "labels": [[-100, -100, *row[2:]] for row in ids]})


def sft(tuned: Tuned, folder, config: S0Config, **arguments: object) -> SFTTrainer:
    defaults = {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "logging_steps": 1,
        "report_to": [],
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "max_grad_norm": 0.0,
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }
    return SFTTrainer(
        model=tuned.architecture.build(),
        args=SFTConfig(**{**defaults, **arguments}),
        train_dataset=dataset(tuned),
        processing_class=tokenizer(),
        peft_config=config,
    )


def tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(3, 128)} | {"<pad>": 0, "<bos>": 1, "<eos>": 2}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<pad>"
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_sft_trainer(architecture: Architecture, tmp_path, checkpointing: bool) -> None:
    tuned = tune(architecture)
    trainer = sft(tuned, tmp_path, S0Config(alpha=1.0), gradient_checkpointing=checkpointing)
    before = {name: p.clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2
    assert all(bool((weight != 0).all()) for weight in weights(trainer.model))
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters() if name in before)
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(architecture.build(), tmp_path / "adapter")
    for a, b in zip(weights(loaded), weights(trainer.model), strict=True):
        assert torch.equal(a, b)


def test_sft_without_padding_equals_padded(architecture: Architecture, tmp_path) -> None:
    """The same losses and states whether rows are padded or laid end to end."""
    tuned, found = tune(architecture), {}
    for name, arguments in {"padded": {}, "padding_free": {"padding_free": True, "max_length": None}}.items():
        trainer = sft(tuned, tmp_path / name, S0Config(alpha=1.0), max_steps=3, **arguments)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        found[name] = (losses, [weight.detach().clone() for weight in weights(trainer.model)])
    assert found["padded"][0] == pytest.approx(found["padding_free"][0], rel=1e-5)
    for a, b in zip(found["padded"][1], found["padding_free"][1], strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("trainer_class", ["sft", "plain"])
def test_penalty_in_trainers(architecture: Architecture, tmp_path, accumulation: int, trainer_class: str) -> None:
    """One SGD step with the penalty and one without differ by lr * 2 * lambda * S exactly."""
    found = []
    for l2_lambda in (LAMBDA, 0.0):
        tuned = tune(architecture)
        config = S0Config(alpha=1.0, init_weights=1.0, l2_lambda=l2_lambda)
        arguments = {
            "max_steps": 1,
            "per_device_train_batch_size": 8 // accumulation,
            "gradient_accumulation_steps": accumulation,
            "optim": "sgd",
            "learning_rate": 0.1,
        }
        if trainer_class == "sft":
            torch.manual_seed(0)
            trainer = sft(tuned, tmp_path, config, **arguments)
        else:
            from peft import get_peft_model

            base = architecture.build()
            torch.manual_seed(0)
            ids = [{"input_ids": row, "labels": row} for row in tuned.ids(8, 9).tolist()]
            trainer = Trainer(
                model=get_peft_model(base, config),
                args=TrainingArguments(
                    output_dir=str(tmp_path),
                    use_cpu=True,
                    report_to=[],
                    max_grad_norm=0.0,
                    disable_tqdm=True,
                    save_strategy="no",
                    lr_scheduler_type="constant",
                    **arguments,
                ),
                train_dataset=ids,
            )
        start = [weight.detach().clone() for weight in weights(trainer.model)]
        trainer.train()
        found.append((start, [weight.detach() for weight in weights(trainer.model)]))
    for start, with_penalty, without in zip(found[0][0], found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(without - with_penalty, 0.1 * 2 * LAMBDA * start, atol=1e-6, rtol=1e-4)
