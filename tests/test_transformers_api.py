"""Adapters by transformers' own methods, without a PeftModel, and by its loaders and pipelines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from architectures import Architecture, mixers
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, pipeline
from tuned import Tuned, tune

from peft_s0 import S0Config

TOKENIZER = Path(__file__).parents[1] / "examples" / "models" / "tiny-qwen3.5"

# PEFT says so for each adapter after the first, LoRA's as well.
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")


@pytest.fixture(autouse=True, scope="module")
def _no_grad():
    with torch.no_grad():
        yield


def config(**fields: object) -> S0Config:
    return S0Config(**{"alpha": 0.7, "init_weights": 1.0, **fields})


def parameters(model: nn.Module, name: str = "default") -> list[Tensor]:
    return [mixer.s0.s0_state[name].weight for mixer in mixers(model)]


@pytest.fixture
def folder(tuned: Tuned, tmp_path: Path) -> Path:
    """A saved base model and an adapter for it."""
    tuned.base.save_pretrained(tmp_path / "base")
    tuned.model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    tuned.model.save_pretrained(tmp_path / "adapter")
    return tmp_path


@pytest.fixture
def two(architecture: Architecture) -> PreTrainedModel:
    torch.manual_seed(3)
    model = architecture.build()
    model.add_adapter(config(), "one")
    model.add_adapter(config(), "two")
    return model.eval()


def test_switch(two: PreTrainedModel, tuned: Tuned) -> None:
    ids = tuned.ids(2, 9)
    assert two.active_adapters() == ["two"]
    second = two(ids).logits
    two.set_adapter("one")
    assert two.active_adapters() == ["one"]
    first = two(ids).logits
    assert not torch.equal(first, second)
    assert {name.split(".")[-2] for name, p in two.named_parameters() if p.requires_grad} == {"one"}
    two.set_adapter("two")
    assert torch.equal(two(ids).logits, second)


def test_states_of_several_add_up(two: PreTrainedModel, tuned: Tuned) -> None:
    ids = tuned.ids(2, 9)
    two.set_adapter(["one", "two"])
    assert two.active_adapters() == ["one", "two"]
    both = two(ids).logits
    for one, other in zip(parameters(two, "one"), parameters(two, "two"), strict=True):
        one.add_(other)
    two.set_adapter("one")
    torch.testing.assert_close(two(ids).logits, both, atol=1e-5, rtol=0)


def test_disable(two: PreTrainedModel, tuned: Tuned) -> None:
    ids = tuned.ids(2, 9)
    expected = two(ids).logits
    two.disable_adapters()
    assert torch.equal(two(ids).logits, tuned.base(ids).logits)
    two.enable_adapters()
    assert torch.equal(two(ids).logits, expected)


def test_delete(two: PreTrainedModel, tuned: Tuned) -> None:
    ids = tuned.ids(2, 9)
    expected = two(ids).logits
    two.delete_adapter("one")
    assert list(two.peft_config) == ["two"]
    assert torch.equal(two(ids).logits, expected)
    two.delete_adapter("two")
    assert not [name for name in two.state_dict() if "s0" in name]
    assert torch.equal(two(ids).logits, tuned.base(ids).logits)
    two.add_adapter(config(), "three")
    assert not torch.equal(two.eval()(ids).logits, tuned.base(ids).logits)


def test_train(architecture: Architecture, tuned: Tuned) -> None:
    model = architecture.build()
    model.add_adapter(S0Config(alpha=1.0))
    ids = tuned.ids(2, 9)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("s0_state" in name for name in trained)
    with torch.enable_grad():
        model.train()(ids, labels=ids).loss.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trained
    assert all(bool(parameter.grad.any()) for parameter in parameters(model))


@pytest.mark.parametrize("name", ["default", "s0", "task"])
def test_save_and_load(two: PreTrainedModel, tuned: Tuned, tmp_path: Path, name: str) -> None:
    """The file is PEFT's, and the other way round."""
    ids = tuned.ids(2, 9)
    two.set_adapter("one")
    two.save_pretrained(tmp_path)
    states = load_file(tmp_path / "adapter_model.safetensors")
    assert all(state.dtype == torch.float32 for state in states.values())
    assert states.keys() == get_peft_model_state_dict(tuned.model).keys()
    expected = two(ids).logits
    assert torch.equal(PeftModel.from_pretrained(tuned.architecture.build(), tmp_path)(ids).logits, expected)
    model = tuned.architecture.build()
    model.load_adapter(str(tmp_path), name)
    assert model.active_adapters() == [name]
    assert torch.equal(model(ids).logits, expected)
    assert not any(p.requires_grad for p in parameters(model, name))


def test_load_for_training(tuned: Tuned, folder: Path) -> None:
    model = tuned.architecture.build()
    model.load_adapter(str(folder / "adapter"), is_trainable=True)
    assert all(p.requires_grad for p in parameters(model))
    assert torch.equal(model.eval()(tuned.ids(2, 9)).logits, tuned.model(tuned.ids(2, 9)).logits)


