"""State offsets: what is read from a learnt tensor beside the state, at every step, however the tokens arrive.

The laws are those of the initial state, on every architecture whose mixers take offsets: with an offset alone, and with
a state and an offset. So is what else holds of adapters; it is tested with both.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import test_compile
import test_gradients
import test_law
import test_rows
import test_storage
import torch
from architectures import ARCHITECTURES, MAIN, Architecture, mixers
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from reference import GatedDeltaRule, Mamba2, with_slow_mixers
from safetensors.torch import load_file
from test_compile import _fresh_compiler, compiled, graphs  # noqa: F401 - a fixture
from test_errors import change_states, untouched
from test_gradients import gradients, loss_of
from test_law import in_chunks, left_pad, packed_arguments
from test_training import LAMBDA, difference, penalised, step_of
from trainers import weights
from transformers import DynamicCache, TrainerControl, TrainerState, TrainingArguments
from tuned import Tuned, offsets_of, states_of, tune

from peft_s0 import S0Callback, S0Config, StateBank

TAKING = [row for row in ARCHITECTURES if issubclass(row.slow_mixer, (GatedDeltaRule, Mamba2))]
OTHERS = [row for row in ARCHITECTURES if row not in TAKING]

of_all = pytest.mark.parametrize("architecture", TAKING, ids=lambda architecture: architecture.name)
of_both = pytest.mark.parametrize("variant", ["offset", "both"])


@pytest.fixture
def tuned(architecture: Architecture) -> Tuned:
    return tune(architecture, variant="both")


def hold(module: ModuleType, tuned: Tuned, laws: dict[str, dict[str, Any]]) -> None:
    """Run laws of another module, less what the base model cannot do. What follows a space tells two calls apart."""
    for name, arguments in laws.items():
        law = name.partition(" ")[0]
        if law not in dict(tuned.architecture.lacks):
            getattr(module, f"test_{law}")(tuned, **arguments)


@of_all
@torch.no_grad()
def test_laws_of_state_and_offset(architecture: Architecture) -> None:
    laws: dict[str, dict[str, Any]] = {
        "token_by_token_from_the_first_token": {},
        "one_token_without_cache": {},
        "padded_rows": {"side": "right", "use_cache": False},
        "pads_that_cross_a_chunk": {"split": 9},
        "static_cache_and_reset": {},
        "packed_rows": {},
    }
    hold(test_law, tune(architecture, variant="both"), laws)


@of_all
@torch.no_grad()
def test_laws_of_an_offset_alone(architecture: Architecture) -> None:
    laws: dict[str, dict[str, Any]] = {
        "full_forward": {},
        "padded_rows": {"side": "left", "use_cache": True},
        "decoding_after_a_padded_prompt": {},
        "single_token_start_on_a_static_cache": {},
        "several_packed_rows": {},
        "packed_row_filled_up_with_pads": {"pads": 2},
    }
    hold(test_law, tune(architecture, variant="offset"), laws)


@of_both
@torch.no_grad()
def test_more_laws(architecture: Architecture, variant: str) -> None:
    laws: dict[str, dict[str, Any]] = {
        "one_token_without_cache": {},
        "pads_that_cross_a_chunk": {"split": 6},
        "packed_rows": {},
        "a_packed_row_leaves_the_cache_of_its_last_document": {},
        "generate beams": {"generation": {"num_beams": 4, "num_return_sequences": 2}},
        "greedy_generation_of_a_padded_batch_equals_each_row_alone": {},
        "continued_conversation": {},
        "use_never_changes_a_state": {},
        "disabled_adapter_is_the_base_model_bit_for_bit": {"tokens": 9},
        "disabled_adapter_is_the_base_model_bit_for_bit one": {"tokens": 1},
        "bf16_base_with_float32_states": {},
    }
    hold(test_law, tune(architecture, variant=variant), laws)


@of_all
def test_gradients_are_those_of_the_naive_twin(architecture: Architecture) -> None:
    laws: dict[str, dict[str, Any]] = {"packed_rows": {}, "one_token_rows": {"training": True}}
    hold(test_gradients, tune(architecture, variant="both"), laws)
    hold(test_gradients, tune(architecture, variant="offset"), {"equal_the_naive_twin": {}})


@of_both
@pytest.mark.parametrize("init_weights", [True, 1.0])
def test_gradients_of_left_padded_rows(architecture: Architecture, variant: str, init_weights: bool | float) -> None:
    tuned = tune(architecture, variant=variant, init_weights=init_weights)
    tuned.model.train()
    rows = [tuned.ids(1, length, seed=length)[0] for length in (17, 9, 4)]
    ids, mask, positions = left_pad(rows)
    labels = torch.where(mask.cumsum(1) > 1, ids, -100)
    loss = loss_of(tuned.model, ids, labels, attention_mask=mask, position_ids=positions)
    test_gradients.assert_equal(gradients(tuned, loss), test_gradients.reference_gradients(tuned, rows))


def test_finite_differences(tuned: Tuned) -> None:
    test_gradients.test_finite_differences(tuned)


@of_both
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(architecture: Architecture, variant: str, use_reentrant: bool) -> None:
    tuned = tune(architecture, variant=variant)
    tuned.model.train()
    ids, mask, positions = left_pad([tuned.ids(1, 15)[0], tuned.ids(1, 7, seed=1)[0]])
    padded = {"attention_mask": mask, "position_ids": positions}
    calls = [(ids, padded), (tuned.ids(1, 15), packed_arguments([9, 6]))]
    expected = [gradients(tuned, loss_of(tuned.model, ids, use_cache=False, **call)) for ids, call in calls]
    tuned.model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    tuned.model.enable_input_require_grads()
    for (ids, call), found in zip(calls, expected, strict=True):
        actual = gradients(tuned, loss_of(tuned.model, ids, use_cache=False, **call))
        assert all(torch.equal(actual[name], found[name]) for name in found)


@pytest.mark.parametrize("config", [{"normalize": True, "alpha": 9.0}, {"rank": 2}, {"rank": 2, "normalize": True}])
def test_every_form_of_offset(architecture: Architecture, config: dict[str, Any]) -> None:
    config = {"variant": "both", "alpha": 0.5, **config}
    with torch.no_grad():
        tuned = tune(architecture, **config)
        hold(test_law, tuned, {"full_forward": {}, "token_by_token_from_the_first_token": {}})
        for name, offset in offsets_of(tuned.model).items():
            if config.get("normalize"):
                torch.testing.assert_close(offset.norm(), torch.tensor(config["alpha"]), atol=1e-5, rtol=1e-5)
            if config.get("rank"):
                assert int(torch.linalg.matrix_rank(offset).max()) == 2, name
    for start in (True, 1.0):
        test_gradients.test_every_form_of_state_has_a_finite_gradient(architecture, {**config, "init_weights": start})


@torch.no_grad()
def test_train_alpha(architecture: Architecture) -> None:
    tuned = tune(architecture, variant="offset", train_alpha=0.2)
    layer = next(iter(tuned.model.base_model.tuner_layers()))
    weight = layer.s0_offset["default"].weight
    for training, factor in ((False, 0.7), (True, 0.2)):
        tuned.model.train(training)
        assert torch.equal(layer.effective_offset("default"), factor * weight)


@torch.no_grad()
def test_a_norm_in_front_of_the_gate_of_falcon_h1() -> None:
    """Which this model may have or not; the table has the model without."""
    row = next(row for row in MAIN if row.name == "falcon_h1")

    def config() -> Any:
        made = row.config()
        made.mamba_rms_norm = True
        return made

    for variant in ("offset", "both"):
        tuned = tune(replace(row, config=config, gain=1.0), variant=variant)
        assert all(mixer.mamba_rms_norm for mixer in mixers(tuned.model))
        hold(test_law, tuned, {"full_forward": {}, "token_by_token_from_the_first_token": {}, "packed_rows": {}})


@torch.no_grad()
@pytest.mark.parametrize("first", [1, 2, 5])
def test_a_cache_that_can_be_rolled_back(tuned: Tuned, first: int) -> None:
    """It keeps all of the convolution's past, be that more than a step looks back on or less."""
    ids, cache = tuned.ids(2, 12), DynamicCache(config=tuned.model.config)
    for layer in cache.layers:
        if hasattr(layer, "activate_past_recording"):
            layer.activate_past_recording()
    logits = in_chunks(tuned, ids, [first, first + 1, 7, 9, 10, 11, 12], cache=cache)
    tuned.assert_equal(logits, tuned.expected(ids), tuned.effect(ids))
    assert cache.get_conv_state(mixers(tuned.model)[0].layer_idx).shape[-1] == 12


