"""Saving, loading and copying adapters."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, MAIN, Architecture
from peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.helpers import check_if_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from tuned import Tuned, tune

from peft_s0 import S0Config, S0Layer


@pytest.fixture(autouse=True, scope="module")
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def folder(tuned: Tuned, tmp_path: Path) -> Path:
    tuned.model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_round_trip_is_bitwise(tuned: Tuned, folder: Path) -> None:
    ids = tuned.ids(2, 9)
    loaded = PeftModel.from_pretrained(tuned.architecture.build(), folder)
    assert torch.equal(loaded(ids).logits, tuned.model(ids).logits)
    assert not any(p.requires_grad for p in loaded.parameters())
    before, after = tuned.model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_file_holds_the_unscaled_states_and_nothing_else(tuned: Tuned, folder: Path) -> None:
    states = load_file(folder / "adapter_model.safetensors")
    layers = {name: layer for name, layer in tuned.model.named_modules() if isinstance(layer, S0Layer)}
    assert states.keys() == {f"{name}.s0_state.weight" for name in layers}
    for name, layer in layers.items():
        stored = states[f"{name}.s0_state.weight"]
        assert stored.dtype == torch.float32
        assert torch.equal(stored, layer.s0_state["default"].weight)


def test_config_round_trip(tuned: Tuned, folder: Path) -> None:
    loaded = PeftConfig.from_pretrained(folder)
    assert isinstance(loaded, S0Config)
    expected = copy.deepcopy(tuned.model.peft_config["default"]).to_dict()
    actual = loaded.to_dict()
    # PEFT adds these two on saving.
    for name in ("inference_mode", "auto_mapping"):
        actual.pop(name), expected.pop(name)
    assert actual == expected


def test_loading_for_inference_draws_no_random_numbers(tuned: Tuned, folder: Path) -> None:
    """States that are about to be loaded have no first values to be drawn."""
    base, before = tuned.architecture.build(), torch.get_rng_state()
    assert S0Config.from_pretrained(folder).init_weights == 1.0
    PeftModel.from_pretrained(base, folder)
    assert torch.equal(torch.get_rng_state(), before)


def test_trainable_and_low_memory_loading(tuned: Tuned, folder: Path) -> None:
    ids = tuned.ids(2, 9)
    for arguments in ({"is_trainable": True}, {"low_cpu_mem_usage": True}):
        loaded = PeftModel.from_pretrained(tuned.architecture.build(), folder, **arguments)
        assert torch.equal(loaded(ids).logits, tuned.model(ids).logits)
        assert any(p.requires_grad for p in loaded.parameters()) is ("is_trainable" in arguments)
        assert loaded.training is False or "is_trainable" in arguments
        # A second adapter stays inactive.
        loaded.load_adapter(folder, "second", **arguments)
        assert loaded.active_adapters == ["default"]
        trained = {name.split(".")[-2] for name, p in loaded.named_parameters() if p.requires_grad}
        assert trained == ({"default", "second"} if "is_trainable" in arguments else set())
        loaded.set_adapter("second")
        assert torch.equal(loaded(ids).logits, tuned.model(ids).logits)


def test_low_memory_injection(tuned: Tuned) -> None:
    """States are made on the meta device, and are where the mixers are once they are loaded."""
    states = get_peft_model_state_dict(tuned.model)
    model = inject_adapter_in_model(S0Config(alpha=0.7), tuned.architecture.build(), low_cpu_mem_usage=True)
    assert {p.device.type for name, p in model.named_parameters() if "s0_state" in name} == {"meta"}
    set_peft_model_state_dict(model, states, low_cpu_mem_usage=True)
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert torch.equal(model.eval()(tuned.ids(2, 9)).logits, tuned.model(tuned.ids(2, 9)).logits)


def test_several_adapters_in_one_folder(tuned: Tuned, tmp_path: Path) -> None:
    """As PEFT lays them out: the default one at the top, others below, each with its own config."""
    ids = tuned.ids(2, 9)
    tuned.model.add_adapter("second", S0Config(alpha=0.3, init_weights=1.0, rank=2, layers_to_transform=[1]))
    expected = {}
    for name in ("default", "second"):
        tuned.model.set_adapter(name)
        expected[name] = tuned.model(ids).logits
    tuned.model.save_pretrained(tmp_path / "all")
    tuned.model.save_pretrained(tmp_path / "one", selected_adapters=["second"])
    assert not (tmp_path / "one" / "adapter_config.json").exists()
    assert len(load_file(tmp_path / "one" / "second" / "adapter_model.safetensors")) == 1
    loaded = PeftModel.from_pretrained(tuned.architecture.build(), tmp_path / "all")
    assert torch.equal(loaded(ids).logits, expected["default"])
    loaded.load_adapter(tmp_path / "all", "other", subfolder="second")
    loaded.load_adapter(tmp_path / "one" / "second", "another")
    for name in ("other", "another"):
        loaded.set_adapter(name)
        assert torch.equal(loaded(ids).logits, expected["second"])
    with pytest.raises(ValueError, match="invalid `selected_adapters`"):
        tuned.model.save_pretrained(tmp_path / "none", selected_adapters=["third"])


def test_auto_classes(tuned: Tuned, tmp_path: Path) -> None:
    """AutoPeftModel finds base and adapter from the folder; so does transformers' own loader."""
    ids = tuned.ids(2, 9)
    tuned.base.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, S0Config(init_weights=1.0, alpha=0.5))
    model.save_pretrained(tmp_path / "adapter")
    expected = model.eval()(ids).logits
    for auto in (AutoPeftModelForCausalLM, AutoPeftModel, AutoModelForCausalLM):
        assert torch.equal(auto.from_pretrained(tmp_path / "adapter").eval()(ids).logits, expected)
    assert check_if_peft_model(str(tmp_path / "adapter"))


