"""Several adapters on one model, and rows of different adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, Architecture, mixers
from peft import (
    PeftModel,
    get_base_model_state_dict,
    get_peft_model,
    inject_adapter_in_model,
    set_base_model_state_dict,
)
from peft.helpers import disable_input_dtype_casting
from peft.tuners.tuners_utils import BaseTuner
from test_law import left_pad
from torch import nn
from tuned import Tuned, tune

from peft_s0 import S0Config, recurrent_layers


@pytest.fixture(autouse=True, scope="module")
def _no_grad():
    with torch.no_grad():
        yield


def add(tuned: Tuned, name: str, seed: int, **config: object) -> None:
    """Another adapter with random states."""
    torch.manual_seed(seed)
    tuned.model.add_adapter(name, S0Config(**{"alpha": 0.6, "init_weights": 1.0, **config}))


def logits(tuned: Tuned, ids: torch.Tensor, adapter: str | list[str]) -> torch.Tensor:
    tuned.model.base_model.set_adapter(adapter)
    return tuned.model(ids).logits


def test_switching(tuned: Tuned) -> None:
    ids = tuned.ids(2, 9)
    first = tuned.model(ids).logits
    add(tuned, "second", 1)
    assert torch.equal(tuned.model(ids).logits, first)
    tuned.model.set_adapter("second")
    second = tuned.model(ids).logits
    assert not torch.equal(second, first)
    tuned.model.set_adapter("default")
    assert torch.equal(tuned.model(ids).logits, first)
    trainable = {name for name, p in tuned.model.named_parameters() if p.requires_grad}
    assert trainable
    assert all(".default." in name for name in trainable)


def test_states_of_active_adapters_add_up(tuned: Tuned) -> None:
    add(tuned, "second", 1)
    layers = list(tuned.model.base_model.tuner_layers())
    for layer in layers:
        both = layer.effective_state("default") + layer.effective_state("second")
        layer.set_adapter(["default", "second"])
        states = layer.start_states(2, torch.device("cpu"))
        assert torch.equal(states, torch.stack([both, both]))


def test_several_active_adapters(tuned: Tuned) -> None:
    ids = tuned.ids(2, 9)
    add(tuned, "second", 1, rank=2, normalize=True)
    alone = [logits(tuned, ids, name) for name in ("default", "second")]
    both = logits(tuned, ids, ["default", "second"])
    assert tuned.model.active_adapters == ["default", "second"]
    assert not any(torch.equal(both, one) for one in alone)
    tuned.model.base_model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum")
    torch.testing.assert_close(logits(tuned, ids, "sum"), both, atol=1e-5, rtol=0)
    with pytest.raises(
        ValueError, match=r"Unknown adapters \['third'\]; this model has \['default', 'second', 'sum'\]"
    ):
        tuned.model.base_model.set_adapter(["default", "third"])
    assert tuned.model.active_adapters == ["sum"]


def test_names_are_read_once(tuned: Tuned) -> None:
    """A list that was passed is its caller's to change, and what gives its names once serves all layers."""
    add(tuned, "second", 1)
    ids, tuner = tuned.ids(2, 9), tuned.model.base_model
    alone = logits(tuned, ids, "default")
    for choose in (tuner.set_adapter, *(layer.set_adapter for layer in tuner.tuner_layers())):
        names = ["default"]
        choose(names)
        names.append("second")
        assert torch.equal(tuned.model(ids).logits, alone)
    assert torch.equal(logits(tuned, ids, iter(names)), logits(tuned, ids, names))


def test_weighted_adapter(tuned: Tuned) -> None:
    ids = tuned.ids(2, 9)
    add(tuned, "second", 1, rank=2, normalize=True)
    tuned.model.base_model.add_weighted_adapter(["default", "second"], [0.3, 0.7], "soup")
    for layer in tuned.model.base_model.tuner_layers():
        expected = 0.3 * layer.effective_state("default") + 0.7 * layer.effective_state("second")
        torch.testing.assert_close(layer.effective_state("soup"), expected)
    tuned.model.base_model.add_weighted_adapter(["default"], [1.0], "copy")
    assert torch.equal(logits(tuned, ids, "copy"), logits(tuned, ids, "default"))


