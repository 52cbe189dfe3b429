"""One alpha for all layers, alphas of their own for some, and changing them on a loaded model."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, Architecture
from peft import PeftModel, get_peft_model
from reference import with_slow_mixers
from test_classes import IDS, Family, hidden
from torch import Tensor
from tuned import Tuned, tune

from peft_s0 import S0Config, S0Layer, StateBank, calibrate_alpha

ROWS = {row.name: row for row in ARCHITECTURES}
ALPHAS = (0.3, 1.7, 0.9)


@pytest.fixture(autouse=True, scope="module")
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def named_layers(model: PeftModel) -> dict[str, S0Layer]:
    """The tuner layers by their mixers' names in the base model."""
    modules = model.get_base_model().named_modules()
    return {name.removesuffix(".s0"): module for name, module in modules if isinstance(module, S0Layer)}


def by_layer(model: PeftModel) -> dict[str, float]:
    """A different alpha for each layer, by its name."""
    return dict(zip(named_layers(model), ALPHAS, strict=False))


def raw(model: PeftModel, adapter: str = "default") -> dict[str, Tensor]:
    """The unscaled states, by their mixers' names."""
    return {name: layer.s0_state[adapter].weight for name, layer in named_layers(model).items()}


@torch.no_grad()
def alphas(model: PeftModel, adapter: str = "default") -> list[float]:
    """What each state is really multiplied by, measured at its largest entry."""
    found = []
    for layer in named_layers(model).values():
        state, index = layer.s0_state[adapter].weight, layer.s0_state[adapter].weight.abs().argmax()
        found.append(float(layer.effective_state(adapter).flatten()[index] / state.flatten()[index]))
    return found


def test_each_layer_starts_from_its_own_alpha(architecture: Architecture) -> None:
    tuned = tune(architecture)
    pattern = {f"layers.{name.split('.')[2]}.{name.split('.')[3]}": a for name, a in by_layer(tuned.model).items()}
    pattern.popitem()
    mine = tune(architecture, alpha_pattern=pattern)
    expected = [*list(pattern.values()), 0.7]
    states = {name: alpha * state for (name, state), alpha in zip(raw(mine.model).items(), expected, strict=True)}
    ids = tuned.ids(2, 9)
    slow = with_slow_mixers(tuned.base, architecture.slow_mixer, states)
    tuned.assert_equal(mine.model(ids).logits, slow(ids, use_cache=False).logits, tuned.effect(ids))


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ({r"layers\.[01]\..*": 0.5}, [0.5, 0.5, 0.7]),
        ({"model.layers.0.linear_attn": 0.5}, [0.5, 0.7, 0.7]),
        ({"linear_attn": 0.5}, [0.5, 0.5, 0.5]),
        ({"0.linear_attn": 0, "1.linear_attn": 2}, [0.0, 2.0, 0.7]),
        # The first that matches, and sorted they would be the other way round.
        ({"layers.1.linear_attn": 0.2, "[a-z_.0-9]+": 0.4}, [0.4, 0.2, 0.4]),
        ({"linear_attn": 0.4, "layers.1.linear_attn": 0.2}, [0.4, 0.4, 0.4]),
        ({"model.language_model.layers.2.linear_attn": 0.5}, [0.7, 0.7, 0.5]),
    ],
    ids=str,
)
def test_patterns(pattern: dict[str, float], expected: list[float], tmp_path: Path) -> None:
    """Applied, saved with its keys sorted, and loaded to the same."""
    tuned = tune(ROWS["qwen3_5"], alpha_pattern=pattern)
    assert alphas(tuned.model) == pytest.approx(expected, rel=1e-6)
    tuned.model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["alpha"] == 0.7
    loaded = PeftModel.from_pretrained(tuned.architecture.build(), tmp_path)
    assert alphas(loaded) == alphas(tuned.model)
    assert torch.equal(loaded(tuned.ids(2, 9)).logits, tuned.model(tuned.ids(2, 9)).logits)


