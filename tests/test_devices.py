"""Where the model is and what dtype it has: offloaded to memory or disk, on meta between calls, cast after the fact."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from architectures import ARCHITECTURES, MAIN, Architecture
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from tuned import Tuned, tune

from peft_s0 import S0Config

CPU = torch.device("cpu")


@pytest.fixture
def folder(tuned: Tuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A saved base model and an adapter for it; PEFT writes offloaded weights below the working directory."""
    monkeypatch.chdir(tmp_path)
    tuned.base.save_pretrained(tmp_path / "base")
    tuned.model.save_pretrained(tmp_path / "adapter")
    return tmp_path


def states(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if "s0_state" in name}


def on_meta(model: nn.Module) -> float:
    """Share of the base model's parameters that hold no data between calls."""
    base = [p.is_meta for name, p in model.named_parameters() if "s0_state" not in name]
    return sum(base) / len(base)


@torch.no_grad()
def assert_same(model: nn.Module, tuned: Tuned) -> None:
    """As the model that is all in one place: at once, padded, generating, and once more."""
    ids, mask = tuned.ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    for arguments in ({}, {"attention_mask": mask}, {}):
        assert torch.equal(model(ids, **arguments).logits, tuned.model(ids, **arguments).logits)
    generation = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(ids, **generation), tuned.model.generate(ids, **generation))
    assert {p.dtype for p in states(model).values()} == {torch.float32}


def in_memory(model: PreTrainedModel, folder: Path) -> None:
    cpu_offload(model, execution_device=CPU)


def on_disk(model: PreTrainedModel, folder: Path) -> None:
    disk_offload(model, str(folder / "offloaded"), execution_device=CPU)


def by_loading(model: PeftModel, folder: Path, base: PreTrainedModel) -> PeftModel:
    return PeftModel.from_pretrained(base, folder / "adapter")


def by_loading_in_little_memory(model: PeftModel, folder: Path, base: PreTrainedModel) -> PeftModel:
    return PeftModel.from_pretrained(base, folder / "adapter", low_cpu_mem_usage=True)


def by_a_new_adapter(model: PeftModel, folder: Path, base: PreTrainedModel) -> PeftModel:
    tuned = get_peft_model(base, S0Config(alpha=0.7)).eval()
    set_peft_model_state_dict(tuned, get_peft_model_state_dict(model))
    return tuned


def by_injection(model: PeftModel, folder: Path, base: PreTrainedModel) -> PreTrainedModel:
    base = inject_adapter_in_model(S0Config(alpha=0.7), base).eval()
    set_peft_model_state_dict(base, get_peft_model_state_dict(model))
    return base


@pytest.mark.parametrize("offload", [in_memory, on_disk])
@pytest.mark.parametrize("adapt", [by_loading, by_loading_in_little_memory, by_a_new_adapter, by_injection])
def test_adapt_an_offloaded_model(tuned: Tuned, folder: Path, offload: Callable, adapt: Callable) -> None:
    base = tuned.architecture.build()
    offload(base, folder)
    model = adapt(tuned.model, folder, base)
    assert on_meta(model) == 1
    assert not any(state.is_meta for state in states(model).values())
    assert_same(model, tuned)


@pytest.mark.parametrize("offload", [in_memory, on_disk])
def test_offload_an_adapted_model(tuned: Tuned, tmp_path: Path, offload: Callable) -> None:
    """The states go with it: a state is asked for by a call, and accelerate's hooks bring it."""
    model = copy.deepcopy(tuned.model)
    offload(model, tmp_path)
    assert on_meta(model) == 1
    assert_same(model, tuned)


# RecurrentGemma's own mixers do not find their weights.
OTHERS = [row for row in ARCHITECTURES if row not in MAIN and row.name != "recurrent_gemma"]


@pytest.mark.parametrize("architecture", OTHERS, ids=lambda row: row.name)
def test_offload_every_architecture(tuned: Tuned, tmp_path: Path) -> None:
    model = copy.deepcopy(tuned.model)
    in_memory(model, tmp_path)
    assert_same(model, tuned)


def device_map(model: PreTrainedModel, prefix: str = "") -> dict[str, str]:
    """Every second layer on disk, all else in memory."""
    parts = {f"model.{name}": "cpu" for name, _ in model.model.named_children() if name != "layers"}
    layers = {f"model.layers.{i}": ("cpu", "disk")[i % 2] for i in range(len(model.model.layers))}
    return {prefix + name: device for name, device in {**parts, **layers, "lm_head": "cpu"}.items()}


def spread(tuned: Tuned, folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        folder / "base", device_map=device_map(tuned.base), offload_folder=str(folder / "offloaded")
    )