@pytest.mark.parametrize("arguments", [{"train_alpha": 1.0}, {"train_alpha": 1.0, "normalize": True, "alpha": 20.0}])
def test_a_weighted_adapter_made_in_training_mode(architecture: Architecture, arguments: dict) -> None:
    """It starts from what the others' sequences start from in use, not from the states as training scales them."""
    tuned = tune(architecture, **arguments)
    ids = tuned.ids(2, 9)
    expected = tuned.model(ids).logits
    tuned.model.train()
    tuned.model.base_model.add_weighted_adapter(["default"], [1.0], "copy")
    assert all(module.training for module in tuned.model.modules())
    tuned.model.eval()
    assert torch.equal(logits(tuned, ids, "copy"), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (["default", "other"], [1.0, 1.0], "soup"),
            r"Unknown adapters \['other'\]; this model has \['default', 'few', 'tokens', 'whole'\]",
        ),
        ((["default"], [1.0, 1.0], "soup"), "1 adapters and 2 weights"),
        ((["default"], [float("nan")], "soup"), "A weight must be a finite number, got nan"),
        ((["default"], ["x"], "soup"), "A weight must be a finite number, got 'x'"),
        ((["default"], [None], "soup"), "A weight must be a finite number, got None"),
        ((["default"], [1e40], "soup"), r"not finite in float32 with the weights \[1e\+40\]: too large"),
        ((["default"], [1.0], "default"), "exists already"),
        ((["default"], [1.0], "soup", "svd"), "'linear' only, got 'svd'"),
        ((["default", "few"], [1.0, 1.0], "soup"), "do not cover the same layers"),
        ((["default", "whole"], [1.0, 1.0], "soup"), "adapter 'whole' has modules_to_save"),
        ((["tokens"], [1.0], "soup"), "adapter 'tokens' has .*trainable_token_indices"),
    ],
)
def test_weighted_adapter_errors(tuned: Tuned, arguments: tuple, message: str) -> None:
    add(tuned, "few", 1, layers_to_transform=[0])
    add(tuned, "whole", 1, modules_to_save=["lm_head"])
    add(tuned, "tokens", 1, trainable_token_indices=[5])
    names = list(tuned.model.peft_config)
    with pytest.raises(ValueError, match=message):
        tuned.model.base_model.add_weighted_adapter(*arguments)
    assert list(tuned.model.peft_config) == names
    assert not any("soup" in name for name in tuned.model.state_dict())


@pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted")
def test_delete(tuned: Tuned) -> None:
    ids = tuned.ids(2, 9)
    first = tuned.model(ids).logits
    add(tuned, "second", 1)
    tuned.model.set_adapter("second")
    tuned.model.delete_adapter("second")
    assert list(tuned.model.peft_config) == ["default"]
    assert torch.equal(tuned.model(ids).logits, first)
    assert not any("second" in name for name in tuned.model.state_dict())
    add(tuned, "third", 2)
    tuned.model.delete_adapter("third")
    assert torch.equal(tuned.model(ids).logits, first)
    tuned.model.delete_adapter("default")
    assert not tuned.model.peft_config
    assert torch.equal(tuned.model.base_model(ids).logits, tuned.base(ids).logits)
    add(tuned, "default", 1)
    tuned.model.set_adapter("default")
    assert not torch.equal(tuned.model(ids).logits, tuned.base(ids).logits)


def test_layers_to_transform_and_exclude(architecture: Architecture) -> None:
    for arguments in ({"layers_to_transform": [1]}, {"exclude_modules": r".*layers\.[02-9]\d*\..*"}):
        model = get_peft_model(architecture.build(), S0Config(**arguments))
        assert [name.split(".")[2] for name in model.targeted_module_names] == ["1"]


def adapted(model: nn.Module, **config: object) -> list[str]:
    """Names of the mixers that a config adapts."""
    return get_peft_model(model, S0Config(alpha=1.0, **config)).targeted_module_names


