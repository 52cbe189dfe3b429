"""The penalty has the weight that the config says and is clipped as in the paper's recipe, in loops and in trainers."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from architectures import Architecture
from peft import PeftModel, get_peft_model
from torch import nn
from torch.distributed.fsdp import fully_shard
from trainers import ARGUMENTS, copies, states, token_rows, weights
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from tuned import Tuned, tune

from peft_s0 import S0Callback, S0Config
from peft_s0.layer import InitialState
from peft_s0.training import OptimizerSteps

LAMBDA = 0.25
RATE = 0.1


def step_of(tuned: Tuned, ids: torch.Tensor) -> None:
    tuned.model(ids).logits.square().mean().backward()


def penalised(architecture: Architecture, **config: object) -> tuple[Tuned, Tuned]:
    """The same states with the penalty and without."""
    with_penalty = tune(architecture, l2_lambda=LAMBDA, **config)
    without = tune(architecture, l2_lambda=0.0, **config)
    return with_penalty, without


def initial_states(model: nn.Module) -> list[InitialState]:
    return [module for module in model.modules() if isinstance(module, InitialState)]


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


@pytest.mark.parametrize("to_none", [True, False])
def test_penalty_is_added_again_after_a_step_that_was_skipped(architecture: Architecture, to_none: bool) -> None:
    pair = penalised(architecture)
    ids = pair[0].ids(2, 9)
    for _ in range(2):
        for tuned in pair:
            tuned.model.zero_grad(set_to_none=to_none)
            step_of(tuned, ids)
        for weight, found in zip(weights(pair[0].model), difference(*pair), strict=True):
            torch.testing.assert_close(found, 2 * LAMBDA * weight.detach(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("told", [False, True])
def test_penalty_with_optimisers_whose_steps_do_not_show(architecture: Architecture, told: bool) -> None:
    """Fused ones, which are the trainers' default, do not count up a parameter's version."""
    model, ids = only_penalised(architecture), torch.tensor([[5, 6, 7]])
    start, optimizer = copies(weights(model)), torch.optim.SGD(weights(model), RATE, fused=True)
    steps = OptimizerSteps(model) if told else None
    for _ in range(3):
        if steps is not None:
            steps.begin()
        optimizer.zero_grad(set_to_none=False)
        for _ in range(2):
            model(ids).logits.sum().backward()
        optimizer.step()
    if steps is not None:
        steps.end()
    for before, after in zip(start, weights(model), strict=True):
        torch.testing.assert_close(after.detach(), (1 - 2 * RATE * LAMBDA) ** 3 * before, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("told", [False, True])
def test_penalty_in_gradients_that_are_not_kept(architecture: Architecture, told: bool) -> None:
    """Those of torch.autograd.grad: in each, or where steps are announced in the first of a step."""
    model, ids = only_penalised(architecture), torch.tensor([[5, 6, 7]])
    steps = OptimizerSteps(model) if told else None
    for _ in range(2):
        if steps is not None:
            steps.begin()
        for share in (1, 0 if told else 1):
            gradients = torch.autograd.grad(model(ids).logits.sum(), weights(model))
            for weight, gradient in zip(weights(model), gradients, strict=True):
                torch.testing.assert_close(gradient, share * 2 * LAMBDA * weight.detach())
    if steps is not None:
        steps.end()


def test_penalty_is_what_the_config_says_now(architecture: Architecture) -> None:
    model, ids = only_penalised(architecture, l2_lambda=0.0), torch.tensor([[5, 6, 7]])
    for l2_lambda in (LAMBDA, 0.0):
        model.peft_config["default"].l2_lambda = l2_lambda
        model.zero_grad()
        model(ids).logits.sum().backward()
        for weight in weights(model):
            torch.testing.assert_close(weight.grad, 2 * l2_lambda * weight.detach())


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


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
def test_penalty_on_compiled_states(architecture: Architecture) -> None:
    """Also on those that have not run before, and were copied."""
    pair = penalised(architecture)
    pair[0].model = copy.deepcopy(pair[0].model).train()
    ids = pair[0].ids(2, 9)
    for state in initial_states(pair[0].model):
        state.compile(backend="eager", fullgraph=True)
    for tuned in pair:
        step_of(tuned, ids)
    for weight, found in zip(weights(pair[0].model), difference(*pair), strict=True):
        torch.testing.assert_close(found, 2 * LAMBDA * weight.detach(), atol=1e-5, rtol=1e-4)


def test_no_penalty_through_values_that_are_not_the_parameters(architecture: Architecture) -> None:
    """As in the replicas of `DataParallel`, from each of which a gradient comes to the one parameter."""
    state = initial_states(tune(architecture, l2_lambda=LAMBDA).model)[0]
    weight = state.weight.detach().requires_grad_()
    for value, expected in ((2 * weight, 2.0), (weight, 1 + 2 * LAMBDA * weight.detach())):
        weight.grad = None
        torch.func.functional_call(state, {"weight": value}, ()).sum().backward()
        torch.testing.assert_close(weight.grad, torch.ones_like(weight) * expected)


def only_penalised(architecture: Architecture, l2_lambda: float = LAMBDA) -> PeftModel:
    """With states that the loss says nothing of: all that moves them is the penalty, to (1 - 2 lr lambda)^n of them."""
    base = architecture.build()
    torch.manual_seed(0)
    return get_peft_model(base, S0Config(alpha=0.0, init_weights=1.0, l2_lambda=l2_lambda))


def trainer_of(name: str, model: PeftModel, folder: Path, **arguments: Any) -> Trainer:
    """SFTTrainer or transformers' own, with plain gradient descent."""
    arguments = {**ARGUMENTS, "optim": "sgd", "learning_rate": RATE, "max_grad_norm": 0.0, **arguments}
    callbacks, rows = arguments.pop("callbacks", []), token_rows(8)
    if name == "sft":
        arguments["gradient_checkpointing"] = arguments.get("gradient_checkpointing", False)
        from trainers import tokenizer
        from trl import SFTConfig, SFTTrainer

        args = SFTConfig(output_dir=str(folder), **arguments)
        return SFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer(), callbacks=callbacks)
    same_length = [{name: row[name][:4] for name in ("input_ids", "labels")} for row in rows]
    args = TrainingArguments(output_dir=str(folder), **arguments)
    return Trainer(model, args, train_dataset=same_length, callbacks=callbacks)


