"""Alphas that are learnt: exact gradients, and what holds of states holds of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed
from architectures import ARCHITECTURES, Architecture
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from reference import with_slow_mixers
from safetensors.torch import load_file
from test_alpha import ALPHAS, alphas, by_layer, named_layers, raw
from test_classes import IDS, Family, hidden
from test_errors import change_states
from test_gradients import loss_of
from test_preference import pairs
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from trainers import ARGUMENTS, sft, token_rows, tokenizer, train
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer
from tuned import Tuned, tune

from peft_s0 import S0Callback, S0Config, StateBank, calibrate_alpha

ROWS = {row.name: row for row in ARCHITECTURES}


def learning(architecture: Architecture, **config: object) -> Tuned:
    """Random states with alphas that differ from layer to layer, one of them negative."""
    tuned = tune(architecture, learn_alpha=True, **config)
    wanted = dict(zip(named_layers(tuned.model), (0.3, -1.7, 0.9), strict=False))
    tuned.model.base_model._put_alpha(wanted, "default")
    return tuned


def scales(model: PeftModel, adapter: str = "default") -> list[nn.Parameter]:
    return [layer.s0_alpha[adapter].weight for layer in named_layers(model).values()]


def values(model: PeftModel) -> list[float]:
    return [float(scale.detach()) for scale in scales(model)]


def gradients(tuned: Tuned, ids: Tensor) -> list[float]:
    tuned.model.zero_grad()
    loss_of(tuned.model, ids, use_cache=False).backward()
    return [float(scale.grad) for scale in scales(tuned.model)]


@pytest.mark.parametrize("config", [{}, {"normalize": True}, {"rank": 2}], ids=str)
def test_gradients_equal_the_naive_twin(architecture: Architecture, config: dict) -> None:
    """Of alpha and of the state, through the recurrence one token at a time in float64."""
    tuned = learning(architecture, **config)
    ids, layers = tuned.ids(2, 12), named_layers(tuned.model)
    factors = {
        name: layer.s0_alpha["default"].weight.detach()[0].double().requires_grad_() for name, layer in layers.items()
    }
    weights = {name: weight.detach().double().requires_grad_() for name, weight in raw(tuned.model).items()}
    states = {}
    for name, layer in layers.items():
        state = weights[name]
        if config.get("rank"):
            left, right = state[:, : layer.state_shape[1]], state[:, layer.state_shape[1] :]
            state = torch.einsum("hik,hjk->hij", left, right)
        states[name] = factors[name] * (state / state.square().sum().sqrt() if config.get("normalize") else state)
    loss_of(with_slow_mixers(tuned.base, architecture.slow_mixer, states), ids, use_cache=False).backward()
    found = gradients(tuned, ids)
    assert found == pytest.approx([float(factor.grad) for factor in factors.values()], rel=2e-4)
    assert all(abs(gradient) > 1e-4 for gradient in found)
    for name, weight in raw(tuned.model).items():
        expected = weights[name].grad.float()
        torch.testing.assert_close(weight.grad, expected, atol=2e-4 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize("variant", ["offset", "both"])
def test_one_alpha_scales_state_and_offset(architecture: Architecture, variant: str) -> None:
    """Its gradient is that of finite differences."""
    tuned, step = learning(architecture, variant=variant), 1e-2
    ids, found = tuned.ids(2, 12), []
    expected = gradients(tuned, ids)
    for scale in scales(tuned.model):
        losses = []
        for sign in (1, -2, 1):
            with torch.no_grad():
                scale.add_(sign * step)
                losses.append(float(loss_of(tuned.model, ids, use_cache=False)))
        found.append((losses[0] - losses[1]) / (2 * step))
    assert found == pytest.approx(expected, rel=1e-2, abs=1e-3 * max(map(abs, expected)))


def test_at_a_state_of_zero(architecture: Architecture) -> None:
    """Alpha has a gradient there, and it is zero; it moves from the second step on."""
    tuned = tune(architecture, learn_alpha=True, init_weights=True)
    ids = tuned.ids(2, 9)
    assert gradients(tuned, ids) == [0.0] * architecture.states
    assert all(float(weight.grad.abs().max()) > 0 for weight in raw(tuned.model).values())
    torch.optim.SGD(tuned.model.parameters(), lr=1e-2).step()
    assert alphas(tuned.model) == pytest.approx([0.7] * architecture.states, rel=1e-6)
    assert all(gradient != 0 for gradient in gradients(tuned, ids))


def test_the_penalty_is_on_states_alone(architecture: Architecture) -> None:
    found, ids = [], tune(architecture).ids(2, 9)
    for l2_lambda in (0.0, 0.25):
        tuned = learning(architecture, l2_lambda=l2_lambda)
        tuned.model.train()
        found.append((gradients(tuned, ids), [weight.grad for weight in raw(tuned.model).values()]))
    assert found[0][0] == found[1][0]
    for weight, without, with_penalty in zip(raw(tuned.model).values(), found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(with_penalty - without, 0.5 * weight.detach(), atol=1e-4, rtol=1e-3)


def test_alone(architecture: Architecture) -> None:
    """With the states frozen, it is one number for each layer that is fitted."""
    tuned = learning(architecture)
    ids, before = tuned.ids(2, 9), {name: weight.detach().clone() for name, weight in raw(tuned.model).items()}
    for name, parameter in tuned.model.named_parameters():
        parameter.requires_grad_(".s0_alpha." in name)
    assert tuned.model.get_nb_trainable_parameters()[0] == architecture.states
    optimizer, losses = torch.optim.Adam(scales(tuned.model), lr=0.01), []
    for _ in range(5):
        optimizer.zero_grad()
        losses.append(loss_of(tuned.model, ids, use_cache=False))
        losses[-1].backward()
        optimizer.step()
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > losses[-1] + 0.01
    assert all(torch.equal(weight, before[name]) for name, weight in raw(tuned.model).items())


@torch.no_grad()
def test_starts_where_the_config_says(architecture: Architecture) -> None:
    tuned = tune(architecture, learn_alpha=True, alpha_pattern={r"layers\.1\..*": 0.2})
    assert all(scale.shape == (1,) and scale.dtype == torch.float32 for scale in scales(tuned.model))
    assert alphas(tuned.model) == pytest.approx([0.7, 0.2, 0.7][: architecture.states], rel=1e-6)
    plain = tune(architecture, alpha_pattern={r"layers\.1\..*": 0.2})
    ids = tuned.ids(2, 9)
    assert torch.equal(tuned.model(ids).logits, plain.model(ids).logits)
    tuned.model.half()
    assert all(scale.dtype == torch.float32 for scale in scales(tuned.model))


@torch.no_grad()
def test_saved_and_loaded(architecture: Architecture, tmp_path: Path) -> None:
    tuned = learning(architecture)
    ids, expected = tuned.ids(2, 9), alphas(tuned.model)
    tuned.model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert [float(v) for n, v in stored.items() if n.endswith(".s0.s0_alpha.weight")] == [
        *map(float, scales(tuned.model))
    ]
    assert S0Config.from_pretrained(tmp_path).alpha == 0.7
    loaded = PeftModel.from_pretrained(architecture.build(), tmp_path)
    assert alphas(loaded) == expected
    assert expected[1] < 0
    assert torch.equal(loaded(ids).logits, tuned.model(ids).logits)
    assert not any(parameter.requires_grad for parameter in scales(loaded))
    copied = copy.deepcopy(tuned.model)
    tuned.model.set_alpha(0.0)
    assert torch.equal(copied(ids).logits, loaded(ids).logits)
    assert torch.equal(tuned.model(ids).logits, tuned.base(ids).logits)
    shown = f"-1.7 to {max(float(scale) for scale in expected):.1f} by layer, learnt from 0.7"
    assert shown in (tmp_path / "README.md").read_text()


@torch.no_grad()
def test_every_class_loads_them(tmp_path: Path) -> None:
    family = Family(ROWS["qwen3_5"])
    for first, second in family.pairs()[::3]:
        tuned = family.tuned(first, learn_alpha=True)
        tuned.set_alpha(by_layer(tuned))
        tuned.save_pretrained(tmp_path / first)
        loaded = PeftModel.from_pretrained(family.build(second), tmp_path / first).eval()
        assert alphas(loaded) == pytest.approx(list(ALPHAS), rel=1e-6)
        assert torch.equal(hidden(loaded, IDS), hidden(tuned, IDS))


@pytest.fixture
def saved(architecture: Architecture, tmp_path: Path) -> Path:
    learning(architecture).model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def put(value: float) -> object:
    def change(states: dict[str, Tensor]) -> None:
        states[next(name for name in states if "s0_alpha" in name)].fill_(value)

    return change


def drop(states: dict[str, Tensor]) -> None:
    for name in [name for name in states if "s0_alpha" in name]:
        del states[name]


def drop_one(states: dict[str, Tensor]) -> None:
    del states[next(name for name in states if "s0_alpha" in name)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put(float("nan")), r"s0_alpha.*has 1 of 1 values that are NaN or infinite"),
        (put(float("inf")), r"s0_alpha.*has 1 of 1 values that are NaN or infinite"),
        (drop, r"they come without learnt alphas, but adapter 'default' has learn_alpha=True"),
        (drop_one, r"missing in the file: .*s0_alpha"),
    ],
    ids=["nan", "inf", "none", "one_less"],
)
def test_broken_files(architecture: Architecture, saved: Path, change, message: str) -> None:
    change_states(saved, change)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(architecture.build(), saved)
    tuned = learning(architecture)
    before = alphas(tuned.model)
    with pytest.raises(ValueError, match=message):
        tuned.model.hotswap_adapter(saved, "default")
    assert alphas(tuned.model) == before


@torch.no_grad()
def test_hot_swap(architecture: Architecture, saved: Path, tmp_path: Path) -> None:
    tuned = tune(architecture, seed=3, learn_alpha=True)
    before, ids = [id(scale) for scale in scales(tuned.model)], tuned.ids(2, 9)
    tuned.model.hotswap_adapter(saved, "default")
    assert [id(scale) for scale in scales(tuned.model)] == before
    loaded = PeftModel.from_pretrained(architecture.build(), saved)
    assert alphas(tuned.model) == alphas(loaded)
    plain = tune(architecture)
    with pytest.raises(ValueError, match=r"'default' has learn_alpha=False, but that of '.*saved' has True"):
        plain.model.hotswap_adapter(saved, "default")
    plain.model.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"'default' has learn_alpha=True, but that of '.*plain' has False"):
        tuned.model.hotswap_adapter(tmp_path / "plain", "default")
    assert torch.equal(
        tuned.model(ids).logits, PeftModel.from_pretrained(tune(architecture, 3).base, saved)(ids).logits
    )


def test_rows(architecture: Architecture) -> None:
    """Of adapters with learnt alphas and without; gradients of each are those of its rows."""
    tuned = learning(architecture)
    torch.manual_seed(1)
    for name, learn in (("second", False), ("third", True)):
        tuned.model.add_adapter(name, S0Config(alpha=0.6, init_weights=1.0, learn_alpha=learn, l2_lambda=0.0))
    tuned.model.eval()
    names, ids = ["third", "__base__", "default", "second"], tuned.ids(4, 9)
    actual = tuned.model(ids, adapter_names=names, use_cache=False).logits
    tuned.model.zero_grad()
    actual[2].square().sum().backward()
    found = [float(scale.grad) for scale in scales(tuned.model)]
    for i, name in enumerate(names):
        if name != "__base__":
            tuned.model.set_adapter(name)
            torch.testing.assert_close(actual[i], tuned.model(ids, use_cache=False).logits[i], atol=2e-6, rtol=0)
    assert torch.equal(actual[1], tuned.base(ids).logits[1])
    tuned.model.set_adapter("default")
    tuned.model.zero_grad()
    tuned.model(ids, use_cache=False).logits[2].square().sum().backward()
    assert found == pytest.approx([float(scale.grad) for scale in scales(tuned.model)], rel=1e-3)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted")
def test_combined_deleted_and_in_a_bank(architecture: Architecture, saved: Path) -> None:
    tuned = learning(architecture)
    ids = tuned.ids(2, 9)
    expected = tuned.model(ids).logits
    tuned.model.add_weighted_adapter(["default"], [1.0], "sum")
    assert not tuned.model.peft_config["sum"].learn_alpha
    assert not any("s0_alpha.sum" in name for name, _ in tuned.model.named_parameters())
    tuned.model.set_adapter("sum")
    assert torch.equal(tuned.model(ids).logits, expected)
    tuned.model.delete_adapter("default")
    assert not any("s0_alpha" in name for name in tuned.model.state_dict())
    for host in ("disk", "cpu"):
        bank = StateBank(tuned.model, capacity=1, host=host)
        bank.add("task", saved)
        assert torch.equal(bank(ids, tasks=["task"] * 2).logits, expected)
        bank.close()
    change_states(saved, drop_one)
    bank = StateBank(tuned.model, capacity=1)
    with pytest.raises(ValueError, match=r"missing in the file: .*s0_alpha"):
        bank.add("task", saved)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:calibrate_alpha. no alpha is better than 0")
def test_set_and_calibrated(architecture: Architecture, tmp_path: Path) -> None:
    """Written over what was learnt, which stays if nothing better is found or the search is interrupted."""
    tuned = learning(architecture)
    learnt, rows = alphas(tuned.model), token_rows(3)

    def score(model: PeftModel) -> float:
        return -sum((a - b) ** 2 for a, b in zip(alphas(model), learnt, strict=True))

    def interrupt(model: PeftModel) -> float:
        if alphas(model)[0] > 0.4:
            raise KeyboardInterrupt
        return 1.0

    with pytest.raises(KeyboardInterrupt):
        calibrate_alpha(tuned.model, interrupt, progress=False)
    assert alphas(tuned.model) == learnt
    result = calibrate_alpha(tuned.model, score, per_layer=1, progress=False)
    assert alphas(tuned.model) == pytest.approx(learnt, rel=1e-6)
    assert list(result.best.values()) == pytest.approx(learnt, rel=1e-6)
    result = calibrate_alpha(tuned.model, rows, [0.1, 1.3], progress=False)
    assert alphas(tuned.model) == pytest.approx([result.best] * architecture.states, rel=1e-6)
    tuned.model.set_alpha({next(iter(named_layers(tuned.model))): 0.5})
    assert alphas(tuned.model)[:2] == pytest.approx([0.5, result.best], rel=1e-6)
    tuned.model.save_pretrained(tmp_path)
    assert alphas(PeftModel.from_pretrained(architecture.build(), tmp_path)) == alphas(tuned.model)


def test_in_a_trainer(architecture: Architecture, tmp_path: Path) -> None:
    """States and alphas move, nothing else does; the logs say where the alphas are."""
    logs = []

    class Reporter(TrainerCallback):
        def on_log(self, *args, **kwargs) -> None:
            logs.append(dict(kwargs["logs"]))

    config = S0Config(alpha=1.0, init_weights=0.5, learn_alpha=True)
    trainer = sft(architecture, tmp_path, config, callbacks=[S0Callback(), Reporter()])
    train(trainer)
    learnt = values(trainer.model)
    last = [entry for entry in logs if "loss" in entry][-1]
    assert last["s0/alpha"] == pytest.approx(sum(learnt) / len(learnt), rel=1e-6)
    assert (last["s0/alpha_min"], last["s0/alpha_max"]) == (min(learnt), max(learnt))
    states = raw(trainer.model).values()
    assert last["s0/penalty"] == pytest.approx(5e-4 * sum(float(state.detach().square().sum()) for state in states))
    assert last["s0/norm_max"] == pytest.approx(max(float(state.detach().norm()) for state in states))


def test_logs_of_alphas_alone(architecture: Architecture) -> None:
    """And of alphas that the config gives layer by layer."""
    for config, frozen in (({"learn_alpha": True}, True), ({}, False)):
        model = tune(architecture, alpha_pattern={r"layers\.1\..*": 0.2}, **config).model
        for name, parameter in model.named_parameters():
            if frozen and ".s0_state." in name:
                parameter.requires_grad_(False)
        callback = S0Callback()
        callback._layers = list(named_layers(model).values())
        logs = callback._values()
        assert (logs["s0/alpha_min"], logs["s0/alpha_max"]) == pytest.approx((0.2, 0.7))
        assert ("s0/norm_mean" in logs) is ("s0/penalty" in logs) is not frozen


def test_the_reference_of_trl_is_a_copy(architecture: Architecture, tmp_path: Path) -> None:
    model = get_peft_model(architecture.build(), S0Config(alpha=1.0, init_weights=1.0, learn_alpha=True))
    model.set_alpha(by_layer(model))
    trainer = DPOTrainer(
        model,
        args=DPOConfig(output_dir=str(tmp_path), **{**ARGUMENTS, "max_steps": 1}),
        train_dataset=pairs(),
        processing_class=tokenizer(),
    )
    assert alphas(trainer.model, "ref") == alphas(trainer.model) == alphas(model)
    before = alphas(trainer.model)
    train(trainer)
    assert alphas(trainer.model, "ref") == before
    assert all(a != b for a, b in zip(alphas(trainer.model), before, strict=True))


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*find_unused_parameters")
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_engines(architecture: Architecture, one_process: None, engine: str) -> None:
    """The gradients of one process, in each of two steps from a state of zero."""
    found = []
    for use in (False, True):
        tuned = tune(architecture, learn_alpha=True, init_weights=True)
        ids, model = tuned.ids(2, 9), tuned.model.train()
        if use and engine == "ddp":
            model = nn.parallel.DistributedDataParallel(model)
        elif use:
            for layer in named_layers(tuned.model).values():
                for learnt in layer.learnt_tensors("default").values():
                    fully_shard(learnt)
            fully_shard(model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            loss_of(model, ids, use_cache=False).backward()
            optimizer.step()
        found.append([scale.full_tensor() if hasattr(scale, "full_tensor") else scale for scale in scales(tuned.model)])
    for plain, engines in zip(*found, strict=True):
        torch.testing.assert_close(engines, plain, atol=1e-6, rtol=1e-5)
        assert float(plain.detach()) != pytest.approx(0.7, abs=1e-5)


def test_compiled() -> None:
    """One graph for a training step, whatever the alphas become, and the gradients of the model as it is."""
    tuned = learning(ROWS["falcon_h1"])
    ids, graphs = tuned.ids(2, 9), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    expected = gradients(tuned, ids)
    torch._dynamo.reset()
    compiled = replace(tuned, model=torch.compile(tuned.model, backend=backend, fullgraph=True))
    assert gradients(compiled, ids) == pytest.approx(expected, rel=1e-4)
    tuned.model.set_alpha(0.5)
    found = gradients(compiled, ids)
    assert len(graphs) == 1
    torch._dynamo.reset()
    assert found == pytest.approx(gradients(tuned, ids), rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learn_alpha": 1}, "learn_alpha must be True or False, got 1"),
        ({"learn_alpha": True, "train_alpha": 1.0}, r"train_alpha=1.0 would replace it in training. Leave train_alpha"),
    ],
)
def test_bad_values(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        S0Config(**arguments)


def test_without_it_there_is_no_parameter(tuned: Tuned) -> None:
    assert not any("s0_alpha" in name for name in tuned.model.state_dict())
    assert not any("s0_alpha" in name for name in get_peft_model_state_dict(tuned.model))