@pytest.mark.parametrize("row", ARCHITECTURES, ids=lambda architecture: architecture.name)
def test_a_part_of_the_recurrent_layers(row: Architecture) -> None:
    """As docs/peft.md says it: indices count all decoder layers, and not every one is recurrent."""
    model = row.build()
    recurrent = recurrent_layers(model)
    names = [name for name, module in model.named_modules() if any(module is mixer for mixer in mixers(model))]
    assert [int(next(part for part in name.split(".") if part.isdigit())) for name in names] == recurrent
    assert adapted(model, layers_to_transform=recurrent[: len(recurrent) // 2]) == names[: len(recurrent) // 2]


def test_layers_to_transform_beside_other_fields(architecture: Architecture) -> None:
    name = "linear_attn" if architecture.name == "qwen3_5" else "mamba"
    full = f"model.layers.1.{name}"
    for config in (
        {"target_modules": rf"model\.layers\.\d+\.{name}", "layers_to_transform": 1},
        {"target_modules": [name], "layers_to_transform": [1, 99], "layers_pattern": "layers"},
        {"target_modules": [name], "layers_to_transform": [1], "layers_pattern": ["blocks", "layers"]},
        {"target_modules": [f"model.layers.0.{name}", full], "layers_to_transform": [1]},
        {"target_modules": [name], "layers_to_transform": [0, 1], "exclude_modules": [f"layers.0.{name}"]},
    ):
        assert adapted(architecture.build(), **config) == [full], config
    with pytest.raises(ValueError, match="matches nothing"):
        adapted(architecture.build(), layers_to_transform=[1], layers_pattern="blocks")
    # In PEFT, no index is every layer.
    assert len(adapted(architecture.build(), layers_to_transform=[])) == architecture.states


@pytest.mark.parametrize("row", ARCHITECTURES, ids=lambda architecture: architecture.name)
def test_layers_to_transform_on_every_architecture(row: Architecture) -> None:
    """Also where mixers are targeted by their full names, and in a backbone that starts at its list of layers."""
    model = row.build()
    names = [name for name, module in model.named_modules() if any(module is mixer for mixer in mixers(model))]
    last = int(next(part for part in names[-1].split(".") if part.isdigit()))
    expected = [name for name in names if f".{last}." in name]
    assert adapted(row.build(), layers_to_transform=[last]) == expected
    if not model.base_model_prefix:
        return  # a class around another class with a head, and no backbone of its own
    backbone = getattr(model, model.base_model_prefix)
    prefix = f"{model.base_model_prefix}."
    assert adapted(backbone, layers_to_transform=[last]) == [name.removeprefix(prefix) for name in expected]


def test_attributes_of_the_model_are_reached(architecture: Architecture) -> None:
    """PEFT passes on to the model what a tuner does not have, so nothing that S0 adds may hide it."""
    for base in (architecture.build(), architecture.build().model):
        own = {name for name in dir(type(get_peft_model(base, S0Config()).base_model)) if not name.startswith("_")}
        assert not (own - set(dir(BaseTuner))) & (set(dir(base)) | {name for name, _ in base.named_children()})
    model = get_peft_model(architecture.build().model, S0Config())
    assert model.layers[0] is model.get_base_model().layers[0]


def test_fewer_layers_are_exact(architecture: Architecture) -> None:
    tuned = tune(architecture, layers_to_transform=[1])
    rows = [tuned.ids(1, 12)[0], tuned.ids(1, 5)[0]]
    ids, mask, positions = left_pad(rows)
    logits = tuned.model(ids, attention_mask=mask, position_ids=positions).logits[1:, -5:]
    tuned.assert_equal(logits, tuned.expected(rows[1][None]), tuned.effect(rows[1][None]))


NAMES = ["second", "__base__", "default", "second"]


@pytest.fixture
def mixed(architecture: Architecture) -> Tuned:
    tuned = tune(architecture)
    add(tuned, "second", 1)
    return tuned


def test_an_adapter_for_each_row(mixed: Tuned) -> None:
    ids = mixed.ids(4, 9)
    actual = mixed.model(ids, adapter_names=NAMES).logits
    assert torch.equal(actual[1], mixed.base(ids).logits[1])
    for i, name in enumerate(NAMES):
        if name != "__base__":
            torch.testing.assert_close(actual[i], logits(mixed, ids, name)[i], atol=2e-6, rtol=0)


def test_padded_rows_of_different_adapters(mixed: Tuned) -> None:
    ids, mask, positions = left_pad([mixed.ids(1, n, seed=n)[0] for n in (12, 7, 5, 4)])
    arguments = {"attention_mask": mask, "position_ids": positions}
    actual = mixed.model(ids, adapter_names=NAMES, **arguments).logits
    # The base model's own arithmetic at its pads, to the last bit.
    assert torch.equal(actual[1], mixed.base(ids, **arguments).logits[1])
    for i, name in enumerate(NAMES):
        if name != "__base__":
            mixed.model.set_adapter(name)
            alone = mixed.model(ids[i : i + 1][:, mask[i].bool()]).logits[0]
            torch.testing.assert_close(actual[i][mask[i].bool()], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "generation",
    [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}, {"num_return_sequences": 2, "do_sample": True}],
)
def test_generate_with_an_adapter_for_each_row(mixed: Tuned, generation: dict) -> None:
    ids, mask, _ = left_pad([mixed.ids(1, n, seed=n)[0] for n in (8, 7, 1, 4)])
    arguments = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, **generation}
    repeats = generation.get("num_return_sequences", 1)
    torch.manual_seed(0)
    actual = mixed.model.generate(ids, adapter_names=NAMES, **arguments).view(4, repeats, -1)
    for name in ("default", "second", "__base__"):
        torch.manual_seed(0)
        if name == "__base__":
            expected = mixed.base.generate(ids, **arguments)
        else:
            mixed.model.set_adapter(name)
            expected = mixed.model.generate(ids, **arguments)
        expected = expected.view(4, repeats, -1)
        for i in range(4):
            if NAMES[i] == name and not generation.get("do_sample"):
                length = min(actual.shape[-1], expected.shape[-1])
                assert torch.equal(actual[i, :, :length], expected[i, :, :length])
    assert all(layer.routing.rows is None for layer in mixed.model.base_model.tuner_layers())


