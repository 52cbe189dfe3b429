"""LoRA on the same model as S0, in either order: trained, saved and loaded together, taken away or merged alone."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from architectures import Architecture
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from reference import with_slow_mixers
from safetensors.torch import load_file
from test_law import left_pad
from torch import Tensor, nn
from transformers import PreTrainedModel
from tuned import Tuned, states_of, tune

from peft_s0 import S0Config, S0Layer

# PEFT says that a second method is put on the model, which is what is wanted here.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Already found a `peft_config`", "ignore:You are trying to modify a model with PEFT"
)


def lora_config() -> LoraConfig:
    """On all linear layers, those that S0 holds still at pads included. PEFT allows LoRA on no Mamba's out_proj."""
    return LoraConfig(target_modules="all-linear", exclude_modules=["out_proj"], init_lora_weights=False, r=4)


def s0_config() -> S0Config:
    return S0Config(alpha=0.7, init_weights=1.0)


@dataclass
class Both:
    """A model with both methods, and the PeftModel of each."""

    tuned: Tuned
    model: PreTrainedModel
    s0: PeftModel
    lora: PeftModel

    @torch.no_grad()
    def logits(self, model: nn.Module | None = None) -> Tensor:
        return (model or self.model).eval()(self.tuned.ids(2, 9)).logits

    def copies(self) -> tuple[PeftModel, PeftModel]:
        """Both PeftModels of one copied model."""
        return copy.deepcopy((self.s0, self.lora))


def put(order: str, model: PreTrainedModel) -> dict[str, PeftModel]:
    torch.manual_seed(1)
    configs = {"states": s0_config(), "matrices": lora_config()}
    return {name: get_peft_model(model, configs[name], adapter_name=name) for name in order.split()}


@pytest.fixture(params=["states matrices", "matrices states"])
def both(architecture: Architecture, request: pytest.FixtureRequest) -> Both:
    model = architecture.build()
    models = put(request.param, model)
    return Both(tune(architecture), model, models["states"], models["matrices"])


@pytest.fixture
def folder(both: Both, tmp_path: Path) -> Path:
    both.s0.save_pretrained(tmp_path)
    return tmp_path


def test_lora_is_on_every_linear_layer_but_in_no_state(both: Both) -> None:
    named = dict(both.model.named_modules())
    linear = {
        name
        for name, module in both.tuned.base.named_modules()
        if isinstance(module, nn.Linear) and not name.endswith(("lm_head", "out_proj"))
    }
    assert {name for name, module in named.items() if isinstance(module, LoraLayer)} == linear
    assert not both.logits().equal(both.tuned.base(both.tuned.ids(2, 9)).logits)


def test_pads_change_nothing(both: Both) -> None:
    """The projections that S0 holds still at pads are LoRA's now, and other modules again when it is merged."""
    rows = [both.tuned.ids(1, 12)[0], both.tuned.ids(1, 5)[0]]
    ids, mask, positions = left_pad(rows)

    @torch.no_grad()
    def check(model: nn.Module) -> None:
        full = model.eval()(rows[1][None]).logits
        padded = model(ids, attention_mask=mask, position_ids=positions).logits[1:, -5:]
        with both.s0.disable_adapter():
            effect = float((full - model(rows[1][None]).logits).abs().max())
        both.tuned.assert_equal(padded, full, effect)

    check(both.model)
    check(both.lora.merge_and_unload())


def test_both_are_trained(both: Both) -> None:
    before = {name: p.detach().clone() for name, p in both.model.named_parameters()}
    trained = {name for name, p in both.model.named_parameters() if p.requires_grad}
    assert all("s0_state" in name or "lora_" in name for name in trained)
    optimizer = torch.optim.SGD([p for p in both.model.parameters() if p.requires_grad], lr=0.1)
    ids = both.tuned.ids(2, 9)
    both.model.train()(ids, labels=ids).loss.backward()
    optimizer.step()
    assert {name for name, p in both.model.named_parameters() if not torch.equal(p, before[name])} == trained


def test_each_file_holds_its_own_method(both: Both, folder: Path) -> None:
    s0, lora = (load_file(folder / name / "adapter_model.safetensors") for name in ("states", "matrices"))
    assert len(s0) == len(states_of(both.s0))
    assert all("s0_state" in name for name in s0)
    assert all("lora_" in name for name in lora)
    assert not any("base_layer" in name for name in s0)


@pytest.mark.parametrize("order", ["states matrices", "matrices states"])
def test_load_both_by_peft(both: Both, folder: Path, order: str) -> None:
    model = both.tuned.architecture.build()
    for name in order.split():
        PeftModel.from_pretrained(model, folder / name, adapter_name=name)
    assert torch.equal(both.logits(model), both.logits())


