"""Mixers that begin at zero, whose states' contribution is added: what the law does not show of it, and its limits."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, COMMON, Architecture, mixers, time_step_bias
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from reference import with_slow_mixers
from test_gradients import assert_equal, gradients, loss_of
from test_law import in_chunks, left_pad, packed_arguments
from torch import Tensor, nn
from tuned import Tuned, states_of, tune

from peft_s0 import S0Config
from peft_s0.mixers import CACHE_ARGUMENTS

ROWS = {row.name: row for row in ARCHITECTURES}
MAMBA = [ROWS[name] for name in ("mamba", "falcon_mamba", "jamba", "zamba")]
MINIMAX = ROWS["minimax"]


@pytest.fixture(params=[*MAMBA, MINIMAX], ids=lambda row: row.name)
def architecture(request: pytest.FixtureRequest) -> Architecture:
    return request.param


only_mamba = pytest.mark.parametrize("architecture", MAMBA, ids=lambda row: row.name)
# Their models drop what describes packed rows; Jamba's attention reads the positions, and only these.
told = pytest.mark.parametrize("architecture", MAMBA[:3], ids=lambda row: row.name)
carried = pytest.mark.parametrize("architecture", MAMBA[:2], ids=lambda row: row.name)


@torch.no_grad()
def test_rows_longer_than_what_is_corrected_at_once(tuned: Tuned) -> None:
    ids = tuned.ids(2, 150)
    expected, effect = tuned.expected(ids), tuned.effect(ids)
    tuned.assert_equal(tuned.model(ids).logits, expected, effect)
    tuned.assert_equal(in_chunks(tuned, ids, [1, 70, 149, 150]), expected, effect)


def test_gradients_of_rows_longer_than_what_is_corrected_at_once(tuned: Tuned) -> None:
    ids = tuned.ids(2, 100)
    states = {name: state.double().requires_grad_() for name, state in states_of(tuned.model).items()}
    slow = with_slow_mixers(tuned.base, tuned.architecture.slow_mixer, states)
    loss_of(slow, ids, use_cache=False).backward()
    alpha = tuned.model.peft_config["default"].alpha
    expected = {
        f"base_model.model.{name}.s0.s0_state.default.weight": alpha * state.grad.float()
        for name, state in states.items()
    }
    assert_equal(gradients(tuned, loss_of(tuned.model, ids, use_cache=False)), expected)


def test_gradients_through_a_cache(tuned: Tuned) -> None:
    """A loss on the second chunk reaches the states through what the first one left in the cache."""
    ids = tuned.ids(2, 12)

    def loss(logits: Tensor) -> Tensor:
        return logits[:, 5:].double().square().sum()

    in_pieces = gradients(tuned, loss(in_chunks(tuned, ids, [5, 12])))
    in_pieces = {name: grad.clone() for name, grad in in_pieces.items()}
    assert_equal(in_pieces, gradients(tuned, loss(tuned.model(ids, use_cache=False).logits)))


@torch.no_grad()
@pytest.mark.parametrize("architecture", [ROWS["zamba"], MINIMAX], ids=lambda row: row.name)
@pytest.mark.parametrize("lengths", [(90, 3), (3, 90), (4, 1)], ids=str)
def test_the_end_of_a_packed_row(architecture: Architecture, lengths: tuple[int, int]) -> None:
    """What the cache keeps of it is the end of its last document, be it the shortest or longer than a chunk."""
    tuned = tune(architecture)
    mixer = mixers(tuned.model)[0]
    hidden_states = torch.randn(1, sum(lengths) + 1, 64)
    document, step = hidden_states[:, lengths[0] : -1], hidden_states[:, -1:]

    def run(*calls: tuple[Tensor, dict]) -> Tensor:
        cache = architecture.make_cache(tuned.model.config, 1)
        arguments = {mixer.s0.cache_argument: cache, "attention_mask": None}
        if architecture is MINIMAX:
            arguments["position_embeddings"] = None
        for given, packing in calls:
            output = mixer(hidden_states=given, **arguments, **packing)
        return output[0] if isinstance(output, tuple) else output

    packing = {name: value for name, value in packed_arguments(list(lengths)).items() if name != "position_ids"}
    actual = run((hidden_states[:, :-1], packing), (step, {}))
    torch.testing.assert_close(actual, run((document, {}), (step, {})), atol=2e-6, rtol=1e-5)
    assert float((actual - run((step, {}))).abs().max()) > 1e-2


@pytest.mark.parametrize(
    "architecture", [ROWS[name] for name in ("qwen3_5", "falcon_h1", "mamba")], ids=lambda row: row.name
)
@pytest.mark.parametrize("name", CACHE_ARGUMENTS)
@torch.no_grad()
def test_a_cache_under_every_name_that_it_had(tuned: Tuned, name: str) -> None:
    """transformers renames a cache in the mixer, behind what S0 sees."""
    mixer, hidden_states = mixers(tuned.model)[0], torch.randn(2, 7, 64)

    def run(argument: str) -> list[Tensor]:
        cache = tuned.architecture.make_cache(tuned.model.config, 2)
        outputs = (mixer(part, **{argument: cache}) for part in hidden_states.split([4, 2, 1], dim=1))
        return [output[0] if isinstance(output, tuple) else output for output in outputs]

    for actual, expected in zip(run(name), run(mixer.s0.cache_argument), strict=True):
        assert torch.equal(actual, expected)


@torch.no_grad()
def test_a_single_step_is_the_base_models_own(tuned: Tuned) -> None:
    """Behind the first token the mixer gets its cache itself, and none of its parts is acted on."""
    ids = tuned.ids(2, 4)
    cache = tuned.architecture.make_cache(tuned.model.config, len(ids))
    tuned.model(ids[:, :3], use_cache=True, **{tuned.architecture.cache: cache})
    seen = []
    for mixer in mixers(tuned.model):
        name = mixer.s0.cache_argument
        mixer.register_forward_pre_hook(
            lambda m, args, kwargs, name=name: seen.append((kwargs[name], dict(m.s0.calls))), with_kwargs=True
        )
    tuned.model(ids[:, 3:], use_cache=True, **{tuned.architecture.cache: cache})
    assert len(seen) == tuned.architecture.states
    assert all(given is cache and not calls for given, calls in seen)


@torch.no_grad()
@only_mamba
def test_only_rows_with_a_state_are_repaired(architecture: Architecture) -> None:
    """The base model forgets its state in a call of several tokens on a cache with a past. Rows that start from the
    base model's zero keep its own arithmetic to the last bit; S0 has the others right."""
    tuned = tune(architecture)
    ids = tuned.ids(3, 12)

    def run(model: nn.Module, **arguments: object) -> Tensor:
        cache = architecture.make_cache(tuned.model.config, len(ids))
        logits = [model(ids[:, :7], use_cache=True, **{architecture.cache: cache}, **arguments).logits]
        logits.append(model(ids[:, 7:], use_cache=True, **{architecture.cache: cache}, **arguments).logits)
        return torch.cat(logits, dim=1)

    base = run(tuned.base)
    assert float((base - tuned.base(ids).logits).abs().max()) > 1e-3
    mixed = run(tuned.model, adapter_names=["default", "__base__", "default"])
    assert torch.equal(mixed[1], base[1])
    tuned.assert_equal(mixed[::2], tuned.expected(ids)[::2], tuned.effect(ids))
    zero = tune(architecture, init_weights=True)
    assert torch.equal(run(zero.model), base)
    with tuned.model.disable_adapter():
        assert torch.equal(run(tuned.model), base)


