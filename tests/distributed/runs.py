"""Trainings one after the other, in as many processes as they are started in, on CPUs.

`tests/test_distributed.py` writes what is to be done to `runs.json` and starts this with one of the files of
`examples/accelerate`. What came of it goes to `{rank}.json`. One process needs no start: `perform` does the same.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from peft import get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Trainer

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "examples")]
from architectures import MAIN  # noqa: E402
from trainers import logged, sft, token_rows  # noqa: E402

from peft_s0 import S0Callback, S0Config  # noqa: E402
from peft_s0.layer import InitialState  # noqa: E402

# Three steps an epoch, so that a checkpoint after two lies between epochs; each on 8 rows, however they are dealt out.
ROWS, STEP = 24, 8
ARGUMENTS: dict[str, Any] = {
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 12,
    "lr_scheduler_type": "linear",
    # Where gradients are next to nothing, Adam divides rounding by rounding; this keeps it from doing so.
    "adam_epsilon": 0.1,
    "learning_rate": 5e-2,
    "save_strategy": "steps",
    "save_steps": 2,
}
# Losses fall; the greatest is taken for the best, so that what comes back at the end is not what was there.
BEST: dict[str, Any] = {
    "eval_strategy": "steps",
    "eval_steps": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
    "greater_is_better": True,
}
# Small states and a large penalty: it is not drowned in the loss, nor what a step changes in the rounding.
CONFIG: dict[str, Any] = {"alpha": 1.0, "init_weights": 0.02, "l2_lambda": 0.1}
LAYERS = {"qwen3_5": "Qwen3_5DecoderLayer", "falcon_h1": "FalconH1DecoderLayer"}


def on_cpus(architecture: str) -> dict[str, Any]:
    """Trainers' arguments with which an engine that accelerate has for GPUs runs on CPUs."""
    if "ACCELERATE_USE_DEEPSPEED" in os.environ:
        return {"use_cpu": False, "ddp_backend": "gloo"}
    if "ACCELERATE_USE_FSDP" in os.environ:
        # As an option of `accelerate launch` would do it, here for each model anew.
        os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = LAYERS[architecture]
        AcceleratorState._reset_state()
        PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU
        return {"accelerator_config": {"use_configured_state": True}}
    return {}


@contextmanager
def whole(state: InitialState) -> Iterator[Tensor]:
    """A state's parameter, gathered from all processes."""
    weight: Any = state.weight
    if hasattr(weight, "full_tensor"):
        yield weight.full_tensor()
    elif hasattr(weight, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([weight]):
            yield weight
    else:
        yield weight


def states_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the whole states, by the names that they have in a file."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, InitialState):
            with whole(module) as state:
                found[f"{name.removesuffix('.default')}.weight"] = state.detach().clone()
    return found


def make(
    folder: Path,
    architecture: str,
    bf16_base: bool = False,
    best: bool = False,
    config: dict[str, Any] | None = None,
    **arguments: Any,
) -> Trainer:
    """SFTTrainer with the callback, and a batch that has the same rows in however many processes."""
    (row,) = [row for row in MAIN if row.name == architecture]
    engine = on_cpus(architecture)
    processes = int(os.environ.get("WORLD_SIZE", 1))
    return sft(
        row,
        folder,
        S0Config(**{**CONFIG, **(config or {})}),
        model=row.build().bfloat16() if bf16_base else row.build(),
        callbacks=[S0Callback()],
        train_dataset=token_rows(ROWS),
        eval_dataset=token_rows(ROWS) if best else None,
        gradient_accumulation_steps=STEP // ARGUMENTS["per_device_train_batch_size"] // processes,
        **{**ARGUMENTS, **engine, **(BEST if best else {}), **arguments},
    )


def train(folder: Path, resume: str | None = None, **options: Any) -> dict[str, Any]:
    """Train, save the adapter and, beside it, what the processes hold."""
    trainer = make(folder, **options)
    seen: set[tuple[str, str]] = set()

    def look(module: nn.Module, inputs: Any, state: Tensor) -> None:
        if torch.is_grad_enabled():
            seen.add((str(module.weight.dtype), str(state.dtype)))

    for module in trainer.model.modules():
        if isinstance(module, InitialState):
            module.register_forward_hook(look)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(folder / "adapter"))
    states = states_of(trainer.model)
    if trainer.is_world_process_zero():
        save_file(states, folder / "states.safetensors")
    held = [tuple(p.shape) for m in trainer.model.modules() if isinstance(m, InitialState) for p in m.parameters()]
    return {
        "processes": trainer.accelerator.num_processes,
        "wrapper": type(trainer.model_wrapped).__name__,
        "engine": str(trainer.accelerator.distributed_type),
        "precision": trainer.accelerator.mixed_precision,
        "shapes": held,
        "best": trainer.state.best_model_checkpoint,
        "sum": sum(float(state.double().sum()) for state in states.values()),
        "seen": sorted(seen),
        **{
            name: logged(trainer, name)
            for name in ("loss", "grad_norm", "s0/norm_mean", "s0/norm_max", "s0/penalty", "eval_loss")
        },
    }


