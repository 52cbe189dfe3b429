"""States that take less room: how files store them, low rank made by SVD, and subsets of layers."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from architectures import MAIN, Architecture
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from test_bank import put_on_hub
from test_card import card_of, rows_of
from test_classes import IDS, LOADERS, ROWS, Family, assert_exact, transformers_api
from test_errors import change_states, untouched
from torch import Tensor, nn
from trainers import logged, sft, states, weights
from transformers import AutoModelForCausalLM
from tuned import Tuned, states_of, tune

from peft_s0 import S0Config, S0Layer, StateBank, compress_adapter, recurrent_layers
from peft_s0.storage import BLOCK, decode, encode
from peft_s0.training import penalty_gradient
from peft_s0_cli.reports import read

STATE = "base_model.model.model.layers.0.mixer.s0.s0_state."
COMPACT = ["bfloat16", "int8"]
# Of the effect of the states on the logits: tiny heads of 8 to 16 average little out.
LOGITS_TOLERANCE = 0.02


@pytest.fixture(autouse=True, scope="module")
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def states_file(folder: Path) -> Path:
    return folder / "adapter_model.safetensors"


def of_all_sizes(*shape: int, seed: int = 0) -> Tensor:
    """Random numbers of all sizes that float32 has, with zeros and subnormal ones among them."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-140, 120, (shape[0], *[1] * (len(shape) - 1)), generator=generator)
    numbers = torch.randn(shape, generator=generator, dtype=torch.float64) * torch.pow(2.0, exponents.double())
    numbers[0] = 0
    return numbers.float()


# How numbers are stored.


def test_bfloat16_is_rounded_to_nearest_ties_to_even() -> None:
    state = of_all_sizes(40, 7, 5)
    # Halfway between two neighbours, where the even one counts: last bits 01|1000 and 00|1000.
    state[1, 0, :2] = torch.tensor([1 + 3 / 256, 1 + 1 / 256])
    stored = encode({f"{STATE}weight": state}, "bfloat16")[f"{STATE}weight"]
    assert stored.dtype == torch.bfloat16
    assert stored[1, 0, :2].tolist() == [1 + 4 / 256, 1.0]
    for number, kept in zip(state.flatten().tolist(), stored.float().flatten().tolist(), strict=True):
        if number == 0:
            assert kept == 0
            continue
        # Eight significant bits, fewer below the least normal number; Python rounds halves to even, too.
        unit = 2.0 ** (max(math.frexp(number)[1], -125) - 8)
        assert kept == round(number / unit) * unit


@pytest.mark.parametrize("shape", [(40, 32, 16), (9, 5, 7), (3, 5), (2, 24, 1)], ids=str)
def test_int8_is_at_most_half_a_step_off(shape: tuple[int, ...]) -> None:
    """Against a loop over blocks in double precision, in which all of these numbers are exact."""
    state = of_all_sizes(*shape)
    stored = encode({f"{STATE}weight": state}, "int8")
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in stored.items()} == {
        f"{STATE}int8": (torch.int8, shape),
        f"{STATE}scale": (torch.float32, (math.ceil(state.numel() / BLOCK),)),
    }
    numbers, integers = state.flatten().tolist(), stored[f"{STATE}int8"].flatten().tolist()
    read = decode(stored)[f"{STATE}weight"]
    assert read.shape == state.shape
    assert read.dtype == torch.float32
    for block, scale in enumerate(stored[f"{STATE}scale"].tolist()):
        place = slice(block * BLOCK, (block + 1) * BLOCK)
        greatest = max(abs(number) for number in numbers[place])
        assert scale == 2.0**-126 or greatest / 127 * (1 - 2.0**-15) <= scale <= greatest / 127 * (1 + 2.0**-23)
        for number, integer, back in zip(numbers[place], integers[place], read.flatten()[place].tolist(), strict=True):
            assert back == integer * scale
            assert abs(integer) <= 127
            assert abs(number - back) <= scale / 2


@pytest.mark.parametrize("storage", COMPACT)
def test_what_was_read_is_stored_again_as_it_was(storage: str) -> None:
    stored = encode({f"{STATE}weight": of_all_sizes(60, 16, 12)}, storage)
    again = encode(decode(stored), storage)
    assert stored.keys() == again.keys()
    assert all(torch.equal(stored[name], again[name]) for name in stored)