def test_load_states_given_in_memory(tuned: Tuned) -> None:
    model = tuned.architecture.build()
    states = get_peft_model_state_dict(tuned.model)
    model.load_adapter(adapter_state_dict=states, peft_config=config(alpha=0.7, init_weights=True))
    assert torch.equal(model.eval()(tuned.ids(2, 9)).logits, tuned.model(tuned.ids(2, 9)).logits)


def test_load_beside_another(two: PreTrainedModel, tuned: Tuned, folder: Path) -> None:
    """Loading switches to what is loaded, as with LoRA, and changes no other adapter."""
    ids = tuned.ids(2, 9)
    second = two(ids).logits
    two.load_adapter(str(folder / "adapter"), "three")
    assert two.active_adapters() == ["three"]
    assert torch.equal(two(ids).logits, tuned.model(ids).logits)
    two.set_adapter("two")
    assert torch.equal(two(ids).logits, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_load_the_base_model_by_its_adapter(tuned: Tuned, folder: Path, dtype: torch.dtype) -> None:
    """States stay float32 to the last bit whatever the base model is loaded in."""
    model = AutoModelForCausalLM.from_pretrained(folder / "adapter", dtype=dtype)
    assert model.dtype == dtype
    assert {p.dtype for p in parameters(model)} == {torch.float32}
    for loaded, saved in zip(parameters(model), parameters(tuned.model), strict=True):
        assert torch.equal(loaded, saved)
    if dtype == torch.float32:
        assert torch.equal(model(tuned.ids(2, 9)).logits, tuned.model(tuned.ids(2, 9)).logits)


def test_load_an_adapter_into_a_bf16_model(tuned: Tuned, folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    model.load_adapter(str(folder / "adapter"))
    assert all(torch.equal(a, b) for a, b in zip(parameters(model), parameters(tuned.model), strict=True))
    model.save_pretrained(folder / "again")
    states = [load_file(folder / name / "adapter_model.safetensors") for name in ("adapter", "again")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_pipeline(tuned: Tuned, folder: Path) -> None:
    """The adapter names its base model, so its folder is all that a pipeline needs beside a tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    generate = pipeline("text-generation", model=str(folder / "adapter"), tokenizer=tokenizer, device="cpu")
    prompts = ["def f(a):", "return a + b"]
    arguments = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}

    def texts(model: PreTrainedModel) -> list[str]:
        rows = [tokenizer(prompt, return_tensors="pt") for prompt in prompts]
        new = [model.generate(**row, max_new_tokens=8, do_sample=False)[0, row["input_ids"].shape[1] :] for row in rows]
        return [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in new]

    expected = texts(tuned.model)
    assert expected != texts(tuned.base)
    for batch_size in (1, 2):
        found = generate(prompts, batch_size=batch_size, **arguments)
        assert [text[0]["generated_text"] for text in found] == expected


def test_errors_name_the_adapter(two: PreTrainedModel, folder: Path) -> None:
    for call in (
        lambda: two.set_adapter("three"),
        lambda: two.set_adapter(["one", "three"]),
        lambda: two.delete_adapter("three"),
    ):
        with pytest.raises(ValueError, match="three"):
            call()
    with pytest.raises(ValueError, match="Adapter with name one already exists"):
        two.load_adapter(str(folder / "adapter"), "one")
    with pytest.raises(ValueError, match="only supported for LoRA, please set `hotswap=False`"):
        two.load_adapter(str(folder / "adapter"), "one", hotswap=True)
    two.set_adapter(["one", "two"])
    with pytest.raises(ValueError, match="Multiple active adapters"):
        two.save_pretrained(folder / "both")
    assert not (folder / "both" / "adapter_config.json").exists()


def test_config_is_that_of_the_loaded_adapter(tuned: Tuned, folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "adapter")
    saved = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert model.peft_config["default"].alpha == saved["alpha"] == tuned.model.peft_config["default"].alpha
    assert isinstance(model.peft_config["default"], S0Config)


def test_other_shapes_are_refused(folder: Path, architecture: Architecture) -> None:
    tune(architecture, rank=2).model.save_pretrained(folder / "low rank")
    saved = json.loads((folder / "low rank" / "adapter_config.json").read_text())
    (folder / "low rank" / "adapter_config.json").write_text(json.dumps({**saved, "rank": None}))
    with pytest.raises(RuntimeError, match=r"never loaded: .* had none of its name and shape"):
        architecture.build().load_adapter(str(folder / "low rank"))


@pytest.mark.parametrize("is_trainable", [False, True])
def test_values_that_are_not_finite_are_refused(folder: Path, architecture: Architecture, is_trainable: bool) -> None:
    """When they are loaded, or for training, which transformers tells nobody of, when they are used."""
    file = folder / "adapter" / "adapter_model.safetensors"
    states = load_file(file)
    next(iter(states.values()))[0, 0, 0] = float("nan")
    save_file(states, file, metadata={"format": "pt"})
    model = architecture.build()
    message = r"has 1 of \d+ values that are NaN or infinite.*Load another checkpoint"
    if is_trainable:
        model.load_adapter(str(folder / "adapter"), is_trainable=True)
    else:
        with pytest.raises(ValueError, match=message):
            model.load_adapter(str(folder / "adapter"))
    with pytest.raises(ValueError, match=message):
        model(torch.ones(1, 3, dtype=torch.long))