@pytest.mark.parametrize("order", ["states matrices", "matrices states"])
def test_load_both_by_transformers(both: Both, folder: Path, order: str) -> None:
    model = both.tuned.architecture.build()
    for name in order.split():
        model.load_adapter(str(folder / name), name)
    model.set_adapter(["states", "matrices"])
    assert torch.equal(both.logits(model), both.logits())


def test_load_s0_into_a_model_with_lora(both: Both, folder: Path) -> None:
    """Without a PeftModel of its own."""
    lora = PeftModel.from_pretrained(both.tuned.architecture.build(), folder / "matrices", adapter_name="matrices")
    inject_adapter_in_model(S0Config.from_pretrained(folder / "states"), lora.get_base_model(), "states")
    set_peft_model_state_dict(lora, load_peft_weights(folder / "states"), "states")
    assert torch.equal(both.logits(lora), both.logits())


def test_one_peft_model_takes_one_method(both: Both, folder: Path) -> None:
    message = "Cannot combine adapters with different peft types"
    for model, other in ((both.s0, "matrices"), (both.lora, "states")):
        before = both.logits()
        with pytest.raises(ValueError, match=message):
            model.load_adapter(folder / other, "another")
        assert list(model.peft_config) == list(both.model.peft_config)
        assert torch.equal(both.logits(), before)


def test_merge_and_unload_lora(both: Both) -> None:
    """S0 stays in force, exactly, on the merged weights."""
    expected, ids = both.logits(), both.tuned.ids(2, 9)
    merged = both.lora.merge_and_unload()
    assert not any(isinstance(module, LoraLayer) for module in merged.modules())
    torch.testing.assert_close(both.logits(merged), expected, atol=2e-5, rtol=0)
    states, weights = states_of(both.s0), copy.deepcopy(both.s0).unload()
    twin = with_slow_mixers(weights, both.tuned.architecture.slow_mixer, states)
    with torch.no_grad():
        exact = twin(ids, use_cache=False).logits.float()
    both.tuned.assert_equal(both.logits(merged), exact, float((exact - both.logits(weights)).abs().max()))


def test_load_s0_on_merged_weights(both: Both, folder: Path, tmp_path: Path) -> None:
    expected = both.logits()
    merged = both.lora.merge_and_unload()
    both.s0.save_pretrained(tmp_path / "after", selected_adapters=["states"])
    both.s0.unload().save_pretrained(tmp_path / "weights")
    weights = load_file(tmp_path / "weights" / "model.safetensors")
    assert not [name for name in weights if "s0" in name or "lora" in name]
    model = type(merged).from_pretrained(tmp_path / "weights")
    for saved in (folder / "states", tmp_path / "after" / "states"):
        loaded = PeftModel.from_pretrained(copy.deepcopy(model), saved)
        torch.testing.assert_close(both.logits(loaded), expected, atol=2e-5, rtol=0)


def test_merge_lora_in_place(both: Both) -> None:
    """PEFT merges every tuner layer it finds. States stay, and say so, since the weights alone are not all then."""
    expected = both.logits()
    with pytest.warns(UserWarning, match="S0 adapters are not merged with the others.*runs without it"):
        both.lora.merge_adapter()
    assert both.lora.get_model_status().merged_adapters == ["matrices"]
    assert all(module.merged for module in both.model.modules() if isinstance(module, LoraLayer))
    torch.testing.assert_close(both.logits(), expected, atol=2e-5, rtol=0)
    both.lora.unmerge_adapter()
    torch.testing.assert_close(both.logits(), expected, atol=2e-5, rtol=0)
    with pytest.raises(ValueError, match="cannot be merged or unmerged"):
        both.lora.merge_adapter(["states"])


def test_unload_either(both: Both) -> None:
    base, ids = both.tuned.base, both.tuned.ids(2, 9)
    for first, layers, stays in (("states", S0Layer, LoraLayer), ("matrices", LoraLayer, S0Layer)):
        s0, lora = both.copies()
        models = {"states": s0, "matrices": lora}
        with torch.no_grad():
            for layer in (module for module in both.model.modules() if isinstance(module, layers)):
                layer.enable_adapters(False)
            expected = both.logits()
            for layer in (module for module in both.model.modules() if isinstance(module, layers)):
                layer.enable_adapters(True)
        model = models.pop(first).unload()
        assert not any(isinstance(module, layers) for module in model.modules())
        assert any(isinstance(module, stays) for module in model.modules())
        assert torch.equal(both.logits(model), expected)
        model = models.popitem()[1].unload()
        assert [name for name, _ in model.named_modules()] == [name for name, _ in base.named_modules()]
        assert torch.equal(both.logits(model), base(ids).logits)
        assert not hasattr(model, "peft_config")


