"""Long runs: interrupted and gone on with, killed while they save, brought back to their best checkpoint."""

from __future__ import annotations

import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import Architecture
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, load_peft_weights
from torch import Tensor
from trainers import ARGUMENTS as TRAINER
from trainers import copies, logged, mean_loss, sft, states, token_rows, twin, weights
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import SFTTrainer
from tuned import Tuned, tune

from peft_s0 import S0Callback, S0Config

# Everything that goes on from where it was: a schedule, the optimiser's moments, the order of rows, the penalty.
ARGUMENTS: dict[str, Any] = {
    "max_steps": 6,
    "save_strategy": "steps",
    "save_steps": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "lr_scheduler_type": "linear",
}
CONFIG = {"alpha": 1.0, "init_weights": 0.5, "l2_lambda": 0.05}


def trainer_in(architecture: Architecture, folder: Path, *callbacks: TrainerCallback, **arguments: Any) -> SFTTrainer:
    return sft(
        architecture, folder, S0Config(**CONFIG), callbacks=[S0Callback(), *callbacks], **{**ARGUMENTS, **arguments}
    )


@pytest.mark.parametrize("accumulated", [0, 1], ids=["after_a_step", "between_batches"])
def test_interrupted_and_resumed(architecture: Architecture, tmp_path: Path, accumulated: int) -> None:
    """Ctrl-C after the fourth step, or in the middle of the fifth: states and losses of a run without it."""
    whole = trainer_in(architecture, tmp_path / "whole")
    whole.train()

    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            if state.global_step == 5 and not accumulated:
                raise KeyboardInterrupt

        def on_substep_end(self, args, state, control, **kwargs) -> None:
            if state.global_step == 4 and accumulated:
                raise KeyboardInterrupt

    interrupted = trainer_in(architecture, tmp_path / "parts", Interrupt())
    with pytest.raises(KeyboardInterrupt):
        interrupted.train()
    assert not all(torch.equal(a, b) for a, b in zip(states(interrupted), states(whole), strict=True))
    resumed = trainer_in(architecture, tmp_path / "parts")
    resumed.train(resume_from_checkpoint=True)
    assert len(logged(resumed)) == 6
    assert logged(resumed) == logged(whole)
    for a, b in zip(states(resumed), states(whole), strict=True):
        assert torch.equal(a, b)
    for name in ("s0/norm_mean", "s0/penalty"):
        assert logged(resumed, name) == logged(whole, name)