@pytest.mark.parametrize("storage", ["float32", *COMPACT])
def test_only_states_are_stored_in_another_way(storage: str) -> None:
    others = {"base_model.model.lm_head.weight": torch.randn(3, 5), "base_model.model.score.bias": torch.ones(2).half()}
    state = {f"{STATE}weight": torch.randn(2, 4, 4), f"{STATE.replace('state', 'offset')}weight": torch.randn(2, 4, 4)}
    stored = encode({**state, **others}, storage)
    assert all(stored[name] is others[name] for name in others)
    assert {stored[name].dtype for name in stored.keys() - others.keys()} == {
        "float32": {torch.float32},
        "bfloat16": {torch.bfloat16},
        "int8": {torch.int8, torch.float32},
    }[storage]
    assert decode(stored).keys() == {*state, *others}


# What models save and load.


@pytest.mark.parametrize("storage", COMPACT)
@pytest.mark.parametrize("config", [{}, {"rank": 2, "normalize": True, "alpha": 9.0}], ids=["full", "rank"])
def test_a_saved_adapter_is_compact_and_close(
    architecture: Architecture, tmp_path: Path, storage: str, config: dict
) -> None:
    tuned = tune(architecture, storage=storage, **config)
    exact = copy.deepcopy(get_peft_model_state_dict(tuned.model))
    tuned.model.save_pretrained(tmp_path)
    # What is in memory, and passed on in memory, is as it was.
    assert all(torch.equal(state, exact[name]) for name, state in get_peft_model_state_dict(tuned.model).items())
    stored = load_file(states_file(tmp_path))
    expected = encode(exact, storage)
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[name], expected[name]) for name in stored)
    numbers = sum(state.numel() for state in exact.values())
    assert (
        sum(tensor.nbytes for tensor in stored.values())
        == {
            "bfloat16": 2 * numbers,
            "int8": numbers + 4 * sum(math.ceil(state.numel() / BLOCK) for state in exact.values()),
        }[storage]
    )
    loaded = PeftModel.from_pretrained(architecture.build(), tmp_path)
    assert loaded.peft_config["default"].storage == storage
    assert all(p.dtype == torch.float32 for name, p in loaded.named_parameters() if "s0_state" in name)
    ids = tuned.ids(2, 9)
    if not config:
        tuned.assert_equal(loaded(ids).logits, tuned.model(ids).logits, tuned.effect(ids), LOGITS_TOLERANCE)
    assert not torch.equal(loaded(ids).logits, tuned.model(ids).logits)
    # A second generation is the first, to the last bit.
    loaded.save_pretrained(tmp_path / "again")
    assert states_file(tmp_path / "again").read_bytes() == states_file(tmp_path).read_bytes()
    (row,) = rows_of(card_of(tmp_path))
    assert (row["storage"], row["parameters"]) == (storage, f"{numbers:,}")


@pytest.mark.parametrize("storage", COMPACT)
@pytest.mark.parametrize("row", ["qwen3_5", "falcon_h1"])
def test_every_loader_reads_float32(row: str, storage: str, tmp_path: Path) -> None:
    """On every class of the model, the same states to the last bit; transformers' own refuses what it cannot read."""
    family = Family(ROWS[row])
    tuned = family.tuned("head", storage=storage)
    tuned.save_pretrained(tmp_path)
    set_peft_model_state_dict(tuned, load_file(states_file(tmp_path)))
    for load in LOADERS.values():
        if load is not transformers_api:
            assert_exact(load(family.build("head"), tmp_path), tuned)
    for name in {"vision", "backbone"} & set(family.classes):
        assert_exact(PeftModel.from_pretrained(family.build(name), tmp_path), tuned)
    base = family.build("head")
    trained = PeftModel.from_pretrained(family.build("head"), tmp_path, is_trainable=True)
    # As trainers make a reference: the same config, values that no counter of changes has seen.
    trained.add_adapter("ref", copy.deepcopy(trained.peft_config["default"]))
    for layer in trained.base_model.tuner_layers():
        layer.state("ref").weight.data.copy_(layer.state("default").weight.data)
    trained.set_adapter("ref")
    assert torch.equal(trained.eval()(IDS).logits, tuned(IDS).logits)
    if storage == "int8":
        with pytest.raises(RuntimeError, match=r"was never loaded.*stored in int8.*PeftModel.from_pretrained does"):
            base.load_adapter(tmp_path)
        base.delete_adapter("default")
        assert_exact(PeftModel.from_pretrained(base, tmp_path), tuned)
        for_training = family.build("head")
        for_training.load_adapter(tmp_path, is_trainable=True)
        with pytest.raises(RuntimeError, match=r"was never loaded.*stored in int8"):
            for_training(IDS)
    else:
        base.load_adapter(tmp_path)
        assert_exact(base, tuned)


