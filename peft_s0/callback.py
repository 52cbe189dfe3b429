"""The callback for trainers: what the states do, in the logs, and what the penalty must know of optimiser steps."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .layer import InitialState, S0Layer
from .training import OptimizerSteps

if TYPE_CHECKING:
    from transformers import Trainer

TRAVEL = 2e-3
"""Below this sum of learning rates, training leaves a state close to where it started.

Adam moves an entry of a state by about the learning rate in a step, whatever the size of the gradient, so the sum over
all steps is how far it can get. The paper's recipe, 20 steps of 1e-3, allows 0.02; this is a tenth of it. TRL's default
of 2e-5 with a linear schedule allows 0.0002 in 20 steps, a hundredth.
"""


class S0Callback(TrainerCallback):
    """Adds the states' norms, alpha and the penalty to a trainer's logs, and tells the penalty of optimiser steps.

    Each time the trainer logs its loss, there are added, for the adapter that is trained,

    - `s0/norm_mean`, `s0/norm_max`: mean and maximum over layers of the Frobenius norm of the unscaled state,
    - `s0/offset_norm_mean`, `s0/offset_norm_max`: the same of state offsets (`variant`),
    - `s0/alpha`: the scale of the state; where layers may differ (`learn_alpha`, `alpha_pattern`) the mean over layers,
      with `s0/alpha_min` and `s0/alpha_max`,
    - `s0/penalty`: `l2_lambda * sum ||S||^2`, which is not in the loss that is logged.

    If several adapters are trained, their names follow `s0/`. At the start, it warns if the states are frozen, or if
    the learning rates of all steps together cannot move them far.

    The penalty (`l2_lambda`) needs this callback in trainings under FSDP2, DeepSpeed and fp16, and has the same weight
    everywhere with it and without.

    Passed as `callbacks=[S0Callback()]`, the values reach the trainer's history, its progress bar and all callbacks
    that come later. Trainers call the reporters of `report_to` first: `S0Callback.add_to(trainer)` comes before them.

    Raises:
        ValueError: when training begins, if the model has no S0 layer, or if the best checkpoint would not come back.

    Example:
        >>> trainer = SFTTrainer(model, peft_config=S0Config(), args=SFTConfig(report_to="wandb"), train_dataset=data)
        >>> S0Callback.add_to(trainer)
        >>> trainer.train()
    """

    def __init__(self) -> None:
        self._layers: list[S0Layer] = []
        self._steps: OptimizerSteps | None = None

    @classmethod
    def add_to(cls, trainer: Trainer) -> S0Callback:
        """Put the callback in front of the reporters of a trainer, which may have it already."""
        present = trainer.pop_callback(cls)
        callback = present if isinstance(present, cls) else cls()
        trainer.callback_handler.callbacks.insert(0, callback)
        return callback

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the states, however the model is wrapped."""
        model: nn.Module = kwargs["model"]
        self._layers = [module for module in model.modules() if isinstance(module, S0Layer)]
        if not self._layers:
            raise ValueError(
                f"S0Callback: {type(model).__name__} has no S0 layer. Pass peft_config=S0Config() to the trainer, or "
                "leave the callback out."
            )
        active = self._layers[0].active_adapters
        if active != ["default"] and args.load_best_model_at_end:
            raise ValueError(
                f"S0Callback: load_best_model_at_end=True is for one adapter, named 'default', found {active}: "
                "transformers reads no other, and loads the one of that name into the first. Set it to False and load "
                "the best checkpoint when training is done (trainer.state.best_model_checkpoint)."
            )
        self._steps = OptimizerSteps(model, getattr(kwargs.get("optimizer"), "scaler", None), may_stop=True)
        if not state.is_world_process_zero:
            return
        trained = [m.weight for layer in self._layers for n in layer.configs for m in self._trained(layer, n).values()]
        if not trained:
            warnings.warn(
                "S0Callback: the states are frozen, so this training leaves them as they are. Load the adapter with "
                "PeftModel.from_pretrained(..., is_trainable=True), or make it the active one by set_adapter.",
                stacklevel=2,
            )
        else:
            _warn_of_standstill(args, state, trained, kwargs.get("optimizer"), kwargs.get("lr_scheduler"))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Announce an optimiser step to the penalty."""
        if self._steps is not None:
            self._steps.begin()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let go of the states."""
        if self._steps is not None:
            self._steps.end()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the values to what the trainer logs, and to its history."""
        logs: dict[str, float] = kwargs["logs"]
        if "loss" not in logs:
            return
        values = self._values()
        logs.update(values)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(values)

    @staticmethod
    def _trained(layer: S0Layer, name: str) -> dict[str, InitialState]:
        return {kind: m for kind, m in layer.learnt_tensors(name).items() if m.weight.requires_grad}

    @torch.no_grad()
    def _values(self) -> dict[str, float]:
        norms: dict[tuple[str, str], list[Tensor]] = {}
        penalties: dict[str, list[Tensor]] = {}
        alphas: dict[str, list[float]] = {}
        differ = False
        for layer in self._layers:
            for name, config in layer.configs.items():
                trained = self._trained(layer, name)
                if not trained:
                    continue
                differ = differ or config.learn_alpha or bool(config.alpha_pattern)
                alphas.setdefault(name, []).append(_alpha_of(layer, name))
                for kind, learnt in layer.states(name).items():
                    if kind not in trained:
                        continue
                    with _whole(learnt) as state:
                        norm = state.norm()
                    norms.setdefault((name, kind), []).append(norm)
                    penalties.setdefault(name, []).append(config.l2_lambda * norm.square())
        values: dict[str, float] = {}
        for name, of_each in alphas.items():
            prefix = "s0/" if len(alphas) == 1 else f"s0/{name}/"
            for kind, label in (("s0_state", "norm"), ("s0_offset", "offset_norm")):
                if (name, kind) in norms:
                    of_layers = torch.stack([norm.cpu() for norm in norms[name, kind]])
                    values[f"{prefix}{label}_mean"] = float(of_layers.mean())
                    values[f"{prefix}{label}_max"] = float(of_layers.max())
            values[f"{prefix}alpha"] = fmean(of_each) if len({*of_each}) > 1 else of_each[0]
            if differ:
                values |= {f"{prefix}alpha_min": min(of_each), f"{prefix}alpha_max": max(of_each)}
            if name in penalties:
                values[f"{prefix}penalty"] = float(torch.stack([p.cpu() for p in penalties[name]]).sum())
        return values


def _alpha_of(layer: S0Layer, adapter_name: str) -> float:
    learnt = layer.learnt_tensors(adapter_name).get("s0_alpha")
    if learnt is None:
        return layer.alpha(adapter_name)
    with _whole(learnt) as alpha:
        return float(alpha.detach())


@contextmanager
def _whole(initial: InitialState) -> Iterator[Tensor]:
    """An unscaled state, gathered if it is sharded."""
    weight: Any = initial.weight
    if hasattr(weight, "full_tensor"):
        yield initial.compose(weight.full_tensor())
    elif hasattr(weight, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([weight]):
            yield initial.compose(weight)
    else:
        yield initial.compose(weight)


def _warn_of_standstill(
    args: TrainingArguments, state: TrainerState, trained: Sequence[Tensor], optimizer: Any, lr_scheduler: Any
) -> None:
    if "adam" not in type(getattr(optimizer, "optimizer", optimizer)).__name__.lower():
        return
    # Of the optimiser, which may be one that was passed to the trainer, as the schedule may; of the groups that hold
    # states, where an engine has not put other parameters in their place.
    ids, groups = {id(weight) for weight in trained}, optimizer.param_groups
    own = [i for i, group in enumerate(groups) if not ids.isdisjoint(map(id, group["params"]))] or range(len(groups))
    rate = max(float(groups[i][name]) for i in own for name in _RATES if name in groups[i])
    travel = _travel(lr_scheduler, rate, own, state.max_steps)
    if travel < TRAVEL:
        schedule = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
        if not isinstance(lr_scheduler, LambdaLR):
            schedule = type(lr_scheduler).__name__
        warnings.warn(
            f"S0Callback: with learning_rate={rate:g}, schedule {schedule!r} and {state.max_steps} steps, Adam moves "
            f"an entry of a state by about {travel:.1g} at most, which leaves it close to where it started. The "
            "paper's recipe, learning_rate=1e-3 and lr_scheduler_type='constant' for 20 steps, allows 0.02.",
            stacklevel=2,
        )


# Where a group of parameters has its rate now, before its schedule, and at the height of one that rises.
_RATES = ("lr", "initial_lr", "max_lr")


def _travel(lr_scheduler: Any, learning_rate: float, groups: Sequence[int], steps: int) -> float:
    """Sum of the learning rates of all steps, as far as it is needed; the greatest of some groups of parameters."""
    if not isinstance(lr_scheduler, LambdaLR):
        # It follows the loss, or is another's own: as far as the learning rate allows.
        return learning_rate * steps
    travel: float = 0.0
    for step in range(steps):
        travel += max(float(lr_scheduler.base_lrs[i]) * lr_scheduler.lr_lambdas[i](step) for i in groups)
        if travel >= TRAVEL:
            break
    return travel