@of_all
@torch.no_grad()
def test_zero_is_the_base_model_bit_for_bit(architecture: Architecture) -> None:
    for variant, training in (("offset", True), ("both", False)):
        tuned = tune(architecture, variant=variant, init_weights=True)
        ids, mask, positions = left_pad([tuned.ids(1, 9)[0], tuned.ids(1, 5)[0]])
        for model in (tuned.base, tuned.model):
            model.train(training)
        for first in (9, 1):
            call = {"attention_mask": mask[:, :first], "position_ids": positions[:, :first]}
            assert torch.equal(tuned.model(ids[:, :first], **call).logits, tuned.base(ids[:, :first], **call).logits)
        caches = [architecture.make_cache(tuned.model.config, 2) for _ in range(2)]
        for start, end in ((0, 5), (5, 6), (6, 7)):
            actual, expected = (
                model(ids[:, start:end], use_cache=True, **{architecture.cache: cache}).logits
                for model, cache in zip((tuned.model, tuned.base), caches, strict=True)
            )
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("architecture", OTHERS, ids=lambda architecture: architecture.name)
def test_other_recurrences_are_refused(architecture: Architecture) -> None:
    model = architecture.build()
    for variant in ("offset", "both"):
        name = type(mixers(model)[0]).__name__
        message = rf"variant='{variant}' needs a mixer .* which '.*' \({name}, .*\) is not.*Use variant='initial'"
        with pytest.raises(ValueError, match=message):
            get_peft_model(model, S0Config(variant=variant))
        assert untouched(model)