@pytest.mark.parametrize("storage", COMPACT)
def test_loaders_beside(tuned: Tuned, tmp_path: Path, storage: str) -> None:
    """Auto classes, the Hub, hot swap and the bank."""
    tuned.base.save_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(base, S0Config(init_weights=1.0, alpha=0.5, storage=storage)).save_pretrained(tmp_path / "adapter")
    ids = tuned.ids(2, 9)
    expected = PeftModel.from_pretrained(tuned.architecture.build(), tmp_path / "adapter")(ids).logits
    assert (expected - tuned.base(ids).logits).abs().max() > 0.3
    assert torch.equal(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")(ids).logits, expected)
    if storage == "int8":
        with pytest.raises(RuntimeError, match="was never loaded"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    else:
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")(ids).logits, expected)
    hub = put_on_hub(tmp_path / "adapter", tmp_path / "cache")
    from_hub = PeftModel.from_pretrained(tuned.architecture.build(), hub, cache_dir=tmp_path / "cache")
    assert torch.equal(from_hub(ids).logits, expected)
    for host in ("disk", "cpu"):
        bank = StateBank(tuned.model, capacity=1, host=host)
        bank.add("task", hub, cache_dir=tmp_path / "cache")
        assert torch.equal(bank(ids, tasks=["task"] * 2).logits, expected)
        held = bank._tasks["task"].states
        # In memory as in the file.
        assert held is None or {state.values.dtype for state in held.values()} == {getattr(torch, storage)}
        bank.close()
    tuned.model.hotswap_adapter(tmp_path / "adapter", "default")
    assert torch.equal(tuned.model(ids).logits, expected)
    assert tuned.model.peft_config["default"].storage == "float32"


@pytest.mark.parametrize("storage", COMPACT)
@pytest.mark.parametrize("rank", [None, 2])
def test_the_command_line_reads_it(tuned: Tuned, tmp_path: Path, storage: str, rank: int | None) -> None:
    tuned.base.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, S0Config(init_weights=1.0, alpha=1.0, storage=storage, rank=rank))
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tuned.architecture.build(), tmp_path / "adapter")
    saved, expected = read(str(tmp_path / "adapter"), None, False), states_of(loaded)
    assert saved.states.keys() == expected.keys()
    assert all(torch.equal(state, expected[name]) for name, state in saved.states.items())
    assert saved.parameters == model.get_nb_trainable_parameters()[0]


def test_the_file_counts_and_not_the_config_beside_it(tuned: Tuned, tmp_path: Path) -> None:
    """A process may be killed between the two; and a config saved over a file stores it anew."""
    tuned.model.save_pretrained(tmp_path)
    exact, expected = states_file(tmp_path).read_bytes(), tuned.model(IDS).logits
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "storage": "int8"}))
    assert torch.equal(PeftModel.from_pretrained(tuned.architecture.build(), tmp_path)(IDS).logits, expected)
    S0Config.from_pretrained(tmp_path).save_pretrained(tmp_path)
    stored = load_file(states_file(tmp_path))
    assert sum(tensor.dtype == torch.int8 for tensor in stored.values()) == tuned.architecture.states
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "storage": "float32"}))
    rounded = PeftModel.from_pretrained(tuned.architecture.build(), tmp_path)(IDS).logits
    S0Config.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in load_file(states_file(tmp_path)).values()} == {torch.float32}
    assert len(states_file(tmp_path).read_bytes()) == len(exact)
    assert torch.equal(PeftModel.from_pretrained(tuned.architecture.build(), tmp_path)(IDS).logits, rounded)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_config_with_int8_states_can_start_anew(architecture: Architecture, tmp_path: Path) -> None:
    tune(architecture, storage="int8").model.save_pretrained(tmp_path)
    config = S0Config.from_pretrained(tmp_path)
    config.inference_mode = False
    with pytest.raises(RuntimeError, match=r"dataclasses\.replace\(config, inference_mode=False\)"):
        get_peft_model(architecture.build(), config)(IDS)
    fresh = get_peft_model(architecture.build(), replace(config, init_weights=True))
    assert torch.equal(fresh(IDS).logits, architecture.build()(IDS).logits)


