"""A different adapter for each row of a batch, in forward and generate."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from architectures import ARCHITECTURES, Architecture
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils import AuxiliaryTrainingWrapper
from test_law import left_pad, packed_arguments
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LogitsProcessor, LogitsProcessorList
from tuned import Tuned, tune

from peft_s0 import S0Config, S0Layer

NAMES = ["second", "__base__", "default", "few", "__base__", "second", "default"]


@pytest.fixture(autouse=True, scope="module")
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def mix(architecture: Architecture, **config: object) -> Tuned:
    """A model with three adapters of different kinds, one of them of a single layer."""
    tuned = tune(architecture, task_type="CAUSAL_LM", **config)
    torch.manual_seed(1)
    tuned.model.add_adapter("second", S0Config(alpha=0.6, init_weights=1.0, task_type="CAUSAL_LM"))
    few = {"alpha": 5.0, "init_weights": 1.0, "layers_to_transform": [1], "normalize": True}
    tuned.model.add_adapter("few", S0Config(**few, task_type="CAUSAL_LM"))
    tuned.model.eval()
    return tuned


@pytest.fixture
def mixed(architecture: Architecture) -> Tuned:
    return mix(architecture)


def alone(tuned: Tuned, call: Callable[[PeftModel], Tensor], names: list[str] = NAMES) -> Tensor:
    """Each row as it is when the whole batch has its adapter."""
    results = {}
    for name in set(names) - {"__base__"}:
        tuned.model.set_adapter(name)
        results[name] = call(tuned.model)
    tuned.model.set_adapter("default")
    results["__base__"] = call(tuned.base)
    return torch.stack([results[name][i] for i, name in enumerate(names)])


def unrouted(model: PeftModel) -> bool:
    """Whether nothing is left of a call with `adapter_names`."""
    wrappers = [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    layers = [module for module in model.modules() if isinstance(module, S0Layer)]
    return all(layer.routing.rows is None for layer in layers) and not any(w._forward_pre_hooks for w in wrappers)


def test_each_row_starts_from_its_adapters_state(mixed: Tuned) -> None:
    """To the last bit, though the rows are gathered before they are scaled."""
    mixed.model.add_adapter("low", S0Config(alpha=0.3, init_weights=1.0, rank=2, task_type="CAUSAL_LM"))
    names = [*NAMES, "low"]
    layers, seen = list(mixed.model.base_model.tuner_layers()), 0
    with mixed.model.base_model._enable_peft_forward_hooks(adapter_names=names):
        for layer in layers:
            states = layer.start_states(len(names), torch.device("cpu"))
            for name, state in zip(names, states, strict=True):
                held = name in layer.configs
                assert torch.equal(state, layer.effective_state(name) if held else torch.zeros_like(state))
                seen += held
    assert seen == len(layers) * 5 + 1


@pytest.mark.parametrize("tokens", [1, 2, 9])
@pytest.mark.parametrize("use_cache", [False, True])
def test_forward(mixed: Tuned, tokens: int, use_cache: bool) -> None:
    """Also of prompts of a single token, which S0 runs as two."""
    ids = mixed.ids(7, tokens)
    output = mixed.model(ids, adapter_names=NAMES, use_cache=use_cache)
    expected = alone(mixed, lambda model: model(ids, use_cache=use_cache).logits)
    base = [i for i, name in enumerate(NAMES) if name == "__base__"]
    assert torch.equal(output.logits[base], expected[base])
    torch.testing.assert_close(output.logits, expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda architecture: architecture.name)
def test_base_rows_of_single_token_prompts_are_exact(architecture: Architecture) -> None:
    """Beside rows that are run as two tokens: logits, what the cache keeps, and so the next step."""
    tuned = tune(architecture)
    for count in (2, 5, 7):
        names = (["default", "__base__", "default"] * 3)[:count]
        base = [i for i, name in enumerate(names) if name == "__base__"]
        caches = [architecture.make_cache(tuned.model.config, count) for _ in range(2)]
        for seed in (1, 2):
            ids = tuned.ids(count, 1, seed)
            calls = [{architecture.cache: cache, "use_cache": True} for cache in caches]
            actual = tuned.model(ids, adapter_names=names, **calls[0]).logits
            assert torch.equal(actual[base], tuned.base(ids, **calls[1]).logits[base])
        # And without a cache.
        ids = tuned.ids(count, 1)
        actual = tuned.model(ids, adapter_names=names, use_cache=False).logits
        assert torch.equal(actual[base], tuned.base(ids, use_cache=False).logits[base])
        assert not torch.equal(actual, tuned.base(ids, use_cache=False).logits)


@pytest.mark.parametrize(
    "generation", [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}, {"num_return_sequences": 3}]
)
def test_generate(mixed: Tuned, generation: dict) -> None:
    ids, mask, _ = left_pad([mixed.ids(1, n, seed=n)[0] for n in (8, 7, 1, 4, 3, 9, 2)])
    sampled = generation.get("num_return_sequences", 1) > 1 and "num_beams" not in generation
    arguments = {"attention_mask": mask, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": sampled, **generation}

    def run(model: PeftModel, **names: list[str]) -> Tensor:
        torch.manual_seed(0)
        return model.generate(input_ids=ids, **arguments, **names).view(
            7, generation.get("num_return_sequences", 1), -1
        )

    assert torch.equal(run(mixed.model, adapter_names=NAMES), alone(mixed, run))
    assert unrouted(mixed.model)


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])
def test_wrong_lengths(architecture: Architecture, task_type: str | None) -> None:
    """Refused also where a multiple would be a batch of beams, and where all rows are the base model's."""
    tuned = tune(architecture, task_type=task_type)
    ids = tuned.ids(4, 5)
    for names in (["default"] * 3, ["default", "__base__"], ["default"] * 8, ["__base__"] * 2, ["default"], []):
        message = f"adapter_names has {len(names)} entries, but the batch has 4 rows"
        for call in (
            lambda names=names: tuned.model(input_ids=ids, adapter_names=names),
            lambda names=names: tuned.model.generate(input_ids=ids, adapter_names=names, max_new_tokens=2),
            lambda names=names: tuned.model.generate(ids, adapter_names=names, max_new_tokens=2, num_beams=2),
        ):
            with pytest.raises(ValueError, match=message):
                call()
            assert unrouted(tuned.model)