def test_names(tuned: Tuned) -> None:
    names = [name for name, p in tuned.model.named_parameters() if p.requires_grad]
    for kind in ("s0_state", "s0_offset"):
        assert sum(name.endswith(f".s0.{kind}.default.weight") for name in names) == tuned.architecture.states
    assert len(names) == 2 * tuned.architecture.states
    alone = tune(tuned.architecture, variant="offset").model
    assert [name for name, p in alone.named_parameters() if p.requires_grad] == [n for n in names if "s0_offset" in n]


@torch.no_grad()
def mixed(architecture: Architecture) -> Tuned:
    """A model with adapters of each variant, for the rows of `test_rows`."""
    tuned = tune(architecture, variant="both", task_type="CAUSAL_LM")
    torch.manual_seed(1)
    tuned.model.add_adapter("second", S0Config(alpha=0.6, init_weights=1.0, variant="offset", task_type="CAUSAL_LM"))
    few = {"alpha": 5.0, "init_weights": 1.0, "layers_to_transform": [1], "normalize": True}
    tuned.model.add_adapter("few", S0Config(**few, task_type="CAUSAL_LM"))
    tuned.model.eval()
    return tuned


@torch.no_grad()
def test_rows_of_different_variants(architecture: Architecture) -> None:
    tuned = mixed(architecture)
    for tokens in (1, 2, 9):
        test_rows.test_forward(tuned, tokens, use_cache=tokens != 2)
    test_rows.test_generate(tuned, {"num_beams": 3})
    test_rows.test_packed_rows(tuned, ["default", "second"])
    test_rows.test_packed_rows(tuned, ["__base__", "second"])
    # In every step, base rows are the base model's.
    names = ["default", "__base__", "second", "__base__", "few"]
    ids, caches = tuned.ids(5, 6), [DynamicCache(config=tuned.model.config) for _ in range(2)]
    for start, end in ((0, 1), (1, 2), (2, 5), (5, 6)):
        calls = [{"use_cache": True, architecture.cache: cache} for cache in caches]
        actual = tuned.model(ids[:, start:end], adapter_names=names, **calls[0]).logits
        expected = tuned.base(ids[:, start:end], **calls[1]).logits
        assert torch.equal(actual[[1, 3]], expected[[1, 3]])
        for row in (0, 2, 4):
            assert not torch.equal(actual[row], expected[row])