def test_transformers_saves_float32(architecture: Architecture, tmp_path: Path) -> None:
    """It saves the config first, over whatever is in the folder; saving the config again stores the states anew."""
    model = architecture.build()
    model.add_adapter(S0Config(init_weights=1.0, storage="int8"))
    states_file(tmp_path).write_bytes(b"not whole")
    model.save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in load_file(states_file(tmp_path)).values()} == {torch.float32}
    expected = encode(load_file(states_file(tmp_path)), "int8")
    S0Config.from_pretrained(tmp_path).save_pretrained(tmp_path)
    stored = load_file(states_file(tmp_path))
    assert all(torch.equal(stored[name], expected[name]) for name in {*stored, *expected})


def test_a_trainers_checkpoints_are_exact(tmp_path: Path) -> None:
    """A run that goes on from one ends as a run without a break; only what is saved at the end is compact."""
    arguments = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    config = {"alpha": 1.0, "init_weights": 0.5, "storage": "int8"}
    whole = sft(MAIN[0], tmp_path, S0Config(**config), **arguments)
    with torch.enable_grad():
        whole.train()
    resumed = sft(MAIN[0], tmp_path, S0Config(**config), **arguments)
    with torch.enable_grad():
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert len(logged(resumed)) == 4
    assert logged(resumed) == logged(whole)
    assert all(torch.equal(a, b) for a, b in zip(states(resumed), states(whole), strict=True))
    whole.model.save_pretrained(tmp_path / "checkpoint-4")
    stored = load_file(states_file(tmp_path / "checkpoint-4"))
    assert all(torch.equal(a, b) for a, b in zip(stored.values(), states(whole), strict=True))
    whole.model.add_adapter("other", S0Config(alpha=1.0, storage="int8"))
    whole.model.save_pretrained(tmp_path / "checkpoint-4", selected_adapters=["other"])
    below = load_file(states_file(tmp_path / "checkpoint-4" / "other"))
    assert {tensor.dtype for tensor in below.values()} == {torch.float32}
    whole.model.delete_adapter("other")
    whole.save_model(str(tmp_path / "end"))
    assert torch.int8 in {tensor.dtype for tensor in load_file(states_file(tmp_path / "end")).values()}
    # A training that starts from a compact adapter starts from what it rounded to.
    started = PeftModel.from_pretrained(MAIN[0].build(), tmp_path / "end", is_trainable=True)
    for a, b in zip(weights(started), states(whole), strict=True):
        assert 0 < (a - b).abs().max() <= b.abs().max() / 127 / 2


# Files that are broken.


def first(states: dict[str, Tensor], end: str) -> str:
    return min(name for name in states if name.endswith(end))


def _change(end: str, change: Callable[[Tensor], Tensor | None]) -> Callable[[dict[str, Tensor]], None]:
    def apply(states: dict[str, Tensor]) -> None:
        name = first(states, end)
        changed = change(states.pop(name))
        if changed is not None:
            states[name] = changed

    return apply


def _set(value: float) -> Callable[[Tensor], Tensor]:
    def apply(tensor: Tensor) -> Tensor:
        tensor[0] = value
        return tensor

    return apply


def _both(states: dict[str, Tensor]) -> None:
    name = first(states, "int8")
    states[name.replace("int8", "weight")] = states[name].float()


DAMAGED = [
    (_change("scale", lambda _: None), r"layers\.0.*s0_state\.weight' is stored.*'int8' and 'scale'.*of these 'int8'"),
    (_change("int8", lambda _: None), r"layers\.0.*s0_state\.weight' is stored.*'int8' and 'scale'.*of these 'scale'"),
    (_both, r"layers\.0.*expected 'int8' and 'scale', found of these 'weight, int8, scale'"),
    (_change("scale", _set(math.nan)), r"layers\.0.*has 1 of \d+ scales that are NaN.*Load another checkpoint"),
    (_change("scale", _set(math.inf)), r"layers\.0.*has 1 of \d+ scales that are NaN, infinite or not positive"),
    (_change("scale", _set(0.0)), r"layers\.0.*has 1 of \d+ scales that are NaN, infinite or not positive"),
    (_change("scale", _set(-1.0)), r"layers\.0.*has 1 of \d+ scales that are NaN, infinite or not positive"),
    (_change("scale", lambda scale: scale[1:]), r"layers\.0.*expected \[\d+\] scales for shape .*found \[\d+\]"),
    (_change("scale", lambda scale: scale.double()), r"scales in torch.float32, found torch.int8 and torch.float64"),
    (_change("int8", lambda value: value.short()), r"expected torch.int8 and scales .*found torch.int16"),
    (_change("int8", lambda value: value[:, :, None]), r"expected shape \[4, 16, (8|16)\], found \[4, 16, 1, (8|16)\]"),
]