@pytest.mark.parametrize("adapt", [by_a_new_adapter, by_injection])
def test_adapt_a_model_that_is_spread_by_a_device_map(tuned: Tuned, folder: Path, adapt: Callable) -> None:
    model = adapt(tuned.model, folder, spread(tuned, folder))
    assert 0 < on_meta(model) < 1
    assert_same(model, tuned)


def test_load_onto_a_model_that_is_spread_by_a_device_map(tuned: Tuned, folder: Path) -> None:
    """PEFT spreads the model anew, with the base model's files; the states are not in them and must not be lost."""
    arguments = {
        "device_map": device_map(tuned.base, "base_model.model."),
        "offload_folder": str(folder / "offloaded again"),
    }
    model = PeftModel.from_pretrained(spread(tuned, folder), folder / "adapter", **arguments)
    assert 0 < on_meta(model) < 1
    assert not any(state.is_meta for state in states(model).values())
    assert_same(model, tuned)
    model.save_pretrained(folder / "again")
    saved = [load_file(folder / name / "adapter_model.safetensors") for name in ("adapter", "again")]
    assert saved[0].keys() == saved[1].keys()
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])
    other = tune(tuned.architecture, init_weights=0.5)
    other.model.save_pretrained(folder / "other")
    model.load_adapter(folder / "other", "other")
    model.set_adapter("other")
    assert_same(model, other)


@pytest.mark.parametrize("offload", [in_memory, on_disk])
def test_gradients_on_an_offloaded_model(architecture: Architecture, tmp_path: Path, offload: Callable) -> None:
    gradients = []
    for offloaded in (True, False):
        base = architecture.build()
        if offloaded:
            offload(base, tmp_path)
        torch.manual_seed(4)
        model = get_peft_model(base, S0Config(alpha=0.7, init_weights=0.5))
        ids = torch.randint(3, 99, (2, 9), generator=torch.Generator().manual_seed(0))
        model(ids, labels=ids).loss.backward()
        gradients.append([state.grad for state in states(model).values()])
    assert all(bool(gradient.any()) for gradient in gradients[0])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.bfloat16(),
    "to float16": lambda model: model.to(torch.float16),
    "to cpu and bfloat16": lambda model: model.to("cpu", torch.bfloat16),
    "to bfloat16 as keyword": lambda model: model.to(dtype=torch.bfloat16),
    "to the dtype of a tensor": lambda model: model.to(torch.zeros(1, dtype=torch.float16)),
    "base model alone": lambda model: (model.get_base_model().bfloat16(), model)[1],
    "there and back": lambda model: model.half().float(),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_states_stay_float32_to_the_last_bit(tuned: Tuned, cast: Callable) -> None:
    before = {name: state.clone() for name, state in states(tuned.model).items()}
    model = cast(tuned.model)
    for name, state in states(model).items():
        assert state.dtype == torch.float32
        assert torch.equal(state, before[name])
    with torch.no_grad():
        logits = model(tuned.ids(2, 9)).logits
    assert logits.dtype == model.dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_adapter_for_a_cast_model_is_float32(tuned: Tuned, folder: Path, dtype: torch.dtype) -> None:
    base = tuned.architecture.build().to(dtype)
    loaded = PeftModel.from_pretrained(base, folder / "adapter")
    loaded.load_adapter(folder / "adapter", "low memory", low_cpu_mem_usage=True)
    loaded.add_adapter("new", S0Config(init_weights=1.0))
    for name, state in states(loaded).items():
        assert state.dtype == torch.float32
        if ".new." not in name:
            assert torch.equal(state, states(tuned.model)[name.replace(".low memory.", ".default.")])


def test_a_cast_model_starts_from_the_same_states(tuned: Tuned) -> None:
    """Rounding of the base model's weights is all that a cast changes."""
    ids = tuned.ids(2, 9)
    with torch.no_grad():
        expected = tuned.model(ids).logits
        base = tuned.base(ids).logits
        for dtype in (torch.bfloat16, torch.float16):
            error = float((copy.deepcopy(tuned.model).to(dtype)(ids).logits.float() - expected).abs().max())
            assert error < 0.1 * float((expected - base).abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_trains_float32_states(architecture: Architecture, dtype: torch.dtype) -> None:
    tuned = tune(architecture, init_weights=0.5)
    ids = tuned.ids(2, 9)
    gradients = {}
    for enabled in (False, True):
        tuned.model.zero_grad()
        with torch.autocast("cpu", dtype, enabled=enabled):
            tuned.model.train()(ids, labels=ids).loss.backward()
        gradients[enabled] = [state.grad.clone() for state in states(tuned.model).values()]
    for state, exact, rounded in zip(states(tuned.model).values(), gradients[False], gradients[True], strict=True):
        assert state.dtype == state.grad.dtype == torch.float32
        assert float((exact - rounded).norm()) < 0.1 * float(exact.norm())