def test_all_rows_base(mixed: Tuned) -> None:
    for tokens in (1, 9):
        ids = mixed.ids(2, tokens)
        assert torch.equal(mixed.model(ids, adapter_names=["__base__"] * 2).logits, mixed.base(ids).logits)


def test_routing_ends_with_an_exception(mixed: Tuned) -> None:
    ids = mixed.ids(4, 9)
    expected = mixed.model(ids).logits
    with pytest.raises((AttributeError, TypeError), match=r"ndim|shape|string indices"):
        mixed.model(ids, adapter_names=NAMES, position_ids="nonsense")
    assert torch.equal(mixed.model(ids).logits, expected)


def test_modules_to_save_and_tokens(architecture: Architecture, tmp_path) -> None:
    tuned = tune(architecture, modules_to_save=["lm_head"], trainable_token_indices=[5, 7])
    trainable = [name for name, p in tuned.model.named_parameters() if p.requires_grad]
    assert any("lm_head" in name for name in trainable)
    assert any("token_adapter" in name for name in trainable)
    with torch.no_grad():
        for parameter in tuned.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
    tuned.model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(architecture.build(), tmp_path)
    ids = tuned.ids(2, 9)
    assert torch.equal(loaded(ids).logits, tuned.model(ids).logits)


def test_unload_with_modules_to_save_and_tokens(architecture: Architecture) -> None:
    """As LoRA does it: tokens are those of the base model again, whole modules stay as they were trained."""
    tuned = tune(architecture, trainable_token_indices=[5, 7])
    for name, parameter in tuned.model.named_parameters():
        if "trainable_tokens" in name:
            parameter.add_(1.0)
    ids = torch.full((1, 4), 5)
    assert not torch.equal(tuned.model(ids).logits, tuned.base(ids).logits)
    model = tuned.model.unload()
    assert [name for name, _ in model.named_modules()] == [name for name, _ in tuned.base.named_modules()]
    assert not hasattr(model, "peft_config")
    assert torch.equal(model(ids).logits, tuned.base(ids).logits)
    again = tune(architecture, modules_to_save=["lm_head"]).model
    head = again.base_model.model.lm_head.modules_to_save["default"]
    assert again.unload().lm_head is head