@pytest.mark.parametrize(("change", "message"), DAMAGED)
def test_damaged_files(tuned: Tuned, tmp_path: Path, change: Callable, message: str) -> None:
    """One clear error from every loader, and nothing is left of the adapter."""
    tuned.model.peft_config["default"].storage = "int8"
    tuned.model.save_pretrained(tmp_path)
    change_states(tmp_path, change)
    base, expected = tuned.architecture.build(), tuned.model(IDS).logits
    for arguments in ({}, {"low_cpu_mem_usage": True}):
        with pytest.raises(ValueError, match=message):
            PeftModel.from_pretrained(base, tmp_path, **arguments)
        assert untouched(base)
    for load in (
        lambda: tuned.model.load_adapter(tmp_path, "second"),
        lambda: tuned.model.hotswap_adapter(tmp_path, "default"),
        lambda: set_peft_model_state_dict(tuned.model, load_file(states_file(tmp_path))),
        lambda: StateBank(tune(tuned.architecture).model, host="cpu").add("task", tmp_path),
    ):
        with pytest.raises(ValueError, match=message):
            load()
    assert list(tuned.model.peft_config) == ["default"]
    assert torch.equal(tuned.model(IDS).logits, expected)


def test_a_bank_on_disk_looks_at_scales_when_it_reads_them(tuned: Tuned, tmp_path: Path) -> None:
    tuned.model.peft_config["default"].storage = "int8"
    tuned.model.save_pretrained(tmp_path)
    change_states(tmp_path, _change("scale", _set(math.nan)))
    bank = StateBank(tuned.model)
    bank.add("task", tmp_path)
    with pytest.raises(ValueError, match=r"has 1 of \d+ scales that are NaN"):
        bank(IDS, tasks=["task"] * 2)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_training_that_diverged_saves_and_is_refused(tuned: Tuned, tmp_path: Path, value: float) -> None:
    tuned.model.peft_config["default"].storage = "int8"
    next(iter(tuned.model.base_model.tuner_layers())).s0_state["default"].weight[0, 0, 0] = value
    tuned.model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"layers\.0.*has 1 of \d+ scales that are NaN, infinite or not positive"):
        PeftModel.from_pretrained(tuned.architecture.build(), tmp_path)


def test_storage_that_there_is_not() -> None:
    with pytest.raises(ValueError, match="storage must be one of 'float32', 'bfloat16', 'int8', got 'float16'"):
        S0Config(storage="float16")


# Low rank without training.


def tail(state: Tensor, rank: int) -> float:
    """The least error that a rank allows, from the eigenvalues of S^T S in double precision (Eckart and Young)."""
    state = state.double()
    values = torch.linalg.eigvalsh(state.transpose(1, 2) @ state)
    return float((values[:, : values.shape[1] - rank].clamp_min(0).sum() / values.sum()).sqrt())


def test_compression_is_the_best_there_is(tuned: Tuned, tmp_path: Path) -> None:
    ids, expected = tuned.ids(2, 9), tuned.model(tuned.ids(2, 9)).logits
    whole = states_of(tuned.model)
    distances = []
    for rank in (1, 2, 4, 8):
        errors = compress_adapter(tuned.model, "default", rank, f"r{rank}")
        assert tuned.model.active_adapters == ["default"]
        assert torch.equal(tuned.model(ids).logits, expected)
        assert errors.keys() == whole.keys()
        tuned.model.set_adapter(f"r{rank}")
        config = tuned.model.peft_config[f"r{rank}"]
        assert (config.rank, config.alpha) == (rank, 0.7)
        for name, state in states_of(tuned.model).items():
            assert torch.linalg.matrix_rank(state).tolist() == [rank] * len(state)
            assert errors[name] == pytest.approx(tail(whole[name], rank), abs=1e-6)
            assert float((state - whole[name]).norm() / whole[name].norm()) == pytest.approx(errors[name], abs=1e-6)
        distances.append(float((tuned.model(ids).logits - expected).abs().max()))
        tuned.model.set_adapter("default")
    # The smaller side of a head's state in qwen3_5 is 8: then nothing is lost.
    assert distances[3] < distances[0]
    if tuned.architecture is MAIN[0]:
        assert distances[3] <= 1e-5 * tuned.effect(ids)
    tuned.model.set_adapter("r2")
    low = tuned.model(ids).logits
    tuned.model.save_pretrained(tmp_path, selected_adapters=["r2"])
    assert torch.equal(PeftModel.from_pretrained(tuned.architecture.build(), tmp_path / "r2")(ids).logits, low)