@torch.no_grad()
@only_mamba
def test_states_are_float32_in_the_cache_of_a_bf16_model(architecture: Architecture) -> None:
    tuned = tune(architecture)
    model = tuned.model.to(torch.bfloat16)
    for tokens in (1, 6):
        cache = architecture.make_cache(model.config, 2)
        model(tuned.ids(2, tokens), use_cache=True, **{architecture.cache: cache})
        kept = [layer.recurrent_states[0] for layer in cache.layers if hasattr(layer, "recurrent_states")]
        assert [state.dtype for state in kept] == [torch.float32] * architecture.states


@torch.no_grad()
def test_autocast(tuned: Tuned) -> None:
    ids = tuned.ids(2, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        full = tuned.model(ids).logits.float()
        chunked = in_chunks(tuned, ids, [1, 8, 20]).float()
    tuned.assert_equal(full, tuned.expected(ids), tuned.effect(ids), tolerance=0.1)
    tuned.assert_equal(chunked, full, tuned.effect(ids), tolerance=0.05)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "modules"),
    [
        # PEFT allows no LoRA on the output projections of a Mamba.
        ("mamba", ["in_proj", "x_proj"]),
        ("zamba", ["in_proj"]),
        ("minimax", ["qkv_proj", "out_proj"]),
    ],
)
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`", "ignore:You are trying to modify a model with PEFT")
def test_lora_on_the_tapped_parts(name: str, modules: list[str]) -> None:
    """LoRA's share is seen: S0 with LoRA equals the naive twin with LoRA merged, unmerged and merged."""
    tuned = tune(ROWS[name])
    torch.manual_seed(1)
    config = LoraConfig(target_modules=modules, init_lora_weights=False, r=4)
    model = get_peft_model(ROWS[name].build(), config).eval()
    merged = copy.deepcopy(model).merge_and_unload()
    # The twin of the merged model, with the states of the tuned one.
    slow = with_slow_mixers(merged, ROWS[name].slow_mixer, states_of(tuned.model))
    inject_adapter_in_model(S0Config(alpha=0.7), model.base_model.model, "states")
    for mixer, tuned_mixer in zip(mixers(model), mixers(tuned.model), strict=True):
        mixer.s0.s0_state["states"].weight.copy_(tuned_mixer.s0.s0_state["default"].weight)
    rows = [tuned.ids(1, 12)[0], tuned.ids(1, 5)[0]]
    ids, mask, positions = left_pad(rows)
    expected = slow(rows[1][None], use_cache=False).logits.float()
    effect = float((expected - merged(rows[1][None]).logits).abs().max())
    for adapted in (model, model.merge_and_unload()):
        actual = adapted.eval()(ids, attention_mask=mask, position_ids=positions).logits[1:, -5:]
        tuned.assert_equal(actual, expected, effect, tolerance=3e-5)


@only_mamba
def test_forms_of_a_state_without_heads(architecture: Architecture) -> None:
    for config in ({"normalize": True}, {"train_alpha": 1.0}, {"init_weights": True}):
        tuned = tune(architecture, **config)
        tuned.model.train()
        found = gradients(tuned, loss_of(tuned.model, tuned.ids(2, 9)))
        assert all(bool(torch.isfinite(grad).all()) for grad in found.values())
    if architecture.name != "zamba":
        with pytest.raises(ValueError, match=r"rank=2 needs matrix states, but that of '.*' is \[128, 8\]"):
            tune(architecture, rank=2)


@torch.no_grad()
@carried
@pytest.mark.parametrize("given", ["cu_seq_lens_q", "seq_idx", "position_ids"])
def test_packed_rows_in_any_announcement(architecture: Architecture, given: str) -> None:
    """The model drops it on the way to the mixers, which are told all the same."""
    tuned = tune(architecture)
    rows = [tuned.ids(1, 6)[0], tuned.ids(1, 8, seed=1)[0]]
    packed, arguments = torch.cat(rows)[None], {given: packed_arguments([6, 8])[given]}
    for mask in ({}, {"attention_mask": torch.ones_like(packed)}):
        if mask and given == "position_ids":
            continue  # with a mask, positions that begin again are no sign of packed rows
        logits = tuned.model(packed, use_cache=False, **arguments, **mask).logits
        tuned.assert_equal(logits[:, 6:], tuned.expected(rows[1][None]), tuned.effect(rows[1][None]))
        tuned.assert_equal(logits[:, :6], tuned.expected(rows[0][None]), tuned.effect(rows[0][None]))
    with tuned.model.disable_adapter():
        assert torch.equal(tuned.model(packed, **arguments).logits, tuned.base(packed, **arguments).logits)


@torch.no_grad()
@told
def test_packed_rows_of_which_only_some_mixers_are_told(architecture: Architecture) -> None:
    tuned = tune(architecture, layers_to_transform=[1])
    arguments = packed_arguments([6, 8])
    with pytest.raises(ValueError, match=r"tells those that it tunes, here 1 of \d; .*Tune all of them, or pad"):
        tuned.model(tuned.ids(1, 14), use_cache=False, **arguments)
    tuned.assert_equal(
        tuned.model(tuned.ids(2, 9)).logits, tuned.expected(tuned.ids(2, 9)), tuned.effect(tuned.ids(2, 9))
    )


@told
def test_what_a_failed_call_announced_is_forgotten(architecture: Architecture) -> None:
    """A call that breaks off half-way leaves no documents behind for the next one."""
    tuned = tune(architecture)
    ids = tuned.ids(2, 9)

    def fail(module: nn.Module, args: object) -> None:
        raise RuntimeError("out of memory")

    handle = mixers(tuned.model)[0].register_forward_pre_hook(fail, prepend=True)
    with pytest.raises(RuntimeError, match="out of memory"):
        tuned.model(tuned.ids(1, 14), use_cache=False, **packed_arguments([6, 8]))
    handle.remove()
    with torch.no_grad():
        for call in (tuned.model, tuned.model.get_base_model()):
            tuned.assert_equal(call(ids).logits, tuned.expected(ids), tuned.effect(ids))


def _lfm2() -> nn.Module:
    return transformers.Lfm2ForCausalLM(
        transformers.Lfm2Config(
            **TINY, num_attention_heads=2, num_key_value_heads=2, layer_types=["conv", "full_attention"]
        )
    )


TINY = {**COMMON, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (_lfm2, "Lfm2ShortConv: it is a short convolution"),
        (lambda: nn.Sequential(_named("Lfm2MoeShortConv")), "Lfm2MoeShortConv: it is a short convolution"),
        (lambda: nn.Sequential(_named("Lfm3ShortConv")), "Lfm3ShortConv: it is a short convolution"),
        (lambda: nn.Sequential(_named("ZayaCCAProjection")), "ZayaCCAProjection: what it carries .* last token's"),
        (
            lambda: transformers.RwkvForCausalLM(
                transformers.RwkvConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2)
            ),
            "RwkvSelfAttention: its state is a running mean",
        ),
        (lambda: nn.Sequential(_named("mLSTMLayer")), "mLSTMLayer: the kernels of the package xlstm"),
    ],
    ids=["lfm2", "lfm2_moe", "lfm3", "zaya", "rwkv", "xlstm"],
)
def test_refused_layers_name_the_reason(build, message: str) -> None:
    with pytest.raises(ValueError, match=rf"is recurrent, but S0 does not support its {message}.*use LoRA"):
        get_peft_model(build(), S0Config())


def _named(name: str) -> nn.Module:
    """A module of that class name; building the model itself takes long."""
    return type(name, (nn.Module,), {})()


@torch.no_grad()
@only_mamba
@pytest.mark.parametrize("time_step", [1e-3, 8.0])
def test_a_held_position_does_not_touch_the_state(architecture: Architecture, time_step: float) -> None:
    """A single first token is run as two, the second being held, however fast the state would decay there."""
    tuned = tune(architecture)
    for model in (tuned.base, tuned.model):
        for mixer in mixers(model):
            weight = mixer.dt_proj_weight if hasattr(mixer, "dt_proj_weight") else mixer.dt_proj.weight
            weight.zero_()
            time_step_bias(mixer).fill_(math.log(math.expm1(time_step)))
    caches = []
    for model in (tuned.base, tuned.model):
        caches.append(architecture.make_cache(model.config, 2))
        model(tuned.ids(2, 1), use_cache=True, **{architecture.cache: caches[-1]})
    written, actual = (cache.layers[0].recurrent_states[0] for cache in caches)
    decay = torch.exp(-time_step * mixers(tuned.base)[0].A_log.exp())
    expected = written + decay * next(iter(states_of(tuned.model).values()))
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-5)