@pytest.mark.parametrize("name", ["s0", "s0_x", "state"])
@pytest.mark.filterwarnings("ignore:Adapter name")
def test_adapter_names_like_the_prefix(architecture: Architecture, name: str, tmp_path) -> None:
    model = get_peft_model(architecture.build(), S0Config(init_weights=1.0), adapter_name=name).eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(architecture.build(), tmp_path / name, adapter_name=name)
    ids = torch.randint(3, 99, (2, 7))
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_status(tuned: Tuned) -> None:
    status = tuned.model.get_model_status()
    assert status.active_adapters == ["default"]
    assert status.peft_types == {"default": "S0"}
    assert status.num_adapter_layers == len(mixers(tuned.base))
    assert status.merged_adapters == []
    assert status.devices == {"default": ["cpu"]}
    assert status.enabled is True
    add(tuned, "few", 1, layers_to_transform=[0])
    layers = tuned.model.get_layer_status()
    names = [
        name for name, module in tuned.base.named_modules() if any(module is mixer for mixer in mixers(tuned.base))
    ]
    assert [layer.name for layer in layers] == [f"model.{name}.s0" for name in names]
    assert {layer.module_type for layer in layers} == {"S0Layer"}
    assert [layer.available_adapters for layer in layers] == [["default", "few"], *[["default"]] * (len(names) - 1)]
    assert [layer.requires_grad["default"] for layer in layers] == [True] * len(names)
    assert layers[0].requires_grad["few"] is False
    with tuned.model.disable_adapter():
        assert tuned.model.get_model_status().enabled is False
    assert tuned.model.get_model_status().enabled is True


def test_print_trainable_parameters(tuned: Tuned, capsys: pytest.CaptureFixture) -> None:
    states = sum(p.numel() for name, p in tuned.model.named_parameters() if "s0_state" in name)
    total = sum(p.numel() for p in tuned.base.parameters()) + states
    assert tuned.model.get_nb_trainable_parameters() == (states, total)
    tuned.model.print_trainable_parameters()
    assert f"trainable params: {states:,d} || all params: {total:,d}" in capsys.readouterr().out


def test_freeze_and_unfreeze(tuned: Tuned) -> None:
    add(tuned, "second", 1)

    def trained() -> set[str]:
        return {name.split(".")[-2] for name, p in tuned.model.named_parameters() if p.requires_grad}

    assert trained() == {"default"}
    tuned.model.set_requires_grad("second")
    assert trained() == {"default", "second"}
    tuned.model.set_requires_grad(["default", "second"], requires_grad=False)
    assert trained() == set()
    tuned.model.set_adapter("second")
    assert trained() == {"second"}
    tuned.model.set_adapter("default", inference_mode=True)
    assert trained() == set()


def test_the_base_models_own_weights(tuned: Tuned) -> None:
    ids = tuned.ids(2, 9)
    weights = get_base_model_state_dict(tuned.model)
    assert weights.keys() == tuned.base.state_dict().keys()
    other = tune(tuned.architecture, seed=1)
    with torch.no_grad():
        for name, parameter in other.model.named_parameters():
            if "s0_state" in name:
                parameter.copy_(tuned.model.get_parameter(name))
    result = set_base_model_state_dict(other.model, weights)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert torch.equal(other.model(ids).logits, tuned.model(ids).logits)


def test_peft_without_input_casts(tuned: Tuned) -> None:
    ids = tuned.ids(2, 9)
    expected = tuned.model(ids).logits
    with disable_input_dtype_casting(tuned.model):
        assert torch.equal(tuned.model(ids).logits, expected)


# A name that is there already.


def make(architecture: Architecture, base: nn.Module, **config: object) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(base, S0Config(**{"alpha": 0.7, "init_weights": 1.0, **config})).eval()


