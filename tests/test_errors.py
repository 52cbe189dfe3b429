"""Bad input gets one clear error that names the thing, the expected and the found, and leaves nothing half-done."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, Architecture
from conftest import Tuned, tune
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Lfm2Config, Lfm2ForCausalLM, LlamaConfig, LlamaForCausalLM

from peft_s0 import S0Config
from peft_s0._versions import require_transformers


def untouched(model: nn.Module) -> bool:
    """Whether nothing of an adapter is left on a model."""
    return not any("s0" in name.split(".") for name, _ in model.named_modules()) and not any(
        module._forward_hooks or module._forward_pre_hooks for module in model.modules()
    )


def test_pure_transformer() -> None:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    model = LlamaForCausalLM(config)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no recurrent layers.*Qwen3_5GatedDeltaNet.*use LoRA"):
        get_peft_model(model, S0Config())
    assert untouched(model)


def test_recurrent_model_that_is_not_supported() -> None:
    config = Lfm2Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
        pad_token_id=0,
    )
    with pytest.raises(
        ValueError, match=r"recurrent, but S0 does not support its Lfm2ShortConv: .*Supported are .*FalconH1"
    ):
        get_peft_model(Lfm2ForCausalLM(config), S0Config())


@pytest.mark.parametrize(
    "target_modules", ["out_proj", ["conv1d"], r".*layers\.\d+\.(linear_attn|mamba)(\.out_proj)?"], ids=str
)
def test_target_modules_inside_a_mixer(architecture: Architecture, target_modules: str | list[str]) -> None:
    model = architecture.build()
    target_modules = ["out_proj"] if target_modules == "out_proj" else target_modules
    with pytest.raises(TypeError, match=r"matches '.*' \(\w+\), which is no recurrent mixer.*for example"):
        get_peft_model(model, S0Config(target_modules=target_modules))
    assert untouched(model)


def test_target_modules_that_hit_nothing(architecture: Architecture) -> None:
    model = architecture.build()
    for arguments in ({"target_modules": ["nothing"]}, {"layers_to_transform": [77]}):
        with pytest.raises(
            ValueError, match=r"matches nothing. The recurrent mixers of this model are model\.layers\.0"
        ):
            get_peft_model(model, S0Config(**arguments))
    assert untouched(model)


@pytest.fixture
def folder(tuned: Tuned, tmp_path: Path) -> Path:
    tuned.model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def change_states(folder: Path, change) -> None:
    file = folder / "adapter_model.safetensors"
    states = load_file(file)
    change(states)
    save_file(states, file)


def _drop(states: dict) -> None:
    states.pop(sorted(states)[0])


def _add(states: dict) -> None:
    name = sorted(states)[0]
    states[name.replace("layers.0", "layers.7")] = states[name].clone()


def _reshape(states: dict) -> None:
    name = sorted(states)[0]
    states[name] = states[name][:-1].contiguous()


def _nan(states: dict) -> None:
    states[sorted(states)[0]][0, 0, :3] = float("nan")


def _infinite(states: dict) -> None:
    states[sorted(states)[0]][0, 0, 0] = float("inf")


def _integers(states: dict) -> None:
    name = sorted(states)[0]
    states[name] = states[name].int()


BAD_FILES = [
    (_drop, r"Expected \d layers, found \d; missing in the file: .*layers\.0.*base model it was trained on"),
    (_add, r"Expected \d layers, found \d; not in the model: .*layers\.7"),
    (_reshape, r"layers\.0.*expected shape \[4, 16, (8|16)\], found \[3, 16, (8|16)\]"),
    (_nan, r"layers\.0.*3 of \d+ values that are NaN or infinite"),
    (_infinite, r"layers\.0.*1 of \d+ values that are NaN or infinite"),
    (_integers, r"dtype torch.int32, expected a floating-point dtype"),
]


@pytest.mark.parametrize(("change", "message"), BAD_FILES)
def test_bad_states_in_a_file(tuned: Tuned, folder: Path, change, message: str) -> None:
    base = tuned.architecture.build()
    good = load_file(folder / "adapter_model.safetensors")
    change_states(folder, change)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(base, folder)
    assert untouched(base)
    # The same base model takes a good file afterwards.
    save_file(good, folder / "adapter_model.safetensors")
    ids = tuned.ids(1, 5)
    assert torch.equal(PeftModel.from_pretrained(base, folder)(ids).logits, tuned.model(ids).logits)


@pytest.mark.parametrize(("change", "message"), BAD_FILES)
def test_bad_states_beside_a_good_adapter(tuned: Tuned, folder: Path, change, message: str) -> None:
    """A refused file leaves the adapters that are there as they are, and its name free."""
    ids = tuned.ids(1, 5)
    expected = tuned.model(ids).logits
    change_states(folder, change)
    with pytest.raises(ValueError, match=message):
        tuned.model.load_adapter(folder, "second")
    with pytest.raises(ValueError, match=message):
        set_peft_model_state_dict(tuned.model, load_file(folder / "adapter_model.safetensors"))
    assert list(tuned.model.peft_config) == ["default"]
    assert torch.equal(tuned.model(ids).logits, expected)


@pytest.mark.parametrize("keep", [0, 4, 200, -10])
def test_truncated_file(tuned: Tuned, folder: Path, keep: int) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    base = tuned.architecture.build()
    with pytest.raises(ValueError, match=r"adapter_model.safetensors' is not a whole safetensors file.*again"):
        PeftModel.from_pretrained(base, folder)
    assert untouched(base)


def test_adapter_of_another_architecture(tmp_path: Path) -> None:
    first, second = ARCHITECTURES[:2]
    tune(first).model.save_pretrained(tmp_path)
    base = second.build()
    with pytest.raises(ValueError, match=r"matches nothing. The recurrent mixers of this model are"):
        PeftModel.from_pretrained(base, tmp_path)
    assert untouched(base)


def test_adapter_of_a_deeper_model(architecture: Architecture, tmp_path: Path) -> None:
    tune(architecture).model.save_pretrained(tmp_path)
    values = architecture.config().to_dict()
    values["num_hidden_layers"] += 1
    if values.get("layer_types"):
        values["layer_types"].insert(0, values["layer_types"][0])
    config = type(architecture.config())(**values)
    with pytest.raises(ValueError, match=r"Expected \d layers, found \d; missing in the file"):
        PeftModel.from_pretrained(architecture.model_class(config), tmp_path)


def test_merging(tuned: Tuned) -> None:
    ids = tuned.ids(1, 5)
    expected = tuned.model(ids).logits
    for call in (
        tuned.model.merge_adapter,
        tuned.model.unmerge_adapter,
        tuned.model.merge_and_unload,
        tuned.model.base_model.merge_and_unload,
    ):
        with pytest.raises(ValueError, match=r"cannot be merged or unmerged.*set_adapter.*unload\(\)"):
            call()
    assert torch.equal(tuned.model(ids).logits, expected)


def test_old_transformers() -> None:
    with pytest.raises(ImportError, match=r"needs transformers >= 5.21.0, found 5.20.3.*pip install"):
        require_transformers("5.20.3")
    require_transformers("5.21.0")
    require_transformers("6.0.0.dev0")


def test_old_transformers_at_import() -> None:
    script = "import transformers; transformers.__version__ = '4.57.1'; import peft_s0"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert "ImportError: peft_s0 needs transformers >= 5.21.0, found 4.57.1" in run.stderr


def test_unhashed_row_names(tuned: Tuned) -> None:
    ids = tuned.ids(3, 5)
    with pytest.raises(ValueError, match=r"unknown adapters \['defautl'\]; this model has \['default'\]"):
        tuned.model(ids, adapter_names=["default", "defautl", "__base__"])
    with pytest.raises(ValueError, match="2 entries, but the batch has 3 rows"):
        tuned.model(ids, adapter_names=["default", "__base__"])
    with pytest.raises(TypeError, match="list with one name for each row, got str"):
        tuned.model(ids, adapter_names="default")
    expected = tuned.model(ids).logits
    tuned.model.train()
    with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
        tuned.model(ids, adapter_names=["default"] * 3)
    assert torch.equal(tuned.model.eval()(ids).logits, expected)


def test_a_mixer_that_raises_leaves_nothing_frozen(tuned: Tuned) -> None:
    ids, mask = tuned.ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    expected = tuned.model(ids).logits

    def fail(*args):
        raise RuntimeError("out of memory")

    handles = [mixer.out_proj.register_forward_pre_hook(fail) for mixer in _mixers(tuned)]
    with pytest.raises(RuntimeError, match="out of memory"):
        tuned.model(ids, attention_mask=mask)
    for handle in handles:
        handle.remove()
    assert all(layer.call is None for layer in tuned.model.base_model.tuner_layers())
    assert torch.equal(tuned.model(ids).logits, expected)
    with tuned.model.disable_adapter():
        assert torch.equal(tuned.model(ids).logits, tuned.base(ids).logits)


def _mixers(tuned: Tuned) -> list[nn.Module]:
    from architectures import mixers

    return mixers(tuned.model)
