from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import MAIN, Architecture
from peft import get_peft_model, inject_adapter_in_model
from tuned import tune

from peft_s0 import S0Config, S0Layer


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variant": "offsett"}, "variant must be one of 'initial', 'offset', 'both', got 'offsett'"),
        ({"alpha": -0.1}, "alpha must be a finite number >= 0, got -0.1"),
        ({"alpha": math.nan}, "alpha must be a finite number"),
        ({"alpha": "0.07"}, "alpha must be a finite number >= 0, got '0.07'"),
        ({"train_alpha": math.inf}, "train_alpha must be"),
        ({"l2_lambda": -1.0}, "l2_lambda must be"),
        ({"l2_lambda": None}, "l2_lambda must be"),
        ({"rank": 0}, "rank must be an integer >= 1"),
        ({"rank": 1.5}, "rank must be an integer >= 1.*got 1.5"),
        ({"rank": True}, "rank must be an integer"),
        ({"init_weights": "zeros"}, "init_weights must be"),
        ({"init_weights": -1.0}, "init_weights must be"),
        ({"layers_pattern": "layers"}, "layers_to_transform"),
        ({"normalize": "no"}, "normalize must be True or False, got 'no'"),
        ({"learn_alpha": 1}, "learn_alpha must be True or False, got 1"),
        # PEFT would take each letter for the end of names, and train whatever ends so.
        ({"modules_to_save": "mlp"}, r"modules_to_save must be a list of names, got 'mlp'"),
    ],
)
def test_bad_values(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        S0Config(**arguments)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", r"adapter_config\.json' is no JSON object \(Expecting property name"),
        (b"\xff", r"adapter_config\.json' is no JSON object \(.* can't decode byte"),
        (b"1", r"adapter_config\.json' is no JSON object"),
        (b"[1]", r"adapter_config\.json' must hold a JSON object, found a list"),
        (b'{"peft_type": "FOO"}', r"adapter_config\.json' is of an adapter of the method 'FOO', which this PEFT"),
        (b'{"peft_type": null}', r"adapter_config\.json' is of an adapter of the method None"),
    ],
)
def test_files_that_are_no_config(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "adapter_config.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        S0Config.from_pretrained(tmp_path)


def test_sequences_are_as_they_are_in_a_file(tmp_path: Path) -> None:
    fields = {"modules_to_save": ("lm_head",), "trainable_token_indices": {"embed_tokens": (5, 7)}}
    config = S0Config(**fields)
    config.save_pretrained(tmp_path)
    for made in (config, S0Config.from_pretrained(tmp_path)):
        assert made.modules_to_save == ["lm_head"]
        assert made.trainable_token_indices == {"embed_tokens": [5, 7]}
    assert S0Config(trainable_token_indices=(5, 7)).trainable_token_indices == [5, 7]


@pytest.mark.parametrize("numbers", [range(1, 3), np.arange(1, 3), list(np.arange(1, 3)), torch.arange(1, 3)], ids=repr)
def test_numbers_that_no_file_takes(tmp_path: Path, numbers: Any) -> None:
    """A config that could not be written would be found out when the training is over."""
    fields = {"layers_to_transform": numbers, "trainable_token_indices": {"embed_tokens": numbers}}
    config = S0Config(**fields, init_weights="prompt", init_prompt=numbers)
    assert config == S0Config(
        layers_to_transform=[1, 2],
        trainable_token_indices={"embed_tokens": [1, 2]},
        init_weights="prompt",
        init_prompt=[1, 2],
    )
    config.save_pretrained(tmp_path)
    assert replace(S0Config.from_pretrained(tmp_path), inference_mode=False) == config


@pytest.mark.parametrize("kind", [np.float32, np.int64, torch.tensor], ids=["float32", "int64", "tensor"])
def test_single_numbers_that_no_file_takes(tmp_path: Path, kind: Callable[[int], Any]) -> None:
    names = ["alpha", "train_alpha", "l2_lambda", "init_weights", "rank"]
    config = S0Config(**{name: kind(2) for name in names if name != "rank" or kind is not np.float32})
    assert all(type(value) in (int, float) for name in names if (value := getattr(config, name)) is not None)
    config.save_pretrained(tmp_path)
    assert replace(S0Config.from_pretrained(tmp_path), inference_mode=False) == config


def test_alpha_is_the_familys_unless_given(architecture) -> None:
    for alpha, expected in ((None, architecture.alpha), (0.0, 0.0)):
        model = get_peft_model(architecture.build(), S0Config(alpha=alpha))
        assert model.peft_config["default"].alpha == expected


def test_target_modules_are_written_into_the_config(architecture) -> None:
    model = get_peft_model(architecture.build(), S0Config())
    config = model.peft_config["default"]
    assert len(model.targeted_module_names) == architecture.states
    if architecture.targets is None:
        # Attention stands under the same name.
        assert config.target_modules == set(model.targeted_module_names)
    else:
        assert config.target_modules == architecture.targets


@pytest.mark.parametrize(
    "make",
    [
        get_peft_model,
        lambda model, config: inject_adapter_in_model(config, model),
        lambda model, config: model.add_adapter(config),
    ],
    ids=["get_peft_model", "inject_adapter_in_model", "add_adapter"],
)
def test_one_config_for_several_models(architecture: Architecture, make: Callable) -> None:
    """Each has a copy, so that nothing that changes one of them reaches another."""
    config = S0Config(target_modules=["linear_attn", "mamba"], alpha_pattern={r"layers\.0\..*": 0.5})
    before = copy.deepcopy(config)
    models = [architecture.build() for _ in range(2)]
    for model in models:
        make(model, config)
    configs = [model.peft_config["default"] for model in models]
    assert configs[0].alpha == architecture.alpha
    configs[0].alpha = 3.0
    configs[0].alpha_pattern.clear()
    configs[0].target_modules.clear()
    for model, alphas in zip(models, ({3.0}, {0.5, architecture.alpha}), strict=True):
        layers = [module for module in model.modules() if isinstance(module, S0Layer)]
        assert {layer.alpha("default") for layer in layers} == alphas
    assert configs[1].target_modules
    # PEFT and transformers write the base model's name into it.
    assert replace(config, base_model_name_or_path=None) == before


def test_one_config_for_several_families() -> None:
    config = S0Config()
    for architecture in MAIN:
        model = get_peft_model(architecture.build(), config)
        assert model.peft_config["default"].alpha == architecture.alpha
        assert len(model.targeted_module_names) == architecture.states


def test_rank_beyond_the_state(architecture) -> None:
    with pytest.raises(ValueError, match=r"rank=17 is more than a head's state.*16"):
        get_peft_model(architecture.build(), S0Config(rank=17))


def test_scales(architecture) -> None:
    ids = tune(architecture).ids(2, 9)
    plain = tune(architecture, alpha=0.5)
    state = next(iter(plain.model.base_model.tuner_layers())).s0_state["default"].weight
    layer = next(iter(plain.model.base_model.tuner_layers()))
    config = plain.model.peft_config["default"]
    assert torch.equal(layer.effective_state("default"), 0.5 * state)
    config.normalize = True
    torch.testing.assert_close(layer.effective_state("default"), 0.5 * state / state.norm())
    config.train_alpha = 2.0
    torch.testing.assert_close(layer.effective_state("default"), 0.5 * state / state.norm())
    evaluated = plain.model(ids).logits
    plain.model.train()
    assert torch.equal(layer.effective_state("default"), 2 * state)
    assert not torch.equal(plain.model(ids).logits, evaluated)


def test_low_rank_state(architecture) -> None:
    tuned = tune(architecture, rank=2)
    for layer in tuned.model.base_model.tuner_layers():
        heads, rows, columns = layer.state_shape
        assert layer.s0_state["default"].weight.shape == (heads, rows + columns, 2)
        assert torch.linalg.matrix_rank(layer.effective_state("default")).tolist() == [2] * heads
    ids = tuned.ids(2, 9)
    with torch.no_grad():
        tuned.assert_equal(tuned.model(ids).logits, tuned.expected(ids), tuned.effect(ids))


def test_low_rank_starts_at_zero_and_learns(architecture) -> None:
    tuned = tune(architecture, rank=2, init_weights=True)
    ids = tuned.ids(2, 9)
    assert torch.equal(tuned.model(ids).logits, tuned.base(ids).logits)
    tuned.model(ids).logits.square().mean().backward()
    assert all(p.grad.abs().max() > 0 for p in tuned.model.parameters() if p.requires_grad)