@pytest.mark.parametrize("callbacks", [0, 1, 2])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("name", ["sft", "plain"])
def test_penalty_in_trainers(
    architecture: Architecture, tmp_path: Path, name: str, accumulation: int, callbacks: int
) -> None:
    """The same with the callback, without it, and with two of them."""
    model = only_penalised(architecture)
    start = copies(weights(model))
    trainer = trainer_of(
        name,
        model,
        tmp_path,
        callbacks=[S0Callback() for _ in range(callbacks)],
        per_device_train_batch_size=4 // accumulation,
        gradient_accumulation_steps=accumulation,
    )
    trainer.train()
    for before, after in zip(start, states(trainer), strict=True):
        torch.testing.assert_close(after, (1 - 2 * RATE * LAMBDA) ** 3 * before, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["sft", "plain"])
def test_penalty_is_clipped_with_the_loss(architecture: Architecture, tmp_path: Path, name: str) -> None:
    """As in the paper's recipe: a step of the gradient of loss and penalty, brought to the norm of 1 together."""
    model = only_penalised(architecture)
    start = copies(weights(model))
    norm = 2 * LAMBDA * torch.stack([state.norm() for state in start]).norm()
    assert norm > 10
    trainer = trainer_of(name, model, tmp_path, max_grad_norm=1.0, max_steps=1, gradient_accumulation_steps=2)
    trainer.train()
    assert trainer.state.log_history[0]["grad_norm"] == pytest.approx(float(norm), rel=1e-5)
    for before, after in zip(start, states(trainer), strict=True):
        torch.testing.assert_close(after, before - RATE * 2 * LAMBDA * before / norm, atol=1e-6, rtol=1e-5)