@torch.no_grad()
def test_several_adapters(architecture: Architecture) -> None:
    """Offsets of active adapters add up, as their weighted sum says; a deleted one is gone."""
    tuned = tune(architecture, variant="both")
    torch.manual_seed(1)
    tuned.model.add_adapter("second", S0Config(alpha=0.4, init_weights=1.0, variant="offset", rank=2))
    ids, tuner = tuned.ids(2, 9), tuned.model.base_model
    tuner.set_adapter(["default", "second"])
    together = in_chunks(tuned, ids, [5, 6, 9])
    offsets = {"default": offsets_of(tuned.model)}
    tuner.set_adapter("second")
    offsets["second"] = offsets_of(tuned.model)
    tuner.add_weighted_adapter(["default", "second"], [1.0, -2.0], "mixture")
    tuner.add_weighted_adapter(["second", "second"], [1.0, 1.0], "twice")
    tuner.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum")
    variants = {name: config.variant for name, config in tuned.model.peft_config.items()}
    assert variants == {"default": "both", "second": "offset", "mixture": "both", "twice": "offset", "sum": "both"}
    tuner.set_adapter("mixture")
    for name, offset in offsets_of(tuned.model).items():
        torch.testing.assert_close(offset, offsets["default"][name] - 2 * offsets["second"][name])
    tuner.set_adapter("sum")
    torch.testing.assert_close(in_chunks(tuned, ids, [5, 6, 9]), together, atol=1e-5, rtol=0)
    slow = with_slow_mixers(tuned.base, architecture.slow_mixer, states_of(tuned.model), offsets_of(tuned.model))
    tuned.assert_equal(together, slow(ids, use_cache=False).logits.float(), tuned.effect(ids), 2e-5)
    tuner.set_adapter("default")
    tuned.model.delete_adapter("second")
    assert not any(".second." in name for name in tuned.model.state_dict())
    tuned.assert_equal(tuned.model(ids).logits, tuned.expected(ids), tuned.effect(ids))
    tuned.model.unload()
    assert untouched(tuned.base.__class__(tuned.base.config))
    assert untouched(tuned.model.get_base_model())


@of_both
@torch.no_grad()
def test_saved_and_loaded(architecture: Architecture, variant: str, tmp_path: Path) -> None:
    tuned = tune(architecture, variant=variant)
    tuned.model.save_pretrained(tmp_path / "adapter")
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    kinds = {"s0_offset", "s0_state"} if variant == "both" else {"s0_offset"}
    assert {name.split(".")[-2] for name in names} == kinds
    assert len(names) == len(kinds) * architecture.states
    test_storage.test_round_trip_is_bitwise(tuned, tmp_path / "adapter")
    test_storage.test_config_round_trip(tuned, tmp_path / "adapter")
    test_storage.test_trainable_and_low_memory_loading(tuned, tmp_path / "adapter")


def saved(architecture: Architecture, folder: Path, variant: str, **config: Any) -> Path:
    tune(architecture, seed=2, variant=variant, **config).model.save_pretrained(folder)
    return folder