def test_a_low_rank_adapter_is_compressed_further(tuned: Tuned) -> None:
    tuned.model.add_adapter("low", S0Config(rank=4, init_weights=1.0, alpha=2.0, normalize=True))
    errors = compress_adapter(tuned.model, "low", 2, "lower")
    tuned.model.set_adapter("low")
    low = states_of(tuned.model)
    tuned.model.set_adapter("lower")
    for name, state in states_of(tuned.model).items():
        assert errors[name] == pytest.approx(tail(low[name], 2), abs=1e-6)
        # Still normalised, so that its norm is alpha.
        assert float(state.norm()) == pytest.approx(2.0, rel=1e-5)
    with torch.enable_grad():
        tuned.model(IDS).logits.square().mean().backward()
    trained = [p for name, p in tuned.model.named_parameters() if ".lower." in name]
    assert all(p.grad.abs().max() > 0 for p in trained)
    with pytest.raises(ValueError, match="'low' has rank=4 already; choose a lower one, got 4"):
        compress_adapter(tuned.model, "low", 4, "same")


def test_offsets_are_compressed_and_stored_as_states_are(tuned: Tuned, tmp_path: Path) -> None:
    tuned.model.add_adapter("both", S0Config(variant="both", init_weights=1.0, alpha=0.5, storage="int8"))
    errors = compress_adapter(tuned.model, "both", 2, "low")
    for name, layer in tuned.model.base_model.model.named_modules():
        if isinstance(layer, S0Layer):
            whole, low = (
                torch.stack([learnt() for learnt in layer.learnt_tensors(adapter).values()])
                for adapter in ("both", "low")
            )
            assert whole.shape[0] == 2
            assert torch.linalg.matrix_rank(low).eq(2).all()
            least = tail(whole.flatten(0, 1), 2)
            assert errors[name.removesuffix(".s0")] == pytest.approx(least, abs=1e-6)
    tuned.model.save_pretrained(tmp_path, selected_adapters=["both"])
    stored = load_file(states_file(tmp_path / "both"))
    assert len(stored) == 4 * tuned.architecture.states
    assert sum(tensor.dtype == torch.int8 for tensor in stored.values()) == 2 * tuned.architecture.states
    set_peft_model_state_dict(tuned.model, stored, "both")
    tuned.model.set_adapter("both")
    loaded = PeftModel.from_pretrained(tuned.architecture.build(), tmp_path / "both")
    assert torch.equal(loaded(IDS).logits, tuned.model(IDS).logits)


def test_learnt_alphas_stay_as_they_are(tuned: Tuned, tmp_path: Path) -> None:
    """Whatever is made of the states."""
    tuned.model.add_adapter("whole", S0Config(init_weights=1.0, alpha=0.5, learn_alpha=True, storage="int8"))
    tuned.model.set_alpha(0.123, "whole")
    errors = compress_adapter(tuned.model, "whole", 2, "low")
    plain = compress_adapter(tuned.model, "default", 2, "plain")
    assert all(0 < error < 1 for error in (*errors.values(), *plain.values()))
    tuned.model.save_pretrained(tmp_path, selected_adapters=["whole", "low"])
    for name in ("whole", "low"):
        alphas = [value for key, value in load_file(states_file(tmp_path / name)).items() if "s0_alpha" in key]
        assert len(alphas) == tuned.architecture.states
        assert all(torch.equal(alpha, torch.tensor([0.123])) for alpha in alphas)
    loaded = PeftModel.from_pretrained(tuned.architecture.build(), tmp_path / "low")
    tuned.model.set_adapter("low")
    expected = tuned.model(IDS).logits
    # What is in memory is exact, what is in the file in int8.
    assert float((loaded(IDS).logits - expected).norm() / expected.norm()) < 0.05


