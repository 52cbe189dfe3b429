"""Bad input gets one clear error that names the thing, the expected and the found, and leaves nothing half-done."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, Architecture
from peft import (
    LoraConfig,
    PeftModel,
    convert_to_lora,
    get_peft_model,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.helpers import rescale_adapter_scale
from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Lfm2Config, Lfm2ForCausalLM, LlamaConfig, LlamaForCausalLM
from tuned import Tuned, tune

from peft_s0 import S0Config
from peft_s0._versions import require_transformers
from peft_s0.taps import Tap


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
    with pytest.raises(
        NoMatchingPeftModuleError, match=r"LlamaForCausalLM has no recurrent layers.*Qwen3_5GatedDeltaNet.*use LoRA"
    ):
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
    for arguments in ({"target_modules": ["nothing"]}, {"layers_to_transform": [77]}, {"modules_to_save": ["model"]}):
        with pytest.raises(
            NoMatchingPeftModuleError,
            match=r"modules_to_save=.* matches nothing. The recurrent mixers of this model are model\.layers\.0",
        ):
            get_peft_model(model, S0Config(**arguments))
    assert untouched(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_base_models_name(architecture: Architecture) -> None:
    """Else rows of the base model would have the adapter's states."""
    model = architecture.build()
    with pytest.raises(ValueError, match="'__base__' stands for the base model in adapter_names"):
        get_peft_model(model, S0Config(), adapter_name="__base__")
    assert untouched(model)


LATE = [
    ({"trainable_token_indices": {"nothing": [1]}}, ValueError, "Target modules {'nothing'} not found"),
    ({"trainable_token_indices": [100_000]}, IndexError, "out of bounds"),
    ({"modules_to_save": ["lm_head"], "trainable_token_indices": {"nothing": [1]}}, ValueError, "{'nothing'}"),
    ({"modules_to_save": ["default"]}, ValueError, "trying to target a module .* that is a child of"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), LATE)
def test_what_peft_refuses_last(architecture: Architecture, arguments: dict, error: type, message: str) -> None:
    """PEFT looks at further modules and tokens when the states are in place already."""
    model = architecture.build()
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(error, match=message):
        get_peft_model(model, S0Config(**arguments))
    assert untouched(model)
    assert [name for name, _ in model.named_modules()] == names
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not hasattr(model, "peft_config")
    get_peft_model(model, S0Config())


@pytest.mark.parametrize(("arguments", "error", "message"), LATE[:3])
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_what_peft_refuses_last_beside_a_good_adapter(tuned: Tuned, arguments: dict, error: type, message: str) -> None:
    ids = tuned.ids(1, 5)
    expected = tuned.model(ids).logits
    config, parameters = tuned.model.peft_config["default"], dict(tuned.model.named_parameters())
    trained = {name for name, parameter in tuned.model.named_parameters() if parameter.requires_grad}
    names = [name for name, _ in tuned.model.named_modules()]
    for add in (
        lambda: tuned.model.add_adapter("second", S0Config(**arguments)),
        lambda: inject_adapter_in_model(S0Config(**arguments), tuned.model.get_base_model(), "second"),
        # Under the name of the one that is there.
        lambda: inject_adapter_in_model(S0Config(target_modules=["nothing"]), tuned.model.get_base_model()),
        lambda: inject_adapter_in_model(S0Config(variant="both", **arguments), tuned.model.get_base_model()),
        lambda: inject_adapter_in_model(S0Config(layers_to_transform=[0], **arguments), tuned.model.get_base_model()),
    ):
        with pytest.raises((error, NoMatchingPeftModuleError)):
            add()
        assert list(tuned.model.peft_config) == ["default"]
        assert tuned.model.peft_config["default"] is config
        assert [name for name, _ in tuned.model.named_modules()] == names
        assert all(parameter is parameters[name] for name, parameter in tuned.model.named_parameters())
        assert {name for name, parameter in tuned.model.named_parameters() if parameter.requires_grad} == trained
        assert torch.equal(tuned.model(ids).logits, expected)


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


