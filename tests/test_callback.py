"""S0Callback: what it logs, when it warns, where it finds the states, and that it is imported when asked for only."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import Architecture
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.optim.lr_scheduler import ConstantLR, OneCycleLR
from trainers import ARGUMENTS, sft, token_rows, train, weights
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from tuned import tune

import peft_s0
from peft_s0 import S0Callback, S0Config

VALUES = ("s0/norm_mean", "s0/norm_max", "s0/alpha", "s0/penalty")


class Reporter(TrainerCallback):
    """Keeps what it is told, like those that write to a file or a service."""

    def __init__(self) -> None:
        self.told: list[dict[str, Any]] = []

    def on_log(self, *args: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        self.told.append(dict(logs))


def test_values(architecture: Architecture, tmp_path: Path) -> None:
    """In the trainer's history and in what comes later; with each loss and nowhere else."""
    reporter = Reporter()
    config = S0Config(alpha=0.3, init_weights=0.5, l2_lambda=0.25)
    trainer = sft(
        architecture,
        tmp_path,
        config,
        callbacks=[S0Callback(), reporter],
        eval_dataset=token_rows(2),
        eval_strategy="steps",
        eval_steps=1,
    )
    train(trainer)
    norms = torch.stack([weight.detach().norm() for weight in weights(trainer.model)])
    expected = (float(norms.mean()), float(norms.max()), 0.3, 0.25 * float(norms.square().sum()))
    with_loss = [logs for logs in reporter.told if "loss" in logs]
    assert len(with_loss) == 3
    for entry in (with_loss[-1], [entry for entry in trainer.state.log_history if "loss" in entry][-1]):
        assert [entry[name] for name in VALUES] == pytest.approx(list(expected), rel=1e-6)
    assert len({logs["s0/norm_mean"] for logs in with_loss}) == 3
    assert any("eval_loss" in logs for logs in reporter.told)
    assert not any("s0/" in name for logs in reporter.told if "loss" not in logs for name in logs)