NEXT = next(row for row in ARCHITECTURES if row.name == "qwen3_next")
# transformers has no classifier of FalconH1, and of Qwen3.5's text model none of tokens.
TASKS = [
    *((architecture, "FEATURE_EXTRACTION", AutoModel, AutoPeftModelForFeatureExtraction) for architecture in MAIN),
    (MAIN[0], "SEQ_CLS", AutoModelForSequenceClassification, AutoPeftModelForSequenceClassification),
    (NEXT, "TOKEN_CLS", AutoModelForTokenClassification, AutoPeftModelForTokenClassification),
    (NEXT, "QUESTION_ANS", AutoModelForQuestionAnswering, AutoPeftModelForQuestionAnswering),
]


@pytest.mark.parametrize(("row", "task", "auto", "auto_peft"), TASKS, ids=lambda value: getattr(value, "name", None))
def test_auto_classes_of_other_tasks(row: Architecture, task: str, auto: type, auto_peft: type, tmp_path: Path) -> None:
    """A head is trained and saved with the states, as for LoRA."""
    row.build().save_pretrained(tmp_path / "lm")
    auto.from_pretrained(tmp_path / "lm").save_pretrained(tmp_path / "base")
    base, model = (auto.from_pretrained(tmp_path / "base").eval() for _ in range(2))
    model = get_peft_model(model, S0Config(task_type=task, init_weights=1.0, alpha=1.0))
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    assert any("modules_to_save" in name for name, _ in trained) is (task != "FEATURE_EXTRACTION")
    for _, parameter in trained:
        parameter.add_(0.1)
    model.save_pretrained(tmp_path / "adapter")
    ids = torch.randint(3, 99, (2, 9))
    expected = model.eval()(ids)[0]
    assert not torch.equal(expected, base(ids)[0])
    assert torch.equal(auto_peft.from_pretrained(tmp_path / "adapter")(ids)[0], expected)