@pytest.mark.parametrize("name", ["default", "second"])
def test_no_pickle_is_read(tuned: Tuned, folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    states = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(states, folder / "adapter_model.bin")
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("a pickle file was read"))
    message = r"adapter_model\.bin, a pickle file, which can run code.*adapter_model\.safetensors only.*save_file\("
    base = tuned.architecture.build()
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(base, folder, adapter_name=name)
    assert untouched(base)
    with pytest.raises(ValueError, match=message):
        tuned.model.load_adapter(folder, "second")
    assert list(tuned.model.peft_config) == ["default"]
    monkeypatch.undo()
    # As the message says.
    save_file(torch.load(folder / "adapter_model.bin", weights_only=True), folder / "adapter_model.safetensors")
    ids = tuned.ids(1, 5)
    loaded = PeftModel.from_pretrained(base, folder, adapter_name=name)
    assert torch.equal(loaded(ids).logits, tuned.model(ids).logits)


def test_no_pickle_is_saved(tuned: Tuned, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds an adapter_model\.bin, as safe_serialization=False writes it"):
        tuned.model.save_pretrained(tmp_path, safe_serialization=False)
    assert not (tmp_path / "adapter_config.json").exists()
    (tmp_path / "adapter_model.bin").unlink()
    tuned.model.save_pretrained(tmp_path)
    ids = tuned.ids(1, 5)
    assert torch.equal(
        PeftModel.from_pretrained(tuned.architecture.build(), tmp_path)(ids).logits, tuned.model(ids).logits
    )


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


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"r": 8}, "S0Config has no r. Use rank,"),
        ({"lora_alpha": 16}, "no lora_alpha. Use alpha."),
        ({"lora_dropout": 0.1}, "no lora_dropout. Use l2_lambda"),
        ({"bias": "all"}, "no bias. Use modules_to_save"),
        ({"init_lora_weights": False}, "no init_lora_weights. Use init_weights."),
        ({"target_parameters": ["x"]}, "no target_parameters. Use target_modules; S0 adapts whole recurrent mixers"),
        ({"rank_pattern": {"x": 2}}, "no rank_pattern. Use one rank for all layers, or adapters of their own"),
        ({"ensure_weight_tying": True}, "no ensure_weight_tying. Use trainable_token_indices"),
        ({"anything_else": 1}, "unexpected keyword argument 'anything_else'"),
    ],
)
def test_fields_of_lora(field: dict, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        S0Config(**field)


def test_what_is_for_weights_only(tuned: Tuned, folder: Path) -> None:
    """PEFT's functions that have no sense for states refuse, name the method, and change nothing."""
    ids = tuned.ids(1, 5)
    expected = tuned.model(ids).logits
    assert not tuned.model.supports_lora_conversion()
    with (
        pytest.raises(ValueError, match="scaling is only supported for models with `LoraLayer`s"),
        rescale_adapter_scale(tuned.model, 0.5),
    ):
        pass
    with pytest.raises(TypeError, match=r"do not support LoRA conversion: .*S0Layer"):
        convert_to_lora(tuned.model, rank=2)
    with pytest.raises(ValueError, match=r"Hotswapping only supports .*LORA.* but S0 was passed"):
        hotswap_adapter(tuned.model, folder, "default")
    with pytest.raises(ValueError, match="No adapter layers found on the model"):
        prepare_model_for_compiled_hotswap(tuned.model)
    with pytest.raises(ValueError, match="is not supported for S0Model"):
        tuned.model.save_pretrained(folder / "b", path_initial_model_for_weight_conversion=str(folder / "a"))
    with pytest.raises(ValueError, match="'S0' is not compatible with the `PeftMixedModel`"):
        get_peft_model(tuned.architecture.build(), S0Config(), mixed=True)
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        tuned.model.add_adapter("other", LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="Adapter with name 'default' already exists"):
        tuned.model.add_adapter("default", S0Config())
    assert list(tuned.model.peft_config) == ["default"]
    assert torch.equal(tuned.model(ids).logits, expected)


def test_instead_of_rescaling(tuned: Tuned) -> None:
    """The config counts in each call, also where it is written to directly."""
    ids = tuned.ids(1, 5)
    with torch.no_grad():
        tuned.model.peft_config["default"].alpha *= 0.5
        half = tuned.model(ids).logits
        tuned.model.peft_config["default"].alpha *= 2
        for parameter in tuned.model.parameters():
            if parameter.requires_grad:
                parameter.mul_(0.5)
        assert torch.equal(tuned.model(ids).logits, half)


def test_offloading_that_states_have_no_use_for(tuned: Tuned, folder: Path) -> None:
    with pytest.warns(UserWarning, match="ephemeral_gpu_offload is ignored"):
        tuned.model.load_adapter(folder, "second", ephemeral_gpu_offload=True)
    assert "second" in tuned.model.peft_config


def test_old_transformers() -> None:
    with pytest.raises(ImportError, match=r"needs transformers >= 5.23.0, found 5.22.3.*pip install"):
        require_transformers("5.22.3")
    require_transformers("5.23.0")
    require_transformers("6.0.0.dev0")


def test_old_transformers_at_import() -> None:
    script = "import transformers; transformers.__version__ = '4.57.1'; import peft_s0"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert "ImportError: peft_s0 needs transformers >= 5.23.0, found 4.57.1" in run.stderr


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


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_mixer_that_raises_leaves_nothing_frozen(tuned: Tuned, error: type[BaseException]) -> None:
    ids, mask = tuned.ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    expected = tuned.model(ids).logits

    def fail(*args):
        raise error("in the middle")

    handles = [mixer.out_proj.register_forward_pre_hook(fail) for mixer in _mixers(tuned)]
    with pytest.raises(error, match="in the middle"):
        tuned.model(ids, attention_mask=mask)
    for handle in handles:
        handle.remove()
    assert all(not layer.calls for layer in tuned.model.base_model.tuner_layers())
    assert not any(isinstance(module, Tap) for module in tuned.model.modules())
    assert torch.equal(tuned.model(ids).logits, expected)
    with tuned.model.disable_adapter():
        assert torch.equal(tuned.model(ids).logits, tuned.base(ids).logits)


def interrupt(tuned: Tuned, call: Callable[[], object]) -> None:
    """Ctrl-C in the first mixer of a call."""

    def press(*args):
        raise KeyboardInterrupt

    handle = _mixers(tuned)[0].out_proj.register_forward_pre_hook(press)
    with pytest.raises(KeyboardInterrupt):
        call()
    handle.remove()


def padded_call(tuned: Tuned) -> Callable[[], object]:
    """Of the model without PEFT around it, which nothing cleans up behind an interrupt."""
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    return partial(tuned.model.get_base_model(), tuned.ids(2, 9), attention_mask=mask)


def test_an_interrupt_of_the_model_without_peft_around_it(tuned: Tuned) -> None:
    """No hook runs after an interrupt from the keyboard: the next call puts the parts back, and no weight is missing
    meanwhile."""
    ids = tuned.ids(2, 9)
    expected = tuned.model(ids).logits
    interrupt(tuned, padded_call(tuned))
    weights = tuned.base.state_dict()
    assert weights.keys() <= {name.removeprefix("base_model.model.") for name in tuned.model.state_dict()}
    assert torch.equal(tuned.model(ids).logits, expected)
    with tuned.model.disable_adapter():
        assert torch.equal(tuned.model(ids).logits, tuned.base(ids).logits)


@torch.no_grad()
def test_an_interrupted_step_is_forgotten(tuned: Tuned) -> None:
    ids, cache = tuned.ids(2, 9), tuned.architecture.make_cache(tuned.model.config, 2)
    call = partial(tuned.model, **{tuned.architecture.cache: cache}, use_cache=True)
    expected = call(ids).logits
    call(ids[:, :1])
    interrupt(tuned, lambda: call(ids[:, :1]))
    cache.reset()
    assert torch.equal(call(ids).logits, expected)


def test_unload_after_an_interrupt(tuned: Tuned) -> None:
    ids = tuned.ids(2, 9)
    interrupt(tuned, padded_call(tuned))
    base = tuned.model.unload()
    assert [type(module) for module in base.modules()] == [type(module) for module in tuned.base.modules()]
    assert torch.equal(base(ids).logits, tuned.base(ids).logits)


def _mixers(tuned: Tuned) -> list[nn.Module]:
    from architectures import mixers

    return mixers(tuned.model)