@torch.no_grad()
def test_hotswap(architecture: Architecture, tmp_path: Path) -> None:
    tuned, ids = tune(architecture, variant="both"), tune(architecture).ids(2, 9)
    other = saved(architecture, tmp_path / "other", "both")
    expected = PeftModel.from_pretrained(architecture.build(), other)(ids).logits
    before = tuned.model(ids).logits
    with pytest.raises(ValueError, match=r"has variant='both', but that of '.*' has 'offset'"):
        tuned.model.hotswap_adapter(saved(architecture, tmp_path / "offset", "offset"), adapter_name="default")
    assert torch.equal(tuned.model(ids).logits, before)
    tuned.model.hotswap_adapter(other, adapter_name="default")
    assert torch.equal(tuned.model(ids).logits, expected)
    assert not torch.equal(expected, before)


@pytest.mark.parametrize(("file", "adapter"), [("both", "offset"), ("initial", "offset"), ("offset", "both")])
def test_states_of_another_variant(architecture: Architecture, file: str, adapter: str) -> None:
    states = get_peft_model_state_dict(tune(architecture, variant=file).model)
    model = tune(architecture, variant=adapter).model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(
        ValueError, match=f"they are of variant='{file}', but adapter 'default' has variant='{adapter}'"
    ):
        set_peft_model_state_dict(model, states)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_bad_files(architecture: Architecture, tmp_path: Path) -> None:
    folder = saved(architecture, tmp_path / "adapter", "both")

    def spoil(states: dict[str, torch.Tensor]) -> None:
        next(value for name, value in states.items() if "s0_offset" in name)[0] = float("nan")

    change_states(folder, spoil)
    with pytest.raises(ValueError, match=r"The state '.*s0_offset.*' has \d+ of \d+ values that are NaN"):
        PeftModel.from_pretrained(architecture.build(), folder)
    change_states(folder, lambda states: states.pop(next(name for name in states if "s0_offset" in name)))
    model = architecture.build()
    with pytest.raises(ValueError, match=r"missing in the file: .*s0_offset"):
        PeftModel.from_pretrained(model, folder)
    assert untouched(model)


@of_both
def test_never_loaded(architecture: Architecture, variant: str) -> None:
    config = S0Config(variant=variant, inference_mode=True, alpha=0.7)
    model = get_peft_model(architecture.build(), config).eval()
    ids = torch.arange(3, 9)[None]
    with pytest.raises(RuntimeError, match="was never loaded"):
        model(ids)
    # An offset is awaited as a state is.
    with torch.no_grad():
        for layer in model.base_model.tuner_layers():
            for module in layer.s0_state.values():
                module.weight.zero_()
    with pytest.raises(RuntimeError, match="was never loaded"):
        model(ids)
    tuned = tune(architecture, variant=variant)
    set_peft_model_state_dict(model, get_peft_model_state_dict(tuned.model))
    assert torch.equal(model(ids).logits, tuned.model(ids).logits)