class Calls(LogitsProcessor):
    """Does something in each step of generate()."""

    def __init__(self, action: Callable[[int], None]) -> None:
        self.action = action
        self.steps = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.steps += 1
        self.action(self.steps)
        return scores


def with_lm_head(architecture: Architecture) -> Tuned:
    """Two adapters with a head and a token embedding of their own, and one without."""
    tuned = mix(architecture, modules_to_save=["lm_head"], trainable_token_indices=[5, 7])
    more = {"modules_to_save": ["lm_head"], "trainable_token_indices": [5, 9]}
    tuned.model.add_adapter("other", S0Config(alpha=0.5, init_weights=1.0, task_type="CAUSAL_LM", **more))
    torch.manual_seed(2)
    for name, parameter in tuned.model.named_parameters():
        if "modules_to_save" in name or "trainable_tokens" in name:
            parameter.add_(0.1 * torch.randn_like(parameter))
    tuned.model.eval()
    return tuned


@pytest.mark.parametrize("active", ["default", "second"])
@pytest.mark.parametrize("generation", [{}, {"num_beams": 3}])
def test_modules_to_save_of_each_row(architecture: Architecture, active: str, generation: dict) -> None:
    """Rows whose adapter has no module of its own take the base model's, whatever adapter is active.

    PEFT runs these modules on each adapter's rows apart, which rounds otherwise than the whole batch does.
    """
    tuned = with_lm_head(architecture)
    names = ["default", "second", "other", "__base__"]
    # With the tokens that are trained.
    ids = torch.cat([tuned.ids(4, 6), torch.tensor([5, 7, 9]).expand(4, 3)], dim=1)

    def run(model: PeftModel, **names: list[str]) -> Tensor:
        return model.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False, **generation, **names)

    expected = alone(tuned, lambda model: model(ids).logits, names)
    generated = alone(tuned, run, names)
    tuned.model.set_adapter(active)
    torch.testing.assert_close(tuned.model(ids, adapter_names=names).logits, expected, atol=3e-6, rtol=0)
    assert torch.equal(run(tuned.model, adapter_names=names), generated)
    assert unrouted(tuned.model)