def test_in_front_of_reporters(architecture: Architecture, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`add_to` moves the callback, or makes one, to where even the reporters of `report_to` come later."""
    for given in ([], [S0Callback()]):
        reporter = Reporter()
        trainer = sft(architecture, tmp_path, callbacks=[reporter, *given], max_steps=1)
        callback = S0Callback.add_to(trainer)
        assert not given or callback is given[0]
        assert [type(c) for c in trainer.callback_handler.callbacks].count(S0Callback) == 1
        train(trainer)
        assert set(VALUES) <= reporter.told[0].keys()
    assert isinstance(trainer.callback_handler.callbacks[-1], PrinterCallback)
    assert "s0/norm_mean" in capsys.readouterr().out


def test_several_adapters(architecture: Architecture) -> None:
    """Of those that are trained."""
    model = tune(architecture, l2_lambda=0.1).model
    for name, alpha in (("second", 0.2), ("third", 0.4)):
        model.add_adapter(name, S0Config(alpha=alpha, init_weights=2.0))
    model.base_model.set_adapter(["default", "second"])
    logs = {"loss": 1.0}
    callback, control = S0Callback(), TrainerControl()
    callback.on_train_begin(arguments(), TrainerState(max_steps=20), control, model=model)
    callback.on_log(arguments(), TrainerState(), control, logs=logs)
    callback.on_train_end(arguments(), TrainerState(), control)
    assert logs.keys() == {"loss"} | {name.replace("/", f"/{a}/") for name in VALUES for a in ("default", "second")}
    assert logs["s0/second/alpha"] == 0.2
    assert logs["s0/second/norm_mean"] == pytest.approx(2 * logs["s0/default/norm_mean"], rel=0.2)


def arguments(**values: Any) -> TrainingArguments:
    return TrainingArguments(output_dir="unused", use_cpu=True, report_to=[], **values)


class Wrapper(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
@pytest.mark.parametrize("wrap", [lambda m: m, Wrapper, torch.compile, lambda m: Wrapper(torch.compile(m))])
def test_finds_the_states_in_whatever_is_passed(architecture: Architecture, wrap: Any) -> None:
    """Wrapped as DistributedDataParallel does it, compiled, both; and injected without a PeftModel."""
    model = tune(architecture).model
    for passed in (model, model.base_model.model):
        logs = {"loss": 1.0}
        callback, control = S0Callback(), TrainerControl()
        callback.on_train_begin(arguments(), TrainerState(max_steps=20), control, model=wrap(passed))
        callback.on_log(arguments(), TrainerState(), control, logs=logs)
        callback.on_train_end(arguments(), TrainerState(), control)
        assert logs["s0/norm_mean"] > 1


def test_model_without_states(architecture: Architecture, tmp_path: Path) -> None:
    lora = LoraConfig(target_modules=["q_proj"])
    trainer = sft(architecture, tmp_path, lora, callbacks=[S0Callback()])
    with pytest.raises(ValueError, match=r"S0Callback: PeftModel\w* has no S0 layer.*peft_config=S0Config\(\)"):
        trainer.train()


@pytest.mark.parametrize(
    ("values", "standstill"),
    [
        ({"learning_rate": 1e-3, "lr_scheduler_type": "constant", "max_steps": 20}, False),
        ({"learning_rate": 2e-5, "lr_scheduler_type": "linear", "max_steps": 20}, True),
        ({"learning_rate": 2e-5, "lr_scheduler_type": "constant", "max_steps": 20}, True),
        ({"learning_rate": 2e-5, "lr_scheduler_type": "linear", "max_steps": 1000}, False),
        ({"learning_rate": 1e-3, "lr_scheduler_type": "linear", "max_steps": 20}, False),
        (
            {"learning_rate": 1e-3, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 500, "max_steps": 20},
            True,
        ),
        ({"learning_rate": 2e-5, "lr_scheduler_type": "reduce_lr_on_plateau", "max_steps": 20}, True),
        ({"learning_rate": 2e-5, "max_steps": 20, "optim": "sgd"}, False),
    ],
    ids=lambda values: "-".join(map(str, values.values())) if isinstance(values, dict) else "",
)
def test_warning_of_a_standstill(architecture: Architecture, values: dict[str, Any], standstill: bool) -> None:
    """Where the learning rates of all steps together cannot move a state far: a tenth of the paper's 20 x 1e-3."""
    model = get_peft_model(architecture.build(), S0Config())
    args = arguments(**{"eval_strategy": "steps", **values})
    trainer = Trainer(model=model, args=args, train_dataset=[{"input_ids": [5]}], eval_dataset=[{"input_ids": [5]}])
    trainer.create_optimizer_and_scheduler(args.max_steps)
    callback, state = S0Callback(), TrainerState(max_steps=args.max_steps, is_world_process_zero=True)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        callback.on_train_begin(
            args,
            state,
            TrainerControl(),
            model=model,
            optimizer=trainer.accelerator.prepare(trainer.optimizer),
            lr_scheduler=trainer.lr_scheduler,
        )
    callback.on_train_end(args, state, TrainerControl())
    messages = [str(warning.message) for warning in found if "S0Callback" in str(warning.message)]
    assert len(messages) == standstill
    for message in messages:
        assert f"learning_rate={values['learning_rate']:g}" in message
        assert "learning_rate=1e-3 and lr_scheduler_type='constant'" in message


@pytest.mark.parametrize(
    ("rate", "schedule", "standstill"),
    [
        (1e-3, None, False),
        (1e-3, lambda optimizer: ConstantLR(optimizer, factor=1.0), False),
        (1e-5, lambda optimizer: OneCycleLR(optimizer, max_lr=1e-3, total_steps=20), False),
        (1e-3, lambda optimizer: OneCycleLR(optimizer, max_lr=1e-5, total_steps=20), True),
        (1e-5, None, True),
    ],
)
def test_standstill_of_an_optimiser_that_is_passed(
    architecture: Architecture, tmp_path: Path, rate: float, schedule: Any, standstill: bool
) -> None:
    """Its rates for the states count, and not the trainer's default, nor those of other parameters."""
    model = get_peft_model(architecture.build(), S0Config())
    others = {"params": [nn.Parameter(torch.zeros(1))], "lr": 1e-3}
    optimizer = torch.optim.Adam([{"params": weights(model)}, *([others] if schedule is None else [])], lr=rate)
    trainer = Trainer(
        model,
        TrainingArguments(output_dir=str(tmp_path), **{**ARGUMENTS, "learning_rate": 5e-5, "max_steps": 20}),
        train_dataset=[{"input_ids": [5, 6], "labels": [5, 6]}] * 4,
        callbacks=[S0Callback()],
        optimizers=(optimizer, schedule and schedule(optimizer)),
    )
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        trainer.train()
    messages = [str(warning.message) for warning in found if "S0Callback" in str(warning.message)]
    assert len(messages) == standstill
    assert all("learning_rate=1e-05" in message for message in messages)


def test_warning_of_frozen_states(architecture: Architecture, tmp_path: Path) -> None:
    """As loaded for inference: TRL's trainer runs, and nothing changes."""
    get_peft_model(architecture.build(), S0Config(init_weights=1.0)).save_pretrained(tmp_path)
    for is_trainable in (False, True):
        model = PeftModel.from_pretrained(architecture.build(), tmp_path, is_trainable=is_trainable)
        callback, control = S0Callback(), TrainerControl()
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            callback.on_train_begin(arguments(), TrainerState(max_steps=20), control, model=model)
        callback.on_train_end(arguments(), TrainerState(), control)
        assert [str(w.message).partition(",")[0] for w in found] == (
            [] if is_trainable else ["S0Callback: the states are frozen"]
        )


def test_import_takes_neither_trainers_nor_trl() -> None:
    script = """
import sys
import peft_s0
later = {"peft_s0.analysis", "peft_s0.soups", "matplotlib"}
assert not {"trl", "transformers.trainer", "transformers.trainer_callback", *later} & set(sys.modules)
assert "S0Callback" in peft_s0.__all__
assert "peft_s0.calibrate" not in sys.modules
peft_s0.S0Callback()
assert not {"trl", "transformers.trainer"} & set(sys.modules)
from peft_s0 import *
assert S0Callback is peft_s0.S0Callback
assert callable(soup) and callable(state_from_prompt) and callable(analysis.norms)
assert "matplotlib" not in sys.modules
assert calibrate_alpha is peft_s0.calibrate_alpha
"""
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    with pytest.raises(AttributeError, match="has no attribute 'S0Calback'"):
        _ = peft_s0.S0Calback