@pytest.mark.parametrize("name", ["qwen3_5", "nemotron_h"])
def test_every_class_has_the_alphas_of_every_other(name: str, tmp_path: Path) -> None:
    """By full names of the class that they were trained on, and as `set_alpha` writes them."""
    family = Family(ROWS[name])
    tuned = {}
    for number, saved in enumerate(family.classes):
        names = list(named_layers(family.tuned(saved)))
        values = dict(zip(names, ALPHAS, strict=False))
        tuned[saved] = family.tuned(saved, alpha_pattern=values if number % 2 else {})
        tuned[saved].set_alpha({} if number % 2 else values)
        assert alphas(tuned[saved]) == pytest.approx([*values.values()], rel=1e-6)
        tuned[saved].save_pretrained(tmp_path / saved)
    for first, second in family.pairs():
        loaded = PeftModel.from_pretrained(family.build(second), tmp_path / first).eval()
        assert alphas(loaded) == alphas(tuned[first])
        assert torch.equal(hidden(loaded, IDS), hidden(tuned[first], IDS))
        again = family.tuned(second)
        again.set_alpha({name: ALPHAS[i] for i, name in enumerate(named_layers(tuned[first]))})
        assert alphas(again) == alphas(tuned[first])


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ({"linear_attn": -1.0}, r"alpha_pattern\['linear_attn'\] must be a finite number >= 0, got -1.0"),
        ({"linear_attn": math.nan}, r"alpha_pattern\['linear_attn'\] must be"),
        ({"linear_attn": True}, r"alpha_pattern\['linear_attn'\] must be"),
        ({"(": 1.0}, r"alpha_pattern has '\(', which is no regular expression: missing \)"),
        ({"(?i)LAYERS.0": 1.0}, r"has '\(\?i\)LAYERS.0', whose flags could only stand .* into a group, such as \(\?i:"),
        ({3: 1.0}, r"must be a dict from names of mixers to alphas, got \{3: 1.0\}"),
        (["linear_attn"], r"must be a dict from names of mixers to alphas, got \['linear_attn'\]"),
    ],
)
def test_bad_patterns(pattern: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        S0Config(alpha_pattern=pattern)


@pytest.mark.parametrize("key", ["layers.9.mixer", "linear_attnn", "self_attn"])
def test_a_key_that_matches_nothing(architecture: Architecture, key: str) -> None:
    base = architecture.build()
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match=rf"alpha_pattern has \['{key}'\], which match none of the \d mixers.*layers"):
        get_peft_model(base, S0Config(alpha_pattern={key: 1.0}))
    assert [name for name, _ in base.named_modules()] == names
    with pytest.raises(ValueError, match=r"match none of the 1 mixers"):
        get_peft_model(base, S0Config(alpha_pattern={r"layers\.0\..*": 1.0}, layers_to_transform=[1]))


def test_training_and_normalising(architecture: Architecture) -> None:
    """`train_alpha` is the bare scale in training mode for every layer; the rest is for use. As the authors have it."""
    tuned = tune(architecture, train_alpha=1.0, normalize=True)
    values = by_layer(tuned.model)
    tuned.model.set_alpha(values)
    expected = {name: values[name] * state / state.square().sum().sqrt() for name, state in raw(tuned.model).items()}
    for name, layer in named_layers(tuned.model).items():
        torch.testing.assert_close(layer.effective_state("default"), expected[name], atol=1e-7, rtol=1e-6)
        layer.train()
        assert torch.equal(layer.effective_state("default"), raw(tuned.model)[name])
        layer.configs["default"].train_alpha = None
        torch.testing.assert_close(layer.effective_state("default"), expected[name], atol=1e-7, rtol=1e-6)
        layer.configs["default"].train_alpha = 1.0