def refused(folder: Path, resume: str | None = None, **options: Any) -> dict[str, Any]:
    """What is said when a training is refused."""
    trainer = make(folder, **options)
    try:
        trainer.train(resume_from_checkpoint=resume)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "written": len([*folder.rglob("*.safetensors")])}
    return {"error": None}


def refused_save(folder: Path, **options: Any) -> dict[str, Any]:
    """What is said when the adapter is saved past the trainer, as shards."""
    trainer = make(folder, save_strategy="no", **{**options, "max_steps": 1})
    trainer.train()
    try:
        trainer.model.save_pretrained(folder / f"past-{trainer.accelerator.process_index}")
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "written": len([*folder.rglob("*.safetensors")])}
    return {"error": None}


def refused_cast(folder: Path, architecture: str, stage: int) -> dict[str, Any]:
    """What is said where DeepSpeed's bf16 casts what is trained. On CPUs, trainers do not get that far."""
    import deepspeed

    (row,) = [row for row in MAIN if row.name == architecture]
    model = get_peft_model(row.build().bfloat16(), S0Config(**CONFIG))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    config = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "zero_optimization": {"stage": stage}}
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config={**config, "zero_allow_untested_optimizer": True}
    )
    try:
        engine(torch.tensor([[5, 6, 7]]))
    except ValueError as error:
        return {"error": f"{type(error).__name__}: {error}", "written": 0}
    return {"error": None}


_GROUPS: list[Any] = []
"""Process groups that outlive what used them. The last reference to a group of gloo waits for its threads and holds
Python's lock, which a thread that lets go of a tensor just then is waiting for: both would wait for ever."""


def example(folder: Path, architecture: str, options: list[str]) -> dict[str, Any]:
    """`examples/sft.py`, by its command line; the last run of its processes, for it parts them."""
    import sft as script

    engine = on_cpus(architecture)
    given = ["--use_cpu"] if engine.get("use_cpu", True) else ["--ddp_backend", "gloo"]
    if "accelerator_config" in engine:
        given += ["--accelerator_config", json.dumps(engine["accelerator_config"])]
    if torch.distributed.is_initialized():
        _GROUPS.append(torch.distributed.group.WORLD)
    with patch.object(sys, "argv", ["sft.py", "--output_dir", str(folder), *given, *options]):
        script.main()
    return {}


def perform(folder: Path, run: dict[str, Any]) -> dict[str, Any]:
    """Do what an entry of `runs.json` says, in a folder of its name."""
    options = dict(run)
    work = {
        "train": train,
        "refused": refused,
        "refused_save": refused_save,
        "refused_cast": refused_cast,
        "example": example,
    }
    with redirect_stdout(io.StringIO()):
        return work[options.pop("do", "train")](folder / options.pop("name"), **options)


def main(folder: Path) -> None:
    """All entries, in order."""
    torch.set_num_threads(1)
    if "ACCELERATE_USE_DEEPSPEED" in os.environ:
        import deepspeed

        # Its own reduction in shared memory is compiled when it is first used. Without it, gloo reduces.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    rank = int(os.environ["RANK"])
    done = {run["name"]: perform(folder, run) for run in json.loads((folder / "runs.json").read_text())}
    (folder / f"{rank}.json").write_text(json.dumps(done))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    # Without what Python does at its end: a thread of gloo may wait for the interpreter to give a tensor up, which
    # aborts the process, or hangs it where the process group is destroyed.
    os._exit(0)