def shown(model: nn.Module) -> dict[str, tuple[bool, torch.Tensor]]:
    """All parameters, and whether they are trained."""
    return {name: (parameter.requires_grad, parameter) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("earlier", "later"),
    [
        ({}, {}),
        ({"variant": "both"}, {}),
        ({"variant": "offset"}, {"rank": 2}),
        ({"learn_alpha": True, "alpha": 5.0}, {}),
        ({"alpha_pattern": {r"layers\.0\..*": 5.0}}, {"inference_mode": True}),
        ({}, {"layers_to_transform": [0]}),
        ({"layers_to_transform": [0]}, {}),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`", "ignore:You are trying to modify a model with PEFT")
def test_a_name_again(architecture: Architecture, tmp_path: Path, earlier: dict, later: dict) -> None:
    """As where a cell of a notebook is run twice: nothing is left of the adapter that was made first."""
    if later.get("inference_mode"):
        # Its states are loaded.
        make(architecture, architecture.build()).save_pretrained(tmp_path / "states")
    base = architecture.build()
    make(architecture, base, **earlier)
    again, fresh = (make(architecture, model, **later) for model in (base, architecture.build()))
    if later.get("inference_mode"):
        for model in (again, fresh):
            model.load_adapter(tmp_path / "states", "default")
    assert again.peft_config == fresh.peft_config
    assert [name for name, _ in again.named_modules()] == [name for name, _ in fresh.named_modules()]
    expected = shown(fresh)
    assert list(shown(again)) == list(expected)
    for name, (trained, parameter) in shown(again).items():
        assert trained == expected[name][0], name
        assert torch.equal(parameter, expected[name][1]), name
    row = torch.tensor([[1, 5, 9, 4]])
    assert torch.equal(again(row).logits, fresh(row).logits)
    again.save_pretrained(tmp_path)
    # On a base that has one, too.
    for model in (architecture.build(), base):
        loaded = PeftModel.from_pretrained(model, tmp_path)
        assert torch.equal(loaded(row).logits, fresh(row).logits)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_a_name_again_beside_another_adapter(tuned: Tuned) -> None:
    add(tuned, "second", 1)
    ids = tuned.ids(2, 9)
    expected = logits(tuned, ids, "second")
    inject_adapter_in_model(S0Config(layers_to_transform=[0]), tuned.model.get_base_model())
    assert torch.equal(logits(tuned, ids, "second"), expected)
    assert torch.equal(logits(tuned, ids, "default"), tuned.base(ids).logits)
    assert sum("default" in layer.configs for layer in tuned.model.base_model.tuner_layers()) == 1


@pytest.mark.parametrize("more", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [5]}], ids=str)
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_a_name_again_of_an_adapter_that_trains_more(architecture: Architecture, more: dict) -> None:
    model = make(architecture, architecture.build(), **more)
    row = torch.tensor([[1, 5, 9, 4]])
    expected, config = model(row).logits, model.peft_config["default"]
    with pytest.raises(ValueError, match=r"has an adapter 'default' already .*Take it away first, by unload\(\)"):
        inject_adapter_in_model(S0Config(), model.get_base_model())
    assert model.peft_config["default"] is config
    assert torch.equal(model(row).logits, expected)


@pytest.mark.parametrize("by", ["peft", "peft_at_once", "transformers"])
def test_loaded_under_inference_mode(tuned: Tuned, tmp_path: Path, by: str) -> None:
    """As in a script whose main function is decorated; what was made there may be used, and replaced, elsewhere."""
    ids = tuned.ids(2, 9)
    expected = tuned.model(ids).logits
    tuned.model.save_pretrained(tmp_path)
    with torch.inference_mode():
        model = tuned.architecture.build()
        if by == "transformers":
            model.load_adapter(tmp_path)
        else:
            model = PeftModel.from_pretrained(model, tmp_path, low_cpu_mem_usage=by == "peft_at_once")
        assert torch.equal(model(ids).logits, expected)
    assert torch.equal(model(ids).logits, expected)
    if by == "peft":
        model.hotswap_adapter(tmp_path, "default")
        assert torch.equal(model(ids).logits, expected)


def test_made_under_inference_mode(architecture: Architecture) -> None:
    """And trained elsewhere."""
    base = architecture.build()
    with torch.inference_mode():
        model = get_peft_model(base, S0Config(init_weights=1.0))
    with torch.enable_grad():
        model(torch.tensor([[5, 6, 7]])).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