def test_trained_bare_and_scaled_afterwards(architecture: Architecture) -> None:
    """What `train_alpha=1.0` learns does not depend on alpha, and what it is used with does not depend on training."""
    found = []
    for alpha in (0.05, 3.0):
        tuned = tune(architecture, alpha=alpha, train_alpha=1.0, init_weights=True)
        weights = list(raw(tuned.model).values())
        ids, optimiser = tuned.ids(2, 9), torch.optim.Adam(weights, lr=1e-2)
        tuned.model.train()
        with torch.enable_grad():
            for _ in range(2):
                optimiser.zero_grad()
                tuned.model(ids, labels=ids).loss.backward()
                optimiser.step()
        found.append([weight.detach().clone() for weight in weights])
        assert alphas(tuned.model) == pytest.approx([1.0] * architecture.states, rel=1e-6)
        tuned.model.eval()
        assert alphas(tuned.model) == pytest.approx([alpha] * architecture.states, rel=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert all(float(a.abs().max()) > 1e-3 for a in found[0])


def test_set_alpha(tuned: Tuned, tmp_path: Path) -> None:
    """At once, in the config, in rows, and in what is saved; the other adapters keep theirs."""
    torch.manual_seed(1)
    tuned.model.add_adapter("second", S0Config(alpha=0.6, init_weights=1.0))
    ids, names = tuned.ids(3, 9), ["second", "default", "__base__"]
    config = tuned.model.peft_config["default"]
    tuned.model.set_alpha(np.float32(0.25))
    assert (config.alpha, config.alpha_pattern) == (0.25, {})
    assert alphas(tuned.model) == pytest.approx([0.25] * tuned.architecture.states, rel=1e-6)
    first, *others = values = by_layer(tuned.model)
    tuned.model.set_alpha({name: values[name] for name in others})
    tuned.model.set_alpha({f"base_model.model.{first}": np.int64(2)})
    expected = [2.0, *(values[name] for name in others)]
    assert alphas(tuned.model) == pytest.approx(expected, rel=1e-6)
    assert alphas(tuned.model, "second") == pytest.approx([0.6] * tuned.architecture.states, rel=1e-6)
    rows = tuned.model(ids, adapter_names=names).logits
    alone = tuned.model(ids).logits
    tuned.model.set_adapter("second")
    torch.testing.assert_close(rows[0], tuned.model(ids).logits[0], atol=2e-6, rtol=0)
    torch.testing.assert_close(rows[1], alone[1], atol=2e-6, rtol=0)
    assert torch.equal(rows[2], tuned.base(ids).logits[2])
    tuned.model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tuned.architecture.build(), tmp_path)
    assert torch.equal(loaded(ids).logits, alone)
    tuned.model.set_alpha(0, "default")
    tuned.model.set_adapter("default")
    assert torch.equal(tuned.model(ids).logits, tuned.base(ids).logits)
    tuned.model.set_alpha(0.7)
    assert torch.equal(tuned.model(ids).logits, tune(tuned.architecture).model(ids).logits)


def test_set_alpha_of_a_layer_that_a_pattern_speaks_of(architecture: Architecture, tmp_path: Path) -> None:
    tuned = tune(architecture, alpha_pattern={r".*layers\..*": 0.4})
    name = list(named_layers(tuned.model))[1]
    tuned.model.set_alpha({name: 0.9})
    expected = [0.4, 0.9, 0.4][: architecture.states]
    assert alphas(tuned.model) == pytest.approx(expected, rel=1e-6)
    tuned.model.save_pretrained(tmp_path)
    assert alphas(PeftModel.from_pretrained(architecture.build(), tmp_path)) == pytest.approx(expected, rel=1e-6)


def test_set_alpha_refuses(tuned: Tuned) -> None:
    tuned.model.add_adapter("second", S0Config(alpha=0.6, init_weights=1.0))
    name, ids = next(iter(named_layers(tuned.model))), tuned.ids(1, 5)
    before, expected = copy.deepcopy(tuned.model.peft_config["default"]), tuned.model(ids).logits
    for alpha, message in (
        (-1.0, "set_alpha: alpha must be a finite number >= 0, got -1.0"),
        (math.inf, "set_alpha: alpha must be"),
        ("1", "set_alpha: alpha must be.*got '1'"),
        ({0: 1.0}, r"unknown layers \[0\]; adapter 'default' has model.lay"),
        ({name: 1.0, "layers.77.mamba": 1.0}, r"unknown layers \['layers.77.mamba'\]; adapter 'default' has model.lay"),
        ({name: math.nan}, f"the alpha of '{name}' must be a finite number >= 0, got nan"),
    ):
        with pytest.raises(ValueError, match=message):
            tuned.model.set_alpha(alpha)
    with pytest.raises(ValueError, match=r"Unknown adapter 'third'; this model has \['default', 'second'\]"):
        tuned.model.set_alpha(1.0, "third")
    tuned.model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"Pass adapter_name, one of \['default', 'second'\]: the active adapters are"):
        tuned.model.set_alpha(1.0)
    tuned.model.set_adapter("default")
    assert tuned.model.peft_config["default"] == before
    assert torch.equal(tuned.model(ids).logits, expected)