def test_a_module_that_its_mixer_does_not_call(architecture: Architecture) -> None:
    """The weights of a convolution are read off it, and are those of one adapter for all rows."""
    tuned = mix(architecture, modules_to_save=["conv1d"])
    for name, parameter in tuned.model.named_parameters():
        if "modules_to_save" in name:
            parameter.mul_(2)
    ids = tuned.ids(2, 6)
    expected = tuned.model(ids).logits
    for call in (tuned.model, partial(tuned.model.generate, max_new_tokens=2)):
        for names in (["default", "__base__"], ["__base__"] * 2, ["second", "default"]):
            message = r"layers\.0\.\w+\.conv1d' without calling it, those of adapter 'default' for all rows"
            with pytest.raises(ValueError, match=message):
                call(ids, adapter_names=names)
            assert unrouted(tuned.model)
    assert torch.equal(tuned.model(ids).logits, expected)
    torch.testing.assert_close(tuned.model(ids, adapter_names=["default"] * 2).logits, expected, atol=3e-6, rtol=0)
    tuned.model.set_adapter("second")
    second = tuned.model(ids).logits
    torch.testing.assert_close(
        tuned.model(ids, adapter_names=["second", "__base__"]).logits,
        torch.stack([second[0], tuned.base(ids).logits[1]]),
        atol=3e-6,
        rtol=0,
    )


def test_nothing_stays_when_generate_fails_midway(architecture: Architecture) -> None:
    tuned = with_lm_head(architecture)
    ids = tuned.ids(3, 5)
    expected = tuned.model(ids).logits

    def fail(step: int) -> None:
        assert not unrouted(tuned.model)
        if step == 3:
            raise RuntimeError("stopped by the user")

    processors = LogitsProcessorList([Calls(fail)])
    names = {"adapter_names": ["other", "__base__", "second"]}
    with pytest.raises(RuntimeError, match="stopped by the user"):
        tuned.model.generate(ids, logits_processor=processors, max_new_tokens=6, **names)
    assert unrouted(tuned.model)
    assert torch.equal(tuned.model(ids).logits, expected)


def test_calls_within_a_call(architecture: Architecture) -> None:
    """Each has its own rows; one without `adapter_names` has the active adapter."""
    tuned = with_lm_head(architecture)
    ids, inner_ids, seen = tuned.ids(3, 5), tuned.ids(2, 4, seed=1), []
    names, inner = ["other", "__base__", "second"], ["__base__", "other"]
    arguments = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "adapter_names": names}
    expected = tuned.model.generate(ids, **arguments)
    plain, routed = tuned.model(inner_ids).logits, tuned.model(inner_ids, adapter_names=inner).logits
    prefill = tuned.model(ids, adapter_names=names).logits

    def call(step: int) -> None:
        assert torch.equal(tuned.model(inner_ids).logits, plain)
        assert torch.equal(tuned.model(inner_ids, adapter_names=inner).logits, routed)
        with pytest.raises(ValueError, match="2 entries, but the batch has 3 rows"):
            tuned.model(ids, adapter_names=inner)
        # The outer call goes on where it was.
        seen.append(torch.equal(tuned.model.get_base_model()(ids).logits, prefill))

    actual = tuned.model.generate(ids, logits_processor=LogitsProcessorList([Calls(call)]), **arguments)
    assert torch.equal(actual, expected)
    assert seen == [True] * 4
    assert unrouted(tuned.model)


def test_within_disable_adapter(mixed: Tuned) -> None:
    ids = mixed.ids(7, 5)
    with mixed.model.disable_adapter():
        assert torch.equal(mixed.model(ids, adapter_names=NAMES).logits, mixed.base(ids).logits)