def test_weight_decay_that_is_the_penalty(architecture: Architecture) -> None:
    """Weight decay of 2 lambda, of an optimiser that adds it to the gradient, instead of `l2_lambda`."""
    ids, found = torch.tensor([[5, 6, 7]]), []
    for l2_lambda, weight_decay in ((LAMBDA, 0.0), (0.0, 2 * LAMBDA)):
        model = only_penalised(architecture, l2_lambda)
        optimizer = torch.optim.Adam(weights(model), 1e-2, weight_decay=weight_decay)
        for _ in range(3):
            model(ids).logits.sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(copies(weights(model)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("when", ["on_step_end", "on_pre_optimizer_step"])
def test_interrupted_training_leaves_no_trace(
    architecture: Architecture, tmp_path: Path, when: str, fused: bool
) -> None:
    """A loop of one's own after it: the trainer, which is still there, announces nothing any more."""
    model = only_penalised(architecture)
    trainer = trainer_of("plain", model, tmp_path, callbacks=[S0Callback(), interrupt(when)])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    model.zero_grad()
    start = copies(weights(model))
    optimizer = torch.optim.SGD(weights(model), RATE, fused=fused)
    for _ in range(3):
        for _ in range(2):
            model(torch.tensor([[5, 6, 7]])).logits.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for before, after in zip(start, weights(model), strict=True):
        torch.testing.assert_close(after.detach(), (1 - 2 * RATE * LAMBDA) ** 3 * before, atol=1e-6, rtol=1e-5)


def interrupt(when: str) -> TrainerCallback:
    """What presses Ctrl-C once, at the first such moment."""
    callback = TrainerCallback()

    def press(*args: Any, **kwargs: Any) -> None:
        delattr(callback, when)
        raise KeyboardInterrupt

    setattr(callback, when, press)
    return callback


def test_training_that_is_started_anew(architecture: Architecture, tmp_path: Path) -> None:
    """After an interruption before the first step, as where memory was short of it: every step has its penalty."""
    model = only_penalised(architecture)
    start = copies(weights(model))
    trainer = trainer_of("plain", model, tmp_path, callbacks=[S0Callback(), interrupt("on_pre_optimizer_step")])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train()
    for before, after in zip(start, states(trainer), strict=True):
        torch.testing.assert_close(after, (1 - 2 * RATE * LAMBDA) ** 3 * before, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("by", ["callback", "steps"])
def test_models_that_are_given_up_leave_nothing_behind(architecture: Architecture, by: str) -> None:
    """Also where the end of their training was announced to nobody."""
    model = only_penalised(architecture)
    if by == "steps":
        OptimizerSteps(model).begin()
    else:
        S0Callback().on_train_begin(SimpleNamespace(), TrainerState(), TrainerControl(), model=model)
    model(torch.tensor([[5, 6, 7]])).logits.sum().backward()
    states = [weakref.ref(weight) for weight in weights(model)]
    del model
    gc.collect()
    assert not any(state() is not None for state in states)


@pytest.fixture
def accelerate() -> Iterator[None]:
    """A state of accelerate that is gone afterwards, whatever becomes of it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    Accelerator(cpu=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("told", ["steps", "callback"])
def test_gradient_scaler(architecture: Architecture, accelerate: None, told: str) -> None:
    """The penalty's gradient is scaled as the loss is, by a scale that changes from step to step."""
    pair = penalised(architecture)
    ids = pair[0].ids(2, 9)
    optimizers = [torch.optim.SGD(weights(tuned.model), lr=0.0) for tuned in pair]
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1) for _ in pair]
    if told == "steps":
        steps = OptimizerSteps(pair[0].model, scalers[0])
        begin, end = steps.begin, steps.end
    else:
        callback, args, state, control = S0Callback(), SimpleNamespace(), TrainerState(), TrainerControl()
        accelerated = AcceleratedOptimizer(optimizers[0], device_placement=False, scaler=scalers[0])
        callback.on_train_begin(args, state, control, model=pair[0].model, optimizer=accelerated)
        begin, end = (
            (lambda: callback.on_step_begin(args, state, control)),
            lambda: callback.on_train_end(args, state, control),
        )
    for _ in range(3):
        begin()
        for tuned, optimizer, scaler in zip(pair, optimizers, scalers, strict=True):
            for _ in range(2):
                scaler.scale(tuned.model(ids).logits.square().mean()).backward()
            scaler.unscale_(optimizer)
        for weight, found in zip(weights(pair[0].model), difference(*pair), strict=True):
            torch.testing.assert_close(found, 2 * LAMBDA * weight.detach(), atol=1e-5, rtol=1e-4)
        for optimizer, scaler in zip(optimizers, scalers, strict=True):
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert scalers[0].get_scale() == 2.0**13
    end()


def test_scale_of_a_training_that_was_interrupted(architecture: Architecture, accelerate: None) -> None:
    """A loop without a scale after it."""
    model, ids = only_penalised(architecture), torch.tensor([[5, 6, 7]])
    optimizer, scaler = torch.optim.SGD(weights(model), RATE), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    callback, args, state, control = S0Callback(), SimpleNamespace(), TrainerState(), TrainerControl()
    accelerated = AcceleratedOptimizer(optimizer, device_placement=False, scaler=scaler)
    callback.on_train_begin(args, state, control, model=model, optimizer=accelerated)
    callback.on_step_begin(args, state, control)
    scaler.scale(model(ids).logits.sum()).backward()
    optimizer.zero_grad()
    start = copies(weights(model))
    for _ in range(3):
        model(ids).logits.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for before, after in zip(start, weights(model), strict=True):
        torch.testing.assert_close(after.detach(), (1 - 2 * RATE * LAMBDA) ** 3 * before, atol=1e-6, rtol=1e-5)


def test_fp16_without_being_told_of_the_scale(architecture: Architecture, accelerate: None, tmp_path: Path) -> None:
    """In a loop of one's own and in a trainer: an error that names the ways out, each of which works."""
    message = r"l2_lambda=0.25 would get another weight here: gradients are scaled in fp16.*S0Callback\(\).*l2_lambda=0"
    model = only_penalised(architecture)
    ids = torch.tensor([[5, 6, 7]])
    with torch.autocast("cpu", dtype=torch.float16):
        with pytest.raises(ValueError, match=message):
            model(ids)
        with torch.no_grad():
            model(ids)
        only_penalised(architecture, l2_lambda=0.0)(ids)
        steps = OptimizerSteps(model)
        model(ids).logits.sum().backward()
        steps.end()
        with pytest.raises(ValueError, match=message):
            model(ids)
    with pytest.raises(ValueError, match=message):
        trainer_of("plain", only_penalised(architecture), tmp_path, fp16=True).train()
    trainer_of("plain", only_penalised(architecture), tmp_path, fp16=True, callbacks=[S0Callback()]).train()
    trainer_of("plain", only_penalised(architecture, l2_lambda=0.0), tmp_path, fp16=True).train()


FP16 = SimpleNamespace(deepspeed_config={"fp16": {"enabled": True}})
BF16 = SimpleNamespace(deepspeed_config={"bf16": {"enabled": True}})


@pytest.mark.parametrize(
    ("values", "reason", "told_helps"),
    [
        ({"distributed_type": "FSDP", "fsdp_plugin": SimpleNamespace(fsdp_version=2)}, "a sharded parameter", True),
        ({"distributed_type": "FSDP", "fsdp_plugin": SimpleNamespace(fsdp_version=1)}, "FSDP1.*fsdp_version: 2", False),
        ({"distributed_type": "DEEPSPEED", "deepspeed_plugins": BF16}, "a sharded parameter", True),
        ({"distributed_type": "DEEPSPEED", "deepspeed_plugins": FP16}, "DeepSpeed scales fp16.*Use bf16", False),
        ({"distributed_type": "MULTI_GPU"}, None, True),
        ({"distributed_type": "MULTI_GPU", "_mixed_precision": "fp16"}, "gradients are scaled in fp16", True),
    ],
    ids=["fsdp2", "fsdp1", "deepspeed", "deepspeed_fp16", "ddp", "ddp_fp16"],
)
@pytest.mark.parametrize("compiled", [False, True])
def test_engines(
    architecture: Architecture,
    accelerate: None,
    monkeypatch: pytest.MonkeyPatch,
    values: dict[str, Any],
    reason: str | None,
    told_helps: bool,
    compiled: bool,
) -> None:
    """What accelerate says it runs is refused where the penalty would get another weight; compiled, when it would."""
    for name, value in values.items():
        value = DistributedType(value) if name == "distributed_type" else value
        for state in (AcceleratorState, PartialState):
            monkeypatch.setitem(state._shared_state, name, value)
    model = only_penalised(architecture).train()

    def train() -> None:
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiled)
        loss = model(torch.tensor([[5, 6, 7]])).logits.sum()
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: False)
        loss.backward()

    def refused() -> None:
        with pytest.raises(ValueError, match=rf"l2_lambda=0.25 would get another weight here: {reason}.*l2_lambda=0\."):
            train()
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: False)

    if reason is None:
        train()
        return
    refused()
    steps = OptimizerSteps(model)
    if told_helps:
        train()
    else:
        refused()
    steps.end()


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("states_alone", [False, True])
def test_fsdp2(architecture: Architecture, one_process: None, states_alone: bool) -> None:
    """Its gradients are gone after each backward pass. Each state is a unit of its own, as PEFT wraps it, or not."""
    model = only_penalised(architecture)
    start = copies(weights(model))
    for state in initial_states(model) if states_alone else []:
        fully_shard(state)
    fully_shard(model)
    model.train()
    optimizer = torch.optim.SGD(weights(model), RATE)
    ids = torch.tensor([[5, 6, 7]])
    with pytest.raises(ValueError, match="a sharded parameter does not show where an optimiser step begins"):
        model(ids)
    callback, args, state, control = S0Callback(), SimpleNamespace(), TrainerState(), TrainerControl()
    callback.on_train_begin(args, state, control, model=model)
    for _ in range(3):
        callback.on_step_begin(args, state, control)
        for _ in range(2):
            model(ids).logits.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    logs = {"loss": 0.0}
    callback.on_log(args, state, control, logs=logs)
    callback.on_train_end(args, state, control)
    whole = [weight.detach().full_tensor() for weight in weights(model)]
    assert logs["s0/norm_max"] == pytest.approx(max(float(state.norm()) for state in whole), rel=1e-6)
    for before, after in zip(start, whole, strict=True):
        torch.testing.assert_close(after, (1 - 2 * RATE * LAMBDA) ** 3 * before, atol=1e-6, rtol=1e-5)
