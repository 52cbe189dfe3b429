"""Several adapters on one model, rows of different adapters, and other PEFT methods beside S0."""

from __future__ import annotations

import pytest
import torch
from architectures import Architecture, mixers
from conftest import Tuned, tune
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from test_law import left_pad

from peft_s0 import S0Config


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
        states, _ = layer.start_states(2, torch.device("cpu"))
        assert torch.equal(states, torch.stack([both, both]))


def test_weighted_adapter(tuned: Tuned) -> None:
    ids = tuned.ids(2, 9)
    add(tuned, "second", 1, rank=2, normalize=True)
    tuned.model.base_model.add_weighted_adapter(["default", "second"], [0.3, 0.7], "soup")
    for layer in tuned.model.base_model.tuner_layers():
        expected = 0.3 * layer.effective_state("default") + 0.7 * layer.effective_state("second")
        torch.testing.assert_close(layer.effective_state("soup"), expected)
    tuned.model.base_model.add_weighted_adapter(["default"], [1.0], "copy")
    assert torch.equal(logits(tuned, ids, "copy"), logits(tuned, ids, "default"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (["default", "other"], [1.0, 1.0], "soup"),
            r"Unknown adapters \['other'\]; this model has \['default', 'few'\]",
        ),
        ((["default"], [1.0, 1.0], "soup"), "1 adapters and 2 weights"),
        ((["default"], [1.0], "default"), "exists already"),
        ((["default"], [1.0], "soup", "svd"), "'linear' only, got 'svd'"),
        ((["default", "few"], [1.0, 1.0], "soup"), "do not cover the same layers"),
    ],
)
def test_weighted_adapter_errors(tuned: Tuned, arguments: tuple, message: str) -> None:
    add(tuned, "few", 1, layers_to_transform=[0])
    with pytest.raises(ValueError, match=message):
        tuned.model.base_model.add_weighted_adapter(*arguments)
    assert list(tuned.model.peft_config) == ["default", "few"]


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


def test_layers_to_transform_and_exclude(architecture: Architecture) -> None:
    for arguments in ({"layers_to_transform": [1]}, {"exclude_modules": r".*layers\.[02-9]\d*\..*"}):
        model = get_peft_model(architecture.build(), S0Config(**arguments))
        assert [name.split(".")[2] for name in model.targeted_module_names] == ["1"]


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
    assert all(layer.row_adapters is None for layer in mixed.model.base_model.tuner_layers())


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


LINEAR = {"qwen3_5": ["in_proj_qkv", "in_proj_a", "in_proj_b", "q_proj"], "falcon_h1": ["in_proj", "q_proj"]}


@pytest.mark.parametrize("lora_first", [True, False])
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`", "ignore:You are trying to modify a model with PEFT")
def test_lora_beside_s0(architecture: Architecture, lora_first: bool) -> None:
    """On the very projections that S0 freezes at pads; merging LoRA leaves S0 in force."""
    tuned = tune(architecture)
    rows = [tuned.ids(1, 12)[0], tuned.ids(1, 5)[0]]
    ids, mask, positions = left_pad(rows)
    lora = LoraConfig(target_modules=LINEAR[architecture.name], init_lora_weights=False, r=4)
    states = [layer.s0_state["default"].weight for layer in tuned.model.base_model.tuner_layers()]
    base = architecture.build()
    config = S0Config(alpha=0.7)
    torch.manual_seed(3)
    if lora_first:
        model = get_peft_model(base, lora)
        inject_adapter_in_model(config, model.base_model.model, "default")
    else:
        inject_adapter_in_model(config, base, "default")
        del base.peft_config
        model = get_peft_model(base, lora)
    layers = [mixer.s0 for mixer in mixers(model)]
    for layer, state in zip(layers, states, strict=True):
        layer.s0_state["default"].weight.copy_(state)

    def check(model: torch.nn.Module) -> torch.Tensor:
        model.eval()
        full = model(rows[1][None]).logits
        padded = model(ids, attention_mask=mask, position_ids=positions).logits[1:, -5:]
        effect = float((full - tuned.base(rows[1][None]).logits).abs().max())
        tuned.assert_equal(padded, full, effect)
        return full

    unmerged = check(model)
    merged = check(model.merge_and_unload())
    torch.testing.assert_close(merged, unmerged, atol=1e-4, rtol=0)


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