def test_unload_s0_leaves_loras_config(both: Both, tmp_path: Path) -> None:
    both.s0.unload()
    assert list(both.lora.peft_config) == ["matrices"]
    both.lora.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(both.tuned.architecture.build(), tmp_path / "matrices")
    assert torch.equal(both.logits(loaded), both.logits())


@pytest.mark.parametrize("config", [S0Config, LoraConfig])
def test_modules_follow_the_adapter_that_was_set_last(architecture: Architecture, config: type) -> None:
    """PEFT's own way, whichever the methods are: docs/peft.md says what to do."""
    model = architecture.build()
    where = {} if config is S0Config else {"target_modules": ["q_proj"]}
    first = get_peft_model(model, config(modules_to_save=["lm_head"], **where), adapter_name="first")
    head = model.lm_head
    with torch.no_grad():
        head.modules_to_save["first"].weight.add_(1.0)
    lora = get_peft_model(model, LoraConfig(target_modules=["v_proj"]), adapter_name="second")
    assert head.active_adapters == []
    first.set_adapter("first")
    assert head.active_adapters == ["first"]
    lora.unload()
    assert model.lm_head is head.modules_to_save["first"]


@pytest.mark.parametrize("field", ["modules_to_save", "trainable_token_indices"])
@pytest.mark.parametrize("leave", ["unload", "merge_and_unload"])
def test_modules_that_are_gone_are_not_left_out_of_a_file(
    architecture: Architecture, tmp_path: Path, field: str, leave: str
) -> None:
    model = architecture.build()
    beside = {"modules_to_save": ["lm_head"], "trainable_token_indices": [5, 7]}
    s0 = get_peft_model(model, S0Config(**{field: beside[field]}), adapter_name="states")
    lora = get_peft_model(model, LoraConfig(target_modules=["v_proj"]), adapter_name="matrices")
    s0.save_pretrained(tmp_path / "before", selected_adapters=["states"])
    PeftModel.from_pretrained(architecture.build(), tmp_path / "before" / "states")
    getattr(lora, leave)()
    with pytest.raises(ValueError, match=rf"Adapter 'states' has {field}=\[.*no longer holds.*Save the adapter before"):
        s0.save_pretrained(tmp_path / "after", selected_adapters=["states"])
    assert not (tmp_path / "after" / "states").exists()


def test_disabling_is_the_base_model(both: Both) -> None:
    """As in PEFT: all adapters of the model, whichever PeftModel is asked."""
    expected, base = both.logits(), both.tuned.base(both.tuned.ids(2, 9)).logits
    for model in (both.s0, both.lora):
        with model.disable_adapter():
            assert torch.equal(both.logits(), base)
        assert torch.equal(both.logits(), expected)


@torch.no_grad()
def test_rows_choose_among_states(both: Both) -> None:
    """The matrices are in force in all of them."""
    ids, whole = both.tuned.ids(2, 9), both.logits()
    both.s0.add_adapter("zeros", S0Config())
    both.s0.set_adapter("zeros")
    alone = both.logits()
    for name in ("__base__", "zeros", "matrices"):
        rows = both.s0.eval()(ids, adapter_names=["states", name]).logits
        torch.testing.assert_close(rows, torch.stack([whole[0], alone[1]]), atol=1e-5, rtol=0)


def test_names(both: Both) -> None:
    """The configs of a model's adapters are one dict, whichever the methods."""
    with pytest.raises(ValueError, match=r"has an adapter 'matrices' of type LORA.*another name"):
        get_peft_model(both.model, s0_config(), adapter_name="matrices")
    assert set(both.model.peft_config) == {"states", "matrices"}
    assert both.model.peft_config["matrices"].peft_type == "LORA"
    with pytest.raises(ValueError, match="'matrices' is of type LORA: delete it through the PeftModel"):
        both.s0.delete_adapter("matrices")
    with pytest.raises(ValueError, match=r"Unknown adapters \['matrices'\]; this model has \['states'\]"):
        both.s0.add_weighted_adapter(["states", "matrices"], [0.5, 0.5], "soup")
    with pytest.raises(ValueError, match=r"Unknown adapter 'matrices'; this model has \['states'\]"):
        both.s0.hotswap_adapter("anywhere", "matrices")
    assert set(both.model.peft_config) == {"states", "matrices"}


def test_switching_one_leaves_the_other(both: Both) -> None:
    expected = both.logits()
    torch.manual_seed(5)
    both.s0.add_adapter("second", s0_config())
    assert torch.equal(both.logits(), expected)
    both.s0.set_adapter("second")
    assert not torch.equal(both.logits(), expected)
    assert all(
        module.active_adapters == ["matrices"] for module in both.model.modules() if isinstance(module, LoraLayer)
    )
    both.s0.set_adapter("states")
    assert torch.equal(both.logits(), expected)
    both.s0.delete_adapter("second")
    assert torch.equal(both.logits(), expected)