@pytest.mark.parametrize("names", [["default", "second"], ["__base__", "second"], ["second", "default"]])
def test_packed_rows(mixed: Tuned, names: list[str]) -> None:
    """All documents of a row have the row's adapter, whatever their number."""
    lengths = (6, 8, 3, 11)
    rows = [mixed.ids(1, length, seed=length)[0] for length in lengths]
    # One row of three documents, and one of a single document.
    ids = torch.stack([torch.cat(rows[:3]), mixed.ids(1, 17, seed=5)[0]])
    positions = torch.stack([packed_arguments([6, 8, 3])["position_ids"][0], torch.arange(17)])
    documents = [*((row, names[0]) for row in rows[:3]), (ids[1], names[1])]
    logits = mixed.model(ids, position_ids=positions, use_cache=False, adapter_names=names).logits.flatten(0, 1)
    for (row, name), actual in zip(documents, logits.split([6, 8, 3, 17]), strict=True):
        expected = alone(mixed, lambda model, row=row: model(row[None], use_cache=False).logits, [name])
        torch.testing.assert_close(actual[None], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("names", [["default", "second"], ["__base__", "second"], ["second", "default"]])
def test_packed_rows_in_the_parts_of_a_mixer(architecture: Architecture, names: list[str]) -> None:
    mixed = mix(architecture, modules_to_save=["out_proj"])
    for name, parameter in mixed.model.named_parameters():
        if "modules_to_save" in name:
            parameter.mul_(2)
    test_packed_rows(mixed, names)


def test_packed_rows_of_the_same_token(mixed: Tuned) -> None:
    """Documents that are alike are run once, but not for rows that start from different states."""
    ids = mixed.ids(1, 1).expand(3, 4)
    names = ["default", "second", "__base__"]
    logits = mixed.model(ids, position_ids=torch.zeros_like(ids), use_cache=False, adapter_names=names).logits
    for actual, name in zip(logits, names, strict=True):
        expected = alone(mixed, lambda model: model(ids[:1, :1], use_cache=False).logits, [name])
        torch.testing.assert_close(actual, expected[0].expand_as(actual), atol=1e-5, rtol=0)


class Operations(TorchDispatchMode):
    """Writes down every operation of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_one_alpha_is_multiplied_once(mixed: Tuned) -> None:
    """However many adapters there are: as many small products let a GPU wait. To the last bit, each row's state."""
    names = ["second", "__base__"]
    for index in range(4):
        name = f"alike-{index}"
        mixed.model.add_adapter(name, S0Config(alpha=0.6, init_weights=1.0, rank=2 if index else None))
        names.append(name)
    layer = next(iter(mixed.model.base_model.tuner_layers()))
    with mixed.model.base_model._enable_peft_forward_hooks(adapter_names=names), Operations() as operations:
        states = layer.start_states(len(names), torch.device("cpu"))
    assert sum(name.startswith("aten.mul") for name in operations.names) == 1
    expected = [layer.effective_state(name) if name in layer.configs else states[1] * 0 for name in names]
    assert torch.equal(states, torch.stack(expected))


def test_decoding_does_nothing(mixed: Tuned, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the prompt, each step is operation by operation the base model's; states are looked at once a layer."""
    ids, mask, _ = left_pad([mixed.ids(1, n, seed=n)[0] for n in (8, 7, 1, 4, 3, 9, 2)])
    looked, original = [], S0Layer.start_states
    monkeypatch.setattr(S0Layer, "start_states", lambda self, *args: looked.append(self) or original(self, *args))
    steps = {}
    for model, arguments in ((mixed.base, {}), (mixed.model, {}), (mixed.model, {"adapter_names": NAMES})):
        ends: list[int] = []
        with Operations() as operations:
            processor = Calls(lambda step, ends=ends, operations=operations: ends.append(len(operations.names)))
            model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=4,
                min_new_tokens=4,
                do_sample=False,
                logits_processor=LogitsProcessorList([processor]),
                **arguments,
            )
        steps[type(model), bool(arguments)] = operations.names[ends[0] : ends[-1]]
    assert len(steps) == 3
    assert len(next(iter(steps.values()))) > 500
    assert all(names == next(iter(steps.values())) for names in steps.values())
    assert len(looked) == 2 * mixed.architecture.states


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_adapters_injected_one_by_one_share_the_routing(architecture: Architecture) -> None:
    """Also on layers that a later tuner added."""
    tuned = tune(architecture)
    model = get_peft_model(architecture.build(), S0Config(layers_to_transform=[1], init_weights=1.0, alpha=0.7)).eval()
    inject_adapter_in_model(S0Config(init_weights=1.0, alpha=0.7), model.base_model.model, "later")
    model.base_model.peft_config["later"] = model.base_model.model.peft_config["later"]
    model.eval()
    ids = tuned.ids(2, 6)
    model.base_model.set_adapter("later")
    expected = model(ids).logits
    model.base_model.set_adapter("default")
    actual = model(ids, adapter_names=["__base__", "later"]).logits
    assert torch.equal(actual[0], tuned.base(ids).logits[0])
    torch.testing.assert_close(actual[1], expected[1], atol=2e-6, rtol=0)


def test_a_copy_routes_its_own_rows(mixed: Tuned) -> None:
    copied, ids = copy.deepcopy(mixed.model), mixed.ids(7, 5)
    expected = mixed.model(ids, adapter_names=NAMES).logits
    with mixed.model.base_model._enable_peft_forward_hooks(adapter_names=["default"] * 7):
        assert torch.equal(copied(ids, adapter_names=NAMES).logits, expected)
        assert unrouted(copied)
