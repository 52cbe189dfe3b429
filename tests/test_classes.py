"""An adapter trained on one class of a model loads on its other classes: text-only, vision-language, bare backbone.

Their layers have different names, so this is about names: every loader is exact or refuses, and none leaves a state at
its initial value.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, IMAGE_TOKENS, QWEN4, VISION, Architecture, mixers
from peft import (
    AutoPeftModelForCausalLM,
    PeftConfig,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging
from tuned import tune

from peft_s0 import S0Config, S0Layer, StateBank
from peft_s0.naming import match_names

ROWS = {row.name: row for row in ARCHITECTURES}
WITH_VISION = {
    "qwen3_5": ROWS["qwen3_5_vl"].build,
    "qwen3_5_moe": ROWS["qwen3_5_moe_vl"].build,
    "nemotron_h": ROWS["nemotron_h_omni"].build,
    "qwen4_exp": lambda: transformers.Qwen4ExpForConditionalGeneration(
        transformers.Qwen4ExpConfig(text_config=QWEN4, vision_config=VISION, **IMAGE_TOKENS)
    ),
}


@pytest.fixture(autouse=True, scope="module")
def _no_grad():
    with torch.no_grad():
        yield


def text_of(model: nn.Module) -> PreTrainedModel:
    """The text backbone of any class of a model, also of an adapted one."""
    return next(m for m in model.modules() if any(isinstance(c, nn.ModuleList) and mixers(c) for c in m.children()))


def hidden(model: nn.Module, ids: Tensor) -> Tensor:
    """What the text backbone makes of the tokens."""
    return text_of(model)(ids).last_hidden_state


class Family:
    """The classes of one model, with the same weights in the text part.

    Args:
        row: the class with a language-modelling head, or the vision-language class where there is no other.
    """

    def __init__(self, row: Architecture) -> None:
        head = row.build()
        self.classes = {"head": head, "backbone": head.base_model}
        if text_of(head) is not head.base_model:
            self.classes["text"] = text_of(head)
        if row.name in WITH_VISION:
            vision = WITH_VISION[row.name]().eval()
            text_of(vision).load_state_dict(text_of(head).state_dict())
            if hasattr(vision, "lm_head"):
                vision.lm_head.load_state_dict(head.lm_head.state_dict())
            self.classes |= {"vision": vision, "vision backbone": vision.base_model, "text": text_of(vision)}

    def build(self, name: str) -> PreTrainedModel:
        return copy.deepcopy(self.classes[name])

    def tuned(self, name: str, **config: object) -> PeftModel:
        """A class with random states; the same ones for every class."""
        torch.manual_seed(1)
        return get_peft_model(self.build(name), S0Config(**{"alpha": 0.7, "init_weights": 1.0, **config})).eval()

    def pairs(self) -> list[tuple[str, str]]:
        return [(a, b) for a in self.classes for b in self.classes if a != b]


IDS = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(0))


def assert_exact(loaded: nn.Module, tuned: nn.Module) -> None:
    """The same states in the same layers, and so the same outputs."""
    expected, actual = ([p for n, p in m.named_parameters() if ".s0_state." in n] for m in (tuned, loaded))
    assert len(actual) == len(expected) > 0
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert all(layer.configs[layer.active_adapters[0]].alpha == 0.7 for layer in loaded.modules() if is_layer(layer))
    assert torch.equal(hidden(loaded.eval(), IDS), hidden(tuned, IDS))


def is_layer(module: nn.Module) -> bool:
    return isinstance(module, S0Layer)


@pytest.fixture(params=ROWS.values(), ids=ROWS, scope="module")
def family(request: pytest.FixtureRequest) -> Family:
    return Family(request.param)


def test_every_class_loads_what_every_other_saves(family: Family, tmp_path: Path) -> None:
    tuned = {name: family.tuned(name) for name in family.classes}
    for name, model in tuned.items():
        # The states count for something, so a state at its initial value would show.
        assert not torch.allclose(hidden(model, IDS), hidden(family.classes[name], IDS), atol=1e-2)
        model.save_pretrained(tmp_path / name)
    for first, second in family.pairs():
        assert_exact(PeftModel.from_pretrained(family.build(second), tmp_path / first), tuned[first])


SPELLED_OUT = [ROWS[name] for name in ("qwen3_5", "falcon_h1", "nemotron_h", "glm5_next")]


@pytest.mark.parametrize("row", SPELLED_OUT, ids=lambda row: row.name)
def test_names_and_indices_that_a_config_spells_out(row: Architecture, tmp_path: Path) -> None:
    family = Family(row)
    for name in family.classes:
        mixers = family.tuned(name).targeted_module_names[1:]
        indices = [int(index) for mixer in mixers for index in re.findall(r"\.(\d+)\.", f".{mixer}")]
        for config in ({"target_modules": mixers}, {"layers_to_transform": indices}):
            tuned = family.tuned(name, **config)
            assert tuned.targeted_module_names == mixers
            tuned.save_pretrained(tmp_path / name)
            for other in family.classes:
                assert_exact(PeftModel.from_pretrained(family.build(other), tmp_path / name), tuned)


LOADERS: dict[str, Callable[[PreTrainedModel, Path], nn.Module]] = {}


def loader(function: Callable) -> Callable:
    LOADERS[function.__name__] = function
    return function


@loader
def from_pretrained(base: PreTrainedModel, folder: Path) -> nn.Module:
    return PeftModel.from_pretrained(base, folder)


@loader
def low_cpu_mem_usage(base: PreTrainedModel, folder: Path) -> nn.Module:
    return PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=True)


@loader
def trainable(base: PreTrainedModel, folder: Path) -> nn.Module:
    return PeftModel.from_pretrained(base, folder, is_trainable=True)


@loader
def load_adapter(base: PreTrainedModel, folder: Path) -> nn.Module:
    model = get_peft_model(base, S0Config(), adapter_name="first")
    model.load_adapter(folder, "second")
    model.set_adapter("second")
    model.delete_adapter("first")
    return model


@loader
def state_dict(base: PreTrainedModel, folder: Path) -> nn.Module:
    model = get_peft_model(base, S0Config(alpha=0.7))
    set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
    return model


@loader
def injection(base: PreTrainedModel, folder: Path) -> nn.Module:
    states = load_file(folder / "adapter_model.safetensors")
    model = inject_adapter_in_model(PeftConfig.from_pretrained(folder), base, state_dict=states)
    set_peft_model_state_dict(model, states)
    return model


@loader
def injection_without_the_prefix(base: PreTrainedModel, folder: Path) -> nn.Module:
    states = load_file(folder / "adapter_model.safetensors")
    states = {name.removeprefix("base_model.model."): state for name, state in states.items()}
    model = inject_adapter_in_model(PeftConfig.from_pretrained(folder), base, state_dict=states)
    set_peft_model_state_dict(model, states)
    return model


@loader
def transformers_api(base: PreTrainedModel, folder: Path) -> nn.Module:
    base.load_adapter(folder)
    return base


@pytest.fixture(params=["qwen3_5", "falcon_h1"], scope="module")
def main_family(request: pytest.FixtureRequest) -> Family:
    return Family(ROWS[request.param])


def save_with_peft(family: Family, name: str, folder: Path) -> nn.Module:
    tuned = family.tuned(name)
    tuned.save_pretrained(folder)
    return tuned


def save_with_transformers(family: Family, name: str, folder: Path) -> nn.Module:
    tuned = family.build(name)
    torch.manual_seed(1)
    tuned.add_adapter(S0Config(alpha=0.7, init_weights=1.0))
    tuned.eval().save_pretrained(folder)
    return tuned


def save_with_transformers_names(family: Family, name: str, folder: Path) -> nn.Module:
    tuned = save_with_transformers(family, name, folder)
    tuned.save_pretrained(folder, save_peft_format=False)
    assert not any(key.startswith("base_model") for key in load_file(folder / "adapter_model.safetensors"))
    return tuned


SAVERS = [save_with_peft, save_with_transformers, save_with_transformers_names]
PAIRS = [
    ("head", "vision"),
    ("vision", "head"),
    ("head", "backbone"),
    ("backbone", "head"),
    ("vision backbone", "text"),
]


@pytest.fixture(params=SAVERS, ids=lambda save: save.__name__, scope="module")
def saved(request: pytest.FixtureRequest, main_family: Family, tmp_path_factory) -> dict[str, tuple[nn.Module, Path]]:
    """A tuned model of each class and its folder."""
    folder = tmp_path_factory.mktemp("saved")
    return {name: (request.param(main_family, name, folder / name), folder / name) for name in main_family.classes}


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_every_loader(main_family: Family, saved: dict, load: Callable) -> None:
    """Exact or refused; refused by transformers' own loader only, which has its own translation of names."""
    for first, second in PAIRS:
        if not {first, second} <= set(main_family.classes):
            continue
        tuned, folder = saved[first]
        base = main_family.build(second)
        if load is transformers_api and (first, second) in [("head", "vision"), ("vision backbone", "text")]:
            with pytest.raises(RuntimeError, match=r"was never loaded.*PeftModel.from_pretrained does"):
                load(base, folder)
            # Nor is it used by one who goes on after the error, until it is taken away.
            with pytest.raises(RuntimeError, match="was never loaded"):
                hidden(base, IDS)
            base.delete_adapter("default")
            assert torch.equal(hidden(base, IDS), hidden(main_family.classes[second], IDS))
            assert_exact(PeftModel.from_pretrained(base, folder), tuned)
        else:
            assert_exact(load(base, folder), tuned)