def test_adapters_that_were_made_from_one_config(tuned: Tuned, tmp_path: Path) -> None:
    """As TRL's reference adapter is made: each has its own alpha from then on."""
    tuned.model.add_adapter("ref", tuned.model.peft_config["default"])
    tuned.model.set_alpha(0.2)
    assert alphas(tuned.model) == pytest.approx([0.2] * tuned.architecture.states, rel=1e-6)
    assert alphas(tuned.model, "ref") == pytest.approx([0.7] * tuned.architecture.states, rel=1e-6)
    tuned.model.delete_adapter("ref")
    tuned.model.save_pretrained(tmp_path)
    assert S0Config.from_pretrained(tmp_path).alpha == 0.2


def test_models_that_were_made_from_one_config(architecture: Architecture, tmp_path: Path) -> None:
    """What changes an alpha of one of them changes none of the other, nor what it saves."""
    config = S0Config(alpha=0.7, init_weights=1.0)
    changed, kept = (get_peft_model(architecture.build(), config).eval() for _ in range(2))
    get_peft_model(architecture.build(), S0Config(alpha=2.5)).save_pretrained(tmp_path / "other")
    for change in (
        lambda: changed.set_alpha(3.0),
        lambda: changed.set_alpha({next(iter(named_layers(changed))): 5.0}),
        lambda: changed.hotswap_adapter(tmp_path / "other", "default"),
        lambda: calibrate_alpha(changed, lambda model: model.peft_config["default"].alpha, [0.1, 9.0]),
    ):
        change()
        assert alphas(kept) == pytest.approx([0.7] * architecture.states, rel=1e-6)
        kept.save_pretrained(tmp_path / "kept")
        saved = S0Config.from_pretrained(tmp_path / "kept")
        assert (saved.alpha, saved.alpha_pattern) == (0.7, {})
    assert changed.peft_config["default"].alpha == 9.0


def test_combined_and_deleted(tuned: Tuned) -> None:
    """Alphas are in the combined states; nothing of them is left for the next adapter of the same name."""
    values = by_layer(tuned.model)
    tuned.model.set_alpha(values)
    tuned.model.add_weighted_adapter(["default"], [0.5], "halved")
    assert tuned.model.peft_config["halved"].alpha_pattern == {}
    for layer in named_layers(tuned.model).values():
        assert torch.equal(layer.effective_state("halved"), 0.5 * layer.effective_state("default"))
    tuned.model.set_adapter("halved")
    tuned.model.delete_adapter("default")
    tuned.model.add_adapter("default", S0Config(alpha=0.6, init_weights=1.0))
    assert alphas(tuned.model) == pytest.approx([0.6] * tuned.architecture.states, rel=1e-6)


def test_a_bank_s_task(tuned: Tuned, tmp_path: Path) -> None:
    """A task has the alphas of its file, by layer; `set_alpha` is for the model's own adapters."""
    ids = tuned.ids(2, 9)
    tuned.model.set_alpha(by_layer(tuned.model))
    tuned.model.save_pretrained(tmp_path)
    expected = tuned.model(ids).logits
    bank = StateBank(tuned.model, capacity=1)
    bank.add("task", tmp_path)
    tuned.model.set_alpha(0.1)
    assert torch.equal(bank(ids, tasks=["task"] * 2).logits, expected)
    assert not torch.equal(tuned.model(ids).logits, expected)


def test_compiled_models() -> None:
    """What is compiled again: once when alpha changes first; once when layers get alphas of their own, once when these
    change first. No old value is ever used."""
    tuned, graphs = tune(ROWS["falcon_h1"]), []
    ids = tuned.ids(2, 9)

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(tuned.model, backend=backend, fullgraph=True)
    names, counts = list(named_layers(tuned.model)), []
    one_layer = [{names[0]: 0.5}, {names[1]: 0.6}]
    every_layer = [dict.fromkeys(names, alpha) for alpha in (0.3, 0.0)]
    for alpha in (0.7, 0.3, 0.0, *every_layer, *one_layer):
        compiled.set_alpha(alpha)
        expected = tuned.model(ids, use_cache=False).logits
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected, atol=2e-6, rtol=0)
        counts.append(len(graphs))
    assert counts == [1, 2, 2, 3, 4, 4, 4]
    torch._dynamo.reset()