def test_penalty_and_callback(architecture: Architecture, tmp_path: Path) -> None:
    pair = penalised(architecture, variant="both")
    for tuned in pair:
        step_of(tuned, pair[0].ids(2, 9))
    own = weights(pair[0].model)
    assert len(own) == 2 * architecture.states
    for weight, found in zip(own, difference(*pair), strict=True):
        torch.testing.assert_close(found, 2 * LAMBDA * weight.detach(), atol=1e-5, rtol=1e-4)
    callback, logs = S0Callback(), {"loss": 1.0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        callback.on_train_begin(
            TrainingArguments(str(tmp_path), report_to=[]), TrainerState(), TrainerControl(), model=pair[0].model
        )
    callback.on_log(None, TrainerState(), None, logs=logs)
    norms = {
        kind: torch.stack([p.norm() for n, p in pair[0].model.named_parameters() if f".{kind}." in n]).detach()
        for kind in ("s0_state", "s0_offset")
    }
    total = sum(float(values.square().sum()) for values in norms.values())
    assert logs == pytest.approx(
        {
            "loss": 1.0,
            "s0/norm_mean": float(norms["s0_state"].mean()),
            "s0/norm_max": float(norms["s0_state"].max()),
            "s0/offset_norm_mean": float(norms["s0_offset"].mean()),
            "s0/offset_norm_max": float(norms["s0_offset"].max()),
            "s0/alpha": 0.7,
            "s0/penalty": LAMBDA * total,
        },
        rel=1e-5,
    )


def test_a_bank_refuses_offsets(architecture: Architecture, tmp_path: Path) -> None:
    """And rows that it serves read none."""
    tuned = tune(architecture, variant="both")
    bank = StateBank(tuned.model, capacity=2)
    with pytest.raises(ValueError, match=r"has variant='offset'. A bank holds what sequences start from"):
        bank.add("task", saved(architecture, tmp_path / "offset", "offset"))
    bank.add("task", saved(architecture, tmp_path / "initial", "initial"))
    ids = tuned.ids(2, 7)
    with torch.no_grad():
        logits = bank(ids, tasks=["task", "__base__"]).logits
        alone = PeftModel.from_pretrained(architecture.build(), tmp_path / "initial")(ids).logits
        assert torch.equal(logits[1], tuned.base(ids).logits[1])
    torch.testing.assert_close(logits[0], alone[0], atol=2e-6, rtol=0)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`", "ignore:You are trying to modify a model")
@torch.no_grad()
def test_lora_on_the_parts_that_are_read(architecture: Architecture) -> None:
    """On the projection that q comes from, and on what takes the reading where there is no norm."""
    tuned = tune(architecture, variant="both")
    projection = mixers(tuned.model)[0].s0.declaration.readout.projection
    torch.manual_seed(3)
    lora = get_peft_model(
        tuned.model.get_base_model(),
        LoraConfig(target_modules=[projection], init_lora_weights=False, lora_alpha=32),
        adapter_name="matrices",
    ).eval()
    ids = tuned.ids(2, 9)
    before = tune(architecture, variant="both").model(ids).logits
    logits = tuned.model(ids).logits
    assert float((logits - before).abs().max()) > 0.1
    steps = in_chunks(tuned, ids, list(range(1, 10)))
    torch.testing.assert_close(steps, logits, atol=2e-5, rtol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = lora.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, logits, atol=2e-5, rtol=0)


def test_card(architecture: Architecture, tmp_path: Path) -> None:
    for variant, words in (("offset", "Learnt state offsets"), ("both", "Learnt initial states and state offsets")):
        saved(architecture, tmp_path / variant, variant)
        text = (tmp_path / variant / "README.md").read_text()
        assert words in text
        layers = str(architecture.states)
        assert [line.split(" | ")[2:4] for line in text.splitlines() if line.startswith("| default")] == [
            [variant, layers]
        ]
    assert "variant" not in (saved(architecture, tmp_path / "initial", "initial") / "README.md").read_text()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@of_both
def test_compiled(architecture: Architecture, variant: str) -> None:
    """One graph for a prefill and one for all steps, fullgraph; and the same gradients."""
    architecture = architecture.shallow(1)
    if variant == "offset":
        test_compile.test_prefill_and_decode(tune(architecture, variant=variant))
        return
    found = []
    for use in (compiled, lambda model: model):
        tuned = tune(architecture, variant=variant)
        ids, mask, positions = left_pad([tuned.ids(1, 7)[0], tuned.ids(1, 4)[0]])
        call = {"attention_mask": mask, "position_ids": positions, "use_cache": False}
        use(tuned.model.train())(ids, labels=ids, **call).loss.backward()
        found.append([p.grad for p in weights(tuned.model)])
    assert len(found[0]) == 2 * architecture.states
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-5)
    assert graphs() == 1