def test_a_state_of_zero_has_no_error(architecture: Architecture) -> None:
    tuned = tune(architecture, init_weights=True)
    assert set(compress_adapter(tuned.model, "default", 1, "small").values()) == {0.0}
    tuned.model.set_adapter("small")
    assert torch.equal(tuned.model(IDS).logits, tuned.base(IDS).logits)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_errors_of_states_whose_squares_float32_does_not_hold(tuned: Tuned, size: float) -> None:
    (expected, *_) = compress_adapter(tuned.model, "default", 1, "small").values()
    for layer in tuned.model.base_model.tuner_layers():
        layer.s0_state["default"].weight.mul_(size)
    (found, *_) = compress_adapter(tuned.model, "default", 1, "again").values()
    assert found == pytest.approx(expected, rel=1e-5)


def test_what_cannot_be_compressed(tuned: Tuned) -> None:
    model = tuned.model
    model.add_adapter("head", S0Config(modules_to_save=["lm_head"]))
    for arguments, message in (
        (("defautl", 2, "new"), r"Unknown adapter 'defautl'; this model has \['default', 'head'\]"),
        (("default", 17, "new"), r"rank=17 is more than a head's state"),
        (("default", 0, "new"), r"rank must be an integer >= 1"),
        (("default", 2, "head"), r"Adapter with name 'head' already exists"),
        (("head", 2, "new"), r"'head' has modules_to_save"),
    ):
        with pytest.raises(ValueError, match=message):
            compress_adapter(model, *arguments)
    next(iter(model.base_model.tuner_layers())).s0_state["default"].weight[0, 0, 0] = math.nan
    with pytest.raises(ValueError, match=r"layers\.0.*1 of \d+ values that are NaN"):
        compress_adapter(model, "default", 2, "new")
    assert list(model.peft_config) == ["default", "head"]
    lora = get_peft_model(tuned.architecture.build(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(TypeError, match="needs a PEFT model with S0 adapters, got PeftModel"):
        compress_adapter(lora, "default", 2, "new")


def test_low_rank_states_are_float32_under_autocast(tuned: Tuned) -> None:
    """As trainers with bf16=True run the model: a product of matrices would be rounded."""
    tuned.model.add_adapter("low", S0Config(rank=2, init_weights=1.0, alpha=1.0, l2_lambda=0.1))
    for layer in tuned.model.base_model.tuner_layers():
        learnt, factors = layer.state("low"), layer.state("low").weight
        left, right = factors.split(list(layer.state_shape[1:]), dim=1)
        product = torch.einsum("hir,hjr->hij", left, right)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            state = layer.effective_state("low")
            assert state.dtype == torch.float32
            torch.testing.assert_close(state, product, atol=1e-6, rtol=1e-6)
            gradient = penalty_gradient(learnt)
        # 2 lambda (S V, S^T U), by hand.
        expected = 0.2 * torch.cat([product @ right, product.transpose(1, 2) @ left], dim=1)
        torch.testing.assert_close(gradient, expected, atol=1e-4, rtol=1e-5)


# Some layers.


def test_thirds_of_the_recurrent_layers(architecture: Architecture) -> None:
    """The recipe of docs/peft.md, on a deeper model whose attention layers stand between."""
    config = architecture.config()
    values = {**config.to_dict(), "num_hidden_layers": 8}
    values.pop("layers_block_type", None)
    if architecture is MAIN[0]:
        values["layer_types"] = ["linear_attention", "linear_attention", "linear_attention", "full_attention"] * 2
    base = architecture.model_class(type(config)(**values))
    layers = recurrent_layers(base)
    assert layers == ([0, 1, 2, 4, 5, 6] if architecture is MAIN[0] else list(range(8)))
    third = len(layers) // 3
    for chosen in (layers[:third], layers[third:-third], layers[-third:]):
        model = get_peft_model(base, S0Config(layers_to_transform=chosen, init_weights=1.0))
        tuned = [int(name.split(".")[2]) for name in model.targeted_module_names]
        assert tuned == chosen
        assert recurrent_layers(model) == layers
        base = model.unload()


def test_no_layers_are_recurrent_in_a_module_without_mixers() -> None:
    assert recurrent_layers(nn.Linear(2, 2)) == []