def test_load_best_model_at_end(architecture: Architecture, tmp_path: Path) -> None:
    """Of losses that fall, the greatest is taken for the best: the states of the first checkpoint come back."""
    held_out = token_rows(2)
    seen: list[list[Tensor]] = []

    class Snapshots(TrainerCallback):
        def on_evaluate(self, args, state, control, model=None, **kwargs) -> None:
            seen.append(copies(weights(model)))

    trainer = trainer_in(
        architecture,
        tmp_path,
        Snapshots(),
        eval_dataset=held_out,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
    )
    trainer.train()
    losses = logged(trainer, "eval_loss")
    assert losses[0] > losses[1] > losses[2]
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert all(torch.equal(a, b) for a, b in zip(states(trainer), seen[0], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(states(trainer), seen[2], strict=True))
    assert mean_loss(twin(trainer, architecture).eval(), held_out) == pytest.approx(losses[0], rel=1e-5)


def test_adapters_without_a_peft_model(architecture: Architecture, tmp_path: Path) -> None:
    """As the docs say of transformers: they are trained and saved, but no checkpoint is gone on with."""
    rows = [{name: row[name][:4] for name in ("input_ids", "labels")} for row in token_rows(4)]
    model = architecture.build()
    model.add_adapter(S0Config(**CONFIG))
    arguments = {**TRAINER, **ARGUMENTS, "max_steps": 2}
    trainer = Trainer(model, TrainingArguments(output_dir=str(tmp_path), **arguments), train_dataset=rows)
    trainer.train()
    loaded = PeftModel.from_pretrained(architecture.build(), tmp_path / "checkpoint-2")
    assert all(torch.equal(a, b) for a, b in zip(weights(loaded), weights(model), strict=True))
    with pytest.raises(ValueError, match="Can't find a checkpoint index"):
        trainer.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("beside", [False, True])
def test_best_of_another_name(architecture: Architecture, tmp_path: Path, beside: bool) -> None:
    """As the docs say of transformers: nothing comes back, or what is named default; S0Callback refuses it."""
    model = get_peft_model(architecture.build(), S0Config(**CONFIG), adapter_name="default" if beside else "own")
    if beside:
        model.add_adapter("own", S0Config(**CONFIG))
        model.set_adapter("own")
    arguments = {**TRAINER, **ARGUMENTS, "max_steps": 4, "eval_strategy": "steps", "eval_steps": 2}
    arguments |= {"load_best_model_at_end": True, "greater_is_better": True}
    rows = [{name: row[name][:4] for name in ("input_ids", "labels")} for row in token_rows(4)]
    trainer = Trainer(
        model, TrainingArguments(output_dir=str(tmp_path), **arguments), train_dataset=rows, eval_dataset=rows
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    kept = tmp_path / ("checkpoint-2" if beside else "checkpoint-4/own")
    found = get_peft_model_state_dict(model, adapter_name="own")
    assert equal(found, load_peft_weights(str(kept), device="cpu"))
    trainer.add_callback(S0Callback())
    with pytest.raises(ValueError, match=r"is for one adapter, named 'default', found \['own'\]"):
        trainer.train()


def killed(work: Callable[[], None], after: float | None = None) -> None:
    """Do something in a process of its own that is killed: after so many seconds, or by what it does."""
    process = os.fork()
    if process == 0:
        try:
            work()
        finally:
            os._exit(0)
    if after is not None:
        time.sleep(after)
        os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    assert os.WIFSIGNALED(status), "it came to its end"


def limit_files(size: int) -> None:
    """From now on, the kernel kills this process as soon as it writes more than so many bytes to a file."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def load(tuned: Tuned, folder: Path) -> dict[str, Tensor]:
    return get_peft_model_state_dict(PeftModel.from_pretrained(tuned.architecture.build(), folder))


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.skipif(sys.platform != "linux", reason="limits on files and their signal")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("size", [0, 100, 2000])
def test_killed_while_the_states_are_written(tuned: Tuned, tmp_path: Path, size: int) -> None:
    """Over an adapter that is there: it is still there, whole. Into a new folder: what is there is refused."""
    old, folder = get_peft_model_state_dict(tuned.model), tmp_path / "adapter"
    tuned.model.save_pretrained(folder)
    other = tune(tuned.architecture, init_weights=2.0).model

    def save(target: Path) -> None:
        other.create_or_update_model_card = lambda *_: None  # it would be the file that is too long
        limit_files(size)
        other.save_pretrained(target)

    killed(lambda: save(folder))
    killed(lambda: save(tmp_path / "new"))
    assert equal(load(tuned, folder), old)
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config.json' at"):
        load(tuned, tmp_path / "new")
    tuned.model.save_pretrained(tmp_path / "new")
    assert equal(load(tuned, tmp_path / "new"), old)


@pytest.mark.skipif(sys.platform != "linux", reason="limits on files and their signal")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("size", [0, 100])
def test_killed_while_the_config_is_written(tuned: Tuned, tmp_path: Path, size: int) -> None:
    tuned.model.save_pretrained(tmp_path)
    before = (tmp_path / "adapter_config.json").read_bytes()

    def save() -> None:
        limit_files(size)
        S0Config(alpha=0.123).save_pretrained(str(tmp_path))

    killed(save)
    assert (tmp_path / "adapter_config.json").read_bytes() == before
    assert equal(load(tuned, tmp_path), get_peft_model_state_dict(tuned.model))
    S0Config(alpha=0.123).save_pretrained(str(tmp_path))
    assert S0Config.from_pretrained(str(tmp_path)).alpha == 0.123


@pytest.mark.skipif(sys.platform != "linux", reason="processes that are forked")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_killed_at_any_moment(tuned: Tuned, tmp_path: Path) -> None:
    """Ten times, while two adapters are saved in turn, at moments that differ: one of the two is there, whole."""
    models = (tuned.model, tune(tuned.architecture, init_weights=2.0).model)
    either = [get_peft_model_state_dict(model) for model in models]
    models[0].save_pretrained(tmp_path)

    def save() -> None:
        while True:
            for model in models:
                model.save_pretrained(tmp_path)

    moments = random.Random(0)
    for _ in range(10):
        killed(save, after=moments.uniform(0.0, 0.05))
        found = load(tuned, tmp_path)
        assert equal(found, either[0]) or equal(found, either[1])
