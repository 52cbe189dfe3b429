"""Replacing the states of a loaded adapter in place."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, Architecture
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file
from test_bank import put_on_hub
from test_errors import BAD_FILES, change_states
from torch import Tensor
from tuned import Tuned, tune

from peft_s0 import S0Config


@pytest.fixture(autouse=True, scope="module")
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def save(architecture: Architecture, folder: Path, seed: int = 1, **config: object) -> Path:
    """An adapter with random states."""
    base = architecture.build()
    torch.manual_seed(seed)
    get_peft_model(base, S0Config(**{"alpha": 0.7, "init_weights": 1.0, **config})).save_pretrained(folder)
    return folder


@pytest.fixture
def other(architecture: Architecture, tmp_path: Path) -> Path:
    return save(architecture, tmp_path / "other")


def snapshot(model: PeftModel) -> dict:
    """All that a swap may change, and where it lies."""
    return {
        "weights": {name: (id(p), p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()},
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "config": copy.deepcopy(model.peft_config["default"].to_dict()),
    }


def unchanged(model: PeftModel, before: dict) -> bool:
    after = snapshot(model)
    return (
        after["weights"] == before["weights"]
        and after["config"] == before["config"]
        and all(torch.equal(value, before["values"][name]) for name, value in after["values"].items())
    )


def loaded(architecture: Architecture, folder: Path, ids: Tensor) -> Tensor:
    """Logits of the adapter loaded in the ordinary way."""
    return PeftModel.from_pretrained(architecture.build(), folder)(ids).logits


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"alpha": 1.3, "train_alpha": 0.5},
        {"alpha": 9.0, "normalize": True, "l2_lambda": 0.1},
        {"target_modules": r".*layers\.\d+\.(linear_attn|mamba)"},
        {"alpha": 0.4, "alpha_pattern": {r"layers\.1\..*": 2.0}},
    ],
    ids=["same", "alpha", "normalize", "pattern", "alpha_pattern"],
)
def test_a_swapped_adapter_is_the_one_in_the_file(tuned: Tuned, tmp_path: Path, config: dict) -> None:
    architecture, model, ids = tuned.architecture, tuned.model, tuned.ids(2, 9)
    folder = save(architecture, tmp_path / "other", **config)
    before = snapshot(model)
    model.hotswap_adapter(folder, "default")
    assert snapshot(model)["weights"] == before["weights"]
    assert torch.equal(model(ids).logits, loaded(architecture, folder, ids))
    model.save_pretrained(tmp_path / "saved")
    states = [load_file(path / "adapter_model.safetensors") for path in (folder, tmp_path / "saved")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in {*states[0], *states[1]})
    assert torch.equal(loaded(architecture, tmp_path / "saved", ids), model(ids).logits)
    expected = S0Config.from_pretrained(folder)
    kept = model.peft_config["default"]
    for field in ("alpha", "alpha_pattern", "train_alpha", "normalize"):
        assert getattr(kept, field) == getattr(expected, field)
    assert kept.l2_lambda == 0.0
    assert kept.target_modules == before["config"]["target_modules"]


def test_only_the_named_adapter_is_swapped(tuned: Tuned, other: Path) -> None:
    ids = tuned.ids(2, 9)
    first = tuned.model(ids).logits
    tuned.model.add_adapter("second", S0Config(init_weights=1.0))
    tuned.model.hotswap_adapter(other, adapter_name="second")
    assert torch.equal(tuned.model(ids).logits, first)
    tuned.model.set_adapter("second")
    assert torch.equal(tuned.model(ids).logits, loaded(tuned.architecture, other, ids))


def test_an_adapter_on_the_hub(tuned: Tuned, other: Path, tmp_path: Path) -> None:
    ids = tuned.ids(2, 9)
    tuned.model.hotswap_adapter(put_on_hub(other, tmp_path / "cache"), "default", cache_dir=tmp_path / "cache")
    assert torch.equal(tuned.model(ids).logits, loaded(tuned.architecture, other, ids))


@pytest.mark.parametrize("config", [{"rank": 2}, {"layers_to_transform": [1]}], ids=str)
def test_adapters_of_the_same_form(architecture: Architecture, tmp_path: Path, config: dict) -> None:
    tuned, folder = tune(architecture, **config), save(architecture, tmp_path / "other" / "inner", **config)
    ids = tuned.ids(2, 9)
    tuned.model.hotswap_adapter(tmp_path / "other", "default", subfolder="inner")
    assert torch.equal(tuned.model(ids).logits, loaded(architecture, folder, ids))


def test_an_optimiser_goes_on(tuned: Tuned, other: Path) -> None:
    ids, weights = tuned.ids(2, 9), [weight for weight in tuned.model.parameters() if weight.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=1e-2)
    for swap in (False, True):
        if swap:
            tuned.model.hotswap_adapter(other, "default")
        with torch.enable_grad():
            tuned.model(ids, labels=ids).loss.backward()
        before = tuned.model(ids).logits
        optimiser.step()
        optimiser.zero_grad()
        assert (tuned.model(ids).logits - before).abs().max() > 1e-3


def _cut_head(states: dict[str, Tensor]) -> None:
    name = next(name for name in states if "lm_head" in name)
    states[name] = states[name][:-1].contiguous()


def _drop_head(states: dict[str, Tensor]) -> None:
    states.pop(next(name for name in states if "lm_head" in name))


def test_weights_beside_the_states(architecture: Architecture, tmp_path: Path) -> None:
    """In place and all or nothing, too."""
    beside = {"modules_to_save": ["lm_head"], "trainable_token_indices": [5, 7]}
    tuned, trained = tune(architecture, **beside), tune(architecture, **beside, alpha=1.1).model
    for weight in trained.parameters():
        if weight.requires_grad:
            weight.add_(0.1)
    trained.save_pretrained(tmp_path)
    good = (tmp_path / "adapter_model.safetensors").read_bytes()
    before = snapshot(tuned.model)
    for change, found in ((_cut_head, r"\[127, 64\]"), (_drop_head, "none")):
        (tmp_path / "adapter_model.safetensors").write_bytes(good)
        change_states(tmp_path, change)
        with pytest.raises(ValueError, match=rf"Shape of 'lm_head.weight': expected \[128, 64\], found {found}"):
            tuned.model.hotswap_adapter(tmp_path, "default")
        assert unchanged(tuned.model, before)
    (tmp_path / "adapter_model.safetensors").write_bytes(good)
    tuned.model.hotswap_adapter(tmp_path, "default")
    ids = tuned.ids(2, 9)
    assert torch.equal(tuned.model(ids).logits, trained(ids).logits)
    assert snapshot(tuned.model)["weights"] == before["weights"]


@pytest.mark.parametrize(("change", "message"), BAD_FILES)
def test_bad_states(tuned: Tuned, other: Path, change, message: str) -> None:
    before = snapshot(tuned.model)
    change_states(other, change)
    with pytest.raises(ValueError, match=message):
        tuned.model.hotswap_adapter(other, "default")
    assert unchanged(tuned.model, before)


def test_values_that_float32_cannot_hold(tuned: Tuned, other: Path) -> None:
    before = snapshot(tuned.model)
    change_states(other, lambda states: states.update({name: state.double() * 1e300 for name, state in states.items()}))
    with pytest.raises(ValueError, match=r"layers\.0.*values that are NaN or infinite"):
        tuned.model.hotswap_adapter(other, "default")
    assert unchanged(tuned.model, before)


@pytest.mark.parametrize("keep", [0, 200, -10])
def test_truncated_file(tuned: Tuned, other: Path, keep: int) -> None:
    before, file = snapshot(tuned.model), other / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"adapter_model.safetensors' is not a whole safetensors file"):
        tuned.model.hotswap_adapter(other, "default")
    assert unchanged(tuned.model, before)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rank": 2}, r"'default' has rank=None, but that of '.*other' has 2: .*Load it with load_adapter"),
        ({"modules_to_save": ["lm_head"]}, r"'default' has modules_to_save=None, but that of '.*' has \['lm_head'\]"),
        ({"trainable_token_indices": [5]}, r"'default' has trainable_token_indices=None, but that of '.*' has \[5\]"),
        ({"layers_to_transform": [1]}, r"Expected \d layers, found 1; missing in the file: .*layers\.0"),
    ],
    ids=str,
)
def test_adapters_of_another_form(tuned: Tuned, tmp_path: Path, config: dict, message: str) -> None:
    before, folder = snapshot(tuned.model), save(tuned.architecture, tmp_path / "other", alpha=0.1, **config)
    with pytest.raises(ValueError, match=message):
        tuned.model.hotswap_adapter(folder, "default")
    assert unchanged(tuned.model, before)


def test_tuples_are_the_lists_of_a_file(architecture: Architecture, tmp_path: Path) -> None:
    folder = save(architecture, tmp_path / "other", modules_to_save=["lm_head"], trainable_token_indices=[5])
    beside = {"modules_to_save": ("lm_head",), "trainable_token_indices": (5,)}
    model = get_peft_model(architecture.build(), S0Config(**beside))
    model.hotswap_adapter(folder, "default")
    assert model.peft_config["default"].alpha == S0Config.from_pretrained(folder).alpha


def test_other_bad_input(tuned: Tuned, other: Path, tmp_path: Path) -> None:
    model, before = tuned.model, snapshot(tuned.model)
    with pytest.raises(ValueError, match=r"Unknown adapter 'defautl'; this model has \['default'\]"):
        model.hotswap_adapter(other, "defautl")
    get_peft_model(tuned.architecture.build(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match=r"lora' holds an adapter of the method .*LORA, expected S0"):
        model.hotswap_adapter(tmp_path / "lora", "default")
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config\.json' at"):
        model.hotswap_adapter(tmp_path / "nowhere", "default")
    different = next(other for other in ARCHITECTURES[:2] if other is not tuned.architecture)
    with pytest.raises(ValueError, match="Load the adapter on the base model it was trained on"):
        model.hotswap_adapter(save(different, tmp_path / "different"), "default")
    assert unchanged(model, before)


def test_a_refused_file_does_not_take_a_fresh_adapter_away(architecture: Architecture, other: Path) -> None:
    """One that was made from a saved config and has no states of its own yet."""
    model = get_peft_model(architecture.build(), S0Config.from_pretrained(other))
    before = snapshot(model)
    change_states(other, BAD_FILES[0][0])
    with pytest.raises(ValueError, match=BAD_FILES[0][1]):
        model.hotswap_adapter(other, "default")
    assert unchanged(model, before)


def test_compiled_models(architecture: Architecture, tmp_path: Path) -> None:
    """Nothing is compiled again for other states, and never is an old alpha used."""
    tuned, graphs = tune(architecture), []
    ids = tuned.ids(2, 9)

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    tuned.model(ids)
    torch._dynamo.reset()
    compiled = torch.compile(tuned.model, backend=backend, fullgraph=True)
    compiled(ids, use_cache=False)
    counts = []
    normalised = {"normalize": True, "alpha": 9.0}
    for i, config in enumerate([{}, normalised, {**normalised, "alpha": 11.0}]):
        folder = save(architecture, tmp_path / str(i), seed=i, **config)
        compiled.hotswap_adapter(folder, "default")
        expected = PeftModel.from_pretrained(architecture.build(), folder)(ids, use_cache=False).logits
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected, atol=2e-6, rtol=0)
        counts.append(len(graphs))
    # Once for the first alpha, once for any alpha.
    assert counts == [1, 2, 2]
    torch._dynamo.reset()


def test_pefts_own_hot_swap_says_that_it_is_for_lora(tuned: Tuned, other: Path) -> None:
    before = snapshot(tuned.model)
    with pytest.raises(ValueError, match="Hotswapping only supports LORA but S0 was passed"):
        hotswap_adapter(tuned.model, str(other), adapter_name="default", torch_device="cpu")
    assert unchanged(tuned.model, before)