def test_load_in_a_fresh_process(tuned: Tuned, folder: Path, tmp_path: Path) -> None:
    tuned.base.save_pretrained(tmp_path / "base")
    ids = tuned.ids(2, 9)
    torch.save(ids, tmp_path / "ids.pt")
    script = f"""
import torch, peft_s0
from peft import PeftModel
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({str(tmp_path / "base")!r}), {str(folder)!r})
with torch.no_grad():
    torch.save(model(torch.load({str(tmp_path / "ids.pt")!r})).logits, {str(tmp_path / "logits.pt")!r})
"""
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), tuned.model(ids).logits)


def test_states_put_in_by_hand_survive_pickle_and_deepcopy(architecture: Architecture) -> None:
    tuned = tune(architecture, init_weights=True)
    for layer in tuned.model.base_model.tuner_layers():
        layer.s0_state["default"].weight.copy_(torch.randn_like(layer.s0_state["default"].weight))
    ids, mask = tuned.ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    expected = tuned.model(ids, attention_mask=mask).logits
    assert not torch.equal(expected, tuned.base(ids, attention_mask=mask).logits)
    buffer = io.BytesIO()
    torch.save(tuned.model, buffer)
    buffer.seek(0)
    for copied in (copy.deepcopy(tuned.model), torch.load(buffer, weights_only=False)):
        assert torch.equal(copied(ids, attention_mask=mask).logits, expected)
        # The copy's hooks are its own: the original may change, and the copy may be unloaded.
        base = copied.unload()
        assert torch.equal(base(ids, attention_mask=mask).logits, tuned.base(ids, attention_mask=mask).logits)
    assert torch.equal(tuned.model(ids, attention_mask=mask).logits, expected)


def test_a_copy_does_not_share_states(tuned: Tuned) -> None:
    copied = copy.deepcopy(tuned.model)
    ids = tuned.ids(2, 9)
    expected = tuned.model(ids).logits
    for layer in copied.base_model.tuner_layers():
        layer.s0_state["default"].weight.zero_()
    assert torch.equal(tuned.model(ids).logits, expected)
    assert torch.equal(copied(ids).logits, tuned.base(ids).logits)


def test_unload_leaves_the_base_model_as_it_was(tuned: Tuned) -> None:
    ids = tuned.ids(2, 9)
    names = [name for name, _ in tuned.base.named_modules()]
    base = tuned.model.unload()
    assert [name for name, _ in base.named_modules()] == names
    assert torch.equal(base(ids).logits, tuned.base(ids).logits)
    for module in base.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not [name for name in vars(module) if name.startswith("s0")]
    again = get_peft_model(base, S0Config(init_weights=1.0, alpha=0.7))
    assert not torch.equal(again(ids).logits, tuned.base(ids).logits)


def test_injection_without_a_peft_model(tuned: Tuned) -> None:
    ids = tuned.ids(2, 9)
    # Without a PeftModel, names carry no prefix.
    saved = {name.removeprefix("base_model.model."): s for name, s in get_peft_model_state_dict(tuned.model).items()}
    config = S0Config(alpha=0.7)
    for arguments in ({}, {"state_dict": saved}):
        model = inject_adapter_in_model(copy.deepcopy(config), tuned.architecture.build(), "default", **arguments)
        result = set_peft_model_state_dict(model, saved)
        assert not result.unexpected_keys
        assert torch.equal(model.eval()(ids).logits, tuned.model(ids).logits)


def test_hot_swap_in_place(tuned: Tuned) -> None:
    other = tune(tuned.architecture, init_weights=0.5)
    ids = tuned.ids(2, 9)
    set_peft_model_state_dict(tuned.model, get_peft_model_state_dict(other.model))
    assert torch.equal(tuned.model(ids).logits, other.model(ids).logits)


def test_half_precision_files_load(tuned: Tuned, folder: Path) -> None:
    states = {name: state.bfloat16() for name, state in get_peft_model_state_dict(tuned.model).items()}
    set_peft_model_state_dict(tuned.model, states)
    loaded = get_peft_model_state_dict(tuned.model)
    assert all(loaded[name].dtype == torch.float32 for name in states)
    assert all(torch.equal(loaded[name], states[name].float()) for name in states)