def test_logits_of_text(main_family: Family, tmp_path: Path) -> None:
    """What a reader of the table above relies on: the classes with a head give the same logits, with random states."""
    tuned = main_family.tuned("head")
    tuned.save_pretrained(tmp_path)
    for name in {"head", "vision"} & set(main_family.classes):
        loaded = PeftModel.from_pretrained(main_family.build(name), tmp_path)
        assert torch.equal(loaded(IDS).logits, tuned(IDS).logits)
        generated, expected = (m.generate(IDS, max_new_tokens=5, do_sample=False) for m in (loaded, tuned))
        assert torch.equal(generated, expected)


def test_auto_classes_take_an_adapter_of_the_vision_language_class(tmp_path: Path) -> None:
    """The usual case: trained on the class a checkpoint names, loaded on AutoModelForCausalLM, the text-only one."""
    family = Family(ROWS["qwen3_5"])
    family.classes["vision"].save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    tuned = get_peft_model(base, S0Config(alpha=0.7, init_weights=1.0)).eval()
    tuned.save_pretrained(tmp_path / "adapter")
    assert isinstance(base, transformers.Qwen3_5ForConditionalGeneration)
    text = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert isinstance(text, transformers.Qwen3_5ForCausalLM)
    assert_exact(PeftModel.from_pretrained(text, tmp_path / "adapter"), tuned)
    assert_exact(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"), tuned)
    assert_exact(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter"), tuned)


def test_further_modules_come_along(tmp_path: Path) -> None:
    family = Family(ROWS["qwen3_5"])
    tuned = family.tuned("head", modules_to_save=["lm_head"])
    for name, parameter in tuned.named_parameters():
        if "modules_to_save" in name:
            parameter.add_(0.05)
    tuned.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(family.build("vision"), tmp_path)
    assert torch.equal(loaded(IDS).logits, tuned(IDS).logits)


def change_names(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)


def twice(states: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each layer under two names, so that neither is certain."""
    return {
        name.replace("model.layers", stack): state.clone()
        for name, state in states.items()
        for stack in ("model.layers", "mtp.layers")
    }


def without_one(states: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(list(states.items())[1:])


def shifted(states: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("layers.0.", "layers.7."): state for name, state in states.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (twice, r"Expected 3 layers, found 6; missing in the file: .*not in the model: .*mtp"),
        (without_one, "Expected 3 layers, found 2; missing in the file: "),
        (shifted, r"Expected 3 layers, found 3; missing in the file: .*layers\.0.*not in the model: .*layers\.7"),
    ],
)
def test_refused(change: Callable, message: str, tmp_path: Path) -> None:
    family = Family(ROWS["qwen3_5"])
    family.tuned("head").save_pretrained(tmp_path)
    change_names(tmp_path, change)
    for name in ("vision", "backbone"):
        base = family.build(name)
        with pytest.raises(ValueError, match=message):
            PeftModel.from_pretrained(base, tmp_path)
        assert not any(is_layer(module) for module in base.modules())
        assert torch.equal(hidden(base, IDS), hidden(family.classes[name], IDS))


def test_a_regular_expression_for_another_class_is_refused(main_family: Family, tmp_path: Path) -> None:
    pattern = r"model\.layers\.\d+\.(linear_attn|mamba)"
    main_family.tuned("head", target_modules=pattern).save_pretrained(tmp_path)
    base = main_family.build("backbone")
    with pytest.raises(ValueError, match=r"matches nothing. The recurrent mixers of this model are layers\.0"):
        PeftModel.from_pretrained(base, tmp_path)
    assert not any(is_layer(module) for module in base.modules())


def test_a_model_with_the_same_layer_twice() -> None:
    """Nothing is guessed: a name that may stand for two stands for itself."""
    two = ["encoder.layers.0.mixer", "decoder.layers.0.mixer"]
    assert match_names(["model.layers.0.mixer"], two) == {"model.layers.0.mixer": "model.layers.0.mixer"}
    assert match_names(two, ["layers.0.mixer"]) == {name: name for name in two}
    assert match_names(two, two) == {name: name for name in two}
    assert match_names(["a.layers.1.mixer"], ["b.layers.0.mixer"]) == {"a.layers.1.mixer": "a.layers.1.mixer"}
    assert match_names(["mixer"], ["model.mixer"]) == {"mixer": "mixer"}


def test_an_adapter_for_training_is_reported_by_transformers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its first values are what training starts from, so S0 refuses nothing; the loader's report names the states."""
    family = Family(ROWS["qwen3_5"])
    family.tuned("head").save_pretrained(tmp_path)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_warning()
    logging.enable_propagation()
    try:
        info = family.build("vision").load_adapter(tmp_path, is_trainable=True)
    finally:
        logging.disable_propagation()
        logging.set_verbosity(verbosity)
    assert len(info.missing_keys) == 3
    assert re.search(r"language_model\.layers.*s0_state.*MISSING", caplog.text)


def test_an_adapter_that_is_not_loaded_is_not_used(architecture: Architecture) -> None:
    """Whichever way its states should have come; any way of giving it values ends the refusal, also for copies."""

    def load(layer: S0Layer, state: Tensor) -> None:
        layer.s0_state["default"].load_state_dict({"weight": state})

    def write(layer: S0Layer, state: Tensor) -> None:
        layer.s0_state["default"].weight.copy_(state)

    def replace(layer: S0Layer, state: Tensor) -> None:
        layer.s0_state["default"].weight = nn.Parameter(state.clone())

    expected = tune(architecture)
    ids = expected.ids(2, 9)
    states = [layer.s0_state["default"].weight for layer in expected.model.base_model.tuner_layers()]
    for give in (load, write, replace):
        config = S0Config(alpha=0.7, inference_mode=True, init_weights=1.0 if give is load else True)
        model = get_peft_model(architecture.build(), config).eval()
        for unloaded in (model, copy.deepcopy(model)):
            with pytest.raises(RuntimeError, match=r"never loaded.*set inference_mode=False"):
                unloaded(ids)
        with model.disable_adapter():
            assert torch.equal(model(ids).logits, expected.base(ids).logits)
        for layer, state in zip(model.base_model.tuner_layers(), states, strict=True):
            give(layer, state)
        for loaded in (copy.deepcopy(model), model):
            assert torch.equal(loaded(ids).logits, expected.model(ids).logits)


@pytest.mark.parametrize("name", ["qwen3_5", "falcon_h1"])
def test_banks_and_hot_swaps(name: str, tmp_path: Path) -> None:
    family = Family(ROWS[name])
    for saved, used in family.pairs():
        tuned = family.tuned(saved)
        tuned.save_pretrained(tmp_path / saved)
        model = get_peft_model(family.build(used), S0Config(init_weights=1.0)).eval()
        bank = StateBank(model, capacity=1)
        bank.add("task", tmp_path / saved)
        with bank.use(["task", "task"]):
            assert torch.equal(hidden(model, IDS), hidden(tuned, IDS))
        model.hotswap_adapter(tmp_path / saved, "default")
        assert_exact(model, tuned)
