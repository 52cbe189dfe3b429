"""The law on fla's own models, whose kernels run interpreted.

Each layer is compared with its formula, and the model's full forward with every other way in which tokens can reach it.
"""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import naive_layers
import pytest
import torch
from fla import layers, models
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from peft_s0 import S0Config, registered_mixers, state_from_prompt
from peft_s0.injection import has_layer, layer_of
from peft_s0.mixers import cache_of, find_mixer
from peft_s0.mixers.refused import _CLASSES
from peft_s0.probing import final_states

pytestmark = [
    # What fla says of its own layers.
    pytest.mark.filterwarnings("ignore::UserWarning:fla"),
    # That a kernel prefers bfloat16; and numpy of masked elements, which are computed when interpreted.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

# Compiled, a loop index is a tensor; interpreted, it would be a Python int, whose methods these kernels miss.
_RANGE = importlib.import_module("fla.ops.common.chunk_delta_h").range
for _module in (
    "common.chunk_h",
    "gated_delta_product.chunk_deltaproduct_h",
    "generalized_delta_rule.dplr.chunk_h_fwd",
    "generalized_delta_rule.dplr.chunk_h_bwd",
):
    importlib.import_module(f"fla.ops.{_module}").range = _RANGE

ALPHA = 0.7
COMMON = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64, "intermediate_size": 32}
HEADS = {"num_heads": 2, "head_dim": 16}


@dataclass(frozen=True, eq=False)
class Case:
    """One layer of fla.

    Args:
        layer: its class.
        model: name of its models' classes, without their endings.
        naive: its formula.
        config: what the model's config says beyond COMMON.
        tolerance: relative to the effect of the state; for RWKV-7 in training that of its chunked kernel.
        packs: whether its models run packed rows.
    """

    layer: type[nn.Module]
    model: str
    naive: Callable[[Any, Tensor, Tensor], Tensor]
    config: dict[str, Any]
    tolerance: float = 3e-6
    packs: bool = True

    def build(self, **config: Any) -> Any:
        """A random model that remembers its first token for a while."""
        torch.manual_seed(0)
        config_class, model_class = (getattr(models, f"{self.model}{end}") for end in ("Config", "ForCausalLM"))
        model = model_class(config_class(**{**COMMON, **self.config, **config})).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.15)
                elif name.endswith("A_log"):
                    parameter.uniform_(-2, 0)
                elif name.endswith("dt_bias"):
                    parameter.fill_(-1)
        return model


SIZES = {"head_dim": 16, **{f"{name}_low_rank_dim": 8 for name in ("decay", "gate", "a", "v")}}
CASES = {
    case.layer.__name__: case
    for case in (
        Case(layers.GatedDeltaNet, "GatedDeltaNet", naive_layers.gated_delta_net, {**HEADS, "expand_v": 0.5}),
        Case(layers.KimiDeltaAttention, "KDA", naive_layers.kimi_delta_attention, {**HEADS, "expand_v": 1}),
        Case(layers.GatedLinearAttention, "GLA", naive_layers.gated_linear_attention, {"num_heads": 2}),
        Case(layers.HGRN2Attention, "HGRN2", naive_layers.hgrn2, {"num_heads": 2, "expand_ratio": 8}),
        Case(layers.DeltaNet, "DeltaNet", naive_layers.delta_net, {"num_heads": 2}),
        Case(layers.Comba, "Comba", naive_layers.comba, {**HEADS, "expand_v": 1}),
        Case(
            layers.GatedDeltaProduct,
            "GatedDeltaProduct",
            naive_layers.gated_delta_product,
            {**HEADS, "expand_v": 1, "num_householder": 2},
        ),
        Case(layers.MultiScaleRetention, "RetNet", naive_layers.retention, {"num_heads": 2}),
        Case(layers.LinearAttention, "LinearAttention", naive_layers.linear_attention, {"num_heads": 2}),
        Case(layers.RWKV7Attention, "RWKV7", naive_layers.rwkv7, SIZES, tolerance=3e-5),
        Case(
            layers.RWKV6Attention,
            "RWKV6",
            naive_layers.rwkv6,
            {"num_heads": 2, "proj_low_rank_dim": 8, "gate_low_rank_dim": 8},
            packs=False,
        ),
    )
}


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@functools.cache
def tuned(case: Case) -> PeftModel:
    """A model with random states, shared by tests that change nothing in it."""
    return get_peft_model(case.build(), S0Config(init_weights=1.0, alpha=ALPHA, l2_lambda=0.0)).eval()


def ids_of(rows: int, tokens: int) -> Tensor:
    return torch.randint(3, 64, (rows, tokens), generator=torch.Generator().manual_seed(1))


def relative(actual: Tensor, expected: Tensor, effect: Tensor | float) -> float:
    return float((actual - expected).detach().abs().max()) / float(effect)


def test_layer_and_its_gradient_against_the_formula(case: Case) -> None:
    mixer = next(module for module in tuned(case).modules() if has_layer(module))
    twin = next(module for module in case.build().modules() if type(module) is case.layer).double()
    weight = layer_of(mixer).state("default").weight
    hidden = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(2))
    state = weight.detach().double().requires_grad_()
    expected = case.naive(twin, hidden.double(), ALPHA * state.expand(2, *state.shape))
    effect = (expected - case.naive(twin, hidden.double(), torch.zeros(2, *state.shape).double())).detach().abs().max()
    assert effect > 0.3
    with torch.no_grad():
        assert relative(mixer(hidden_states=hidden)[0], expected, effect) < 3e-6

    tolerance, dtype = case.tolerance, torch.float32
    if case.layer is layers.GatedDeltaProduct:
        # Its kernel for training takes no float32, and the interpreter does not compute it in bfloat16.
        mixer, tolerance, dtype = copy.deepcopy(mixer).half(), 5e-3, torch.float16
        weight = layer_of(mixer).state("default").weight
        assert weight.dtype == torch.float32
    actual = mixer(hidden_states=hidden.to(dtype))[0]
    assert relative(actual, expected, effect) < tolerance
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3))
    (gradient,) = torch.autograd.grad((actual * direction).sum(), weight)
    (reference,) = torch.autograd.grad((expected * direction).sum(), state)
    assert relative(gradient, reference, reference.detach().abs().max()) < tolerance


@torch.no_grad()
def test_every_way_in_is_the_same(case: Case) -> None:
    model, ids = tuned(case), ids_of(2, 4)
    full = model(ids, use_cache=False).logits
    with model.disable_adapter():
        base = model(ids, use_cache=False).logits
    effect = (full - base).abs().max()
    assert effect > 0.3

    def in_chunks(ids: Tensor, ends: list[int], mask: Tensor | None = None) -> Tensor:
        cache, logits, start = None, [], 0
        for end in ends:
            given = {} if mask is None else {"attention_mask": mask[:, :end]}
            out = model(ids[:, start:end], past_key_values=cache, use_cache=True, **given)
            cache, start = cache_of(out), end
            logits.append(out.logits)
        assert type(cache).__module__.startswith("fla.")
        return torch.cat(logits, dim=1)

    for ends in ([4], [1, 2, 4]):
        assert relative(in_chunks(ids, ends), full, effect) < 3e-6, ends

    # Rows of four and of two tokens, in one call and in two; in one of them the shorter row has not begun.
    padded, mask = torch.zeros(2, 5, dtype=torch.long), torch.zeros(2, 5, dtype=torch.long)
    for row, length in ((0, 4), (1, 2)):
        padded[row, 5 - length :], mask[row, 5 - length :] = ids[row, :length], 1
    for ends in ([5], [2, 5]):
        if ends == [2, 5] and case.layer is layers.MultiScaleRetention:
            with pytest.raises(ValueError, match="Prefill a padded batch in one call"):
                in_chunks(padded, ends, mask)
            continue
        logits = in_chunks(padded, ends, mask)
        assert relative(logits[0, 1:], full[0], effect) < 3e-6, ends
        assert relative(logits[1, 3:], full[1, :2], effect) < 3e-6, ends

    if case.packs:
        packed = torch.cat([ids[0], ids[1, :2]])[None]
        logits = model(packed, cu_seqlens=torch.tensor([0, 4, 6]), use_cache=False).logits[0]
        assert relative(logits, torch.cat([full[0], full[1, :2]]), effect) < 3e-6


@torch.no_grad()
def test_greedy_generation_of_a_padded_batch(case: Case) -> None:
    model, ids = tuned(case), ids_of(2, 4)
    ids[1, :2] = 0
    mask = (ids != 0).long()
    together = model.generate(ids, attention_mask=mask, max_new_tokens=2, do_sample=False, pad_token_id=0)
    alone = ids[1:, 2:]
    for _ in range(2):
        alone = torch.cat([alone, model(alone, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(together[1, 4:], alone[0, 2:])


@torch.no_grad()
def test_the_state_that_a_prompt_ends_in(case: Case) -> None:
    """In one call, in pieces, and as an adapter: what fla's own cache holds, in the layout of a state."""
    model, ids = case.build(), ids_of(1, 4)
    cache = cache_of(model(ids, use_cache=True))
    whole, pieces = final_states(model, ids[0]), final_states(model, ids[0], chunk_size=3)
    assert whole
    for mixer, state in whole.items():
        assert state.shape == find_mixer(type(mixer)).state_shape(mixer)
        assert torch.equal(state, cache[mixer.layer_idx]["recurrent_state"][0].float())
        assert relative(pieces[mixer], state, state.abs().max()) < 1e-5
    for layer in state_from_prompt(model, None, ids[0]).base_model.tuner_layers():
        state = next(state for mixer, state in whole.items() if mixer.s0 is layer)
        assert torch.equal(layer.effective_state("default"), state)


@torch.no_grad()
def test_zero_states_are_the_base_model(case: Case) -> None:
    base, model, ids = case.build(), get_peft_model(case.build(), S0Config()).eval(), ids_of(2, 3)
    assert model.peft_config["default"].alpha == (0.07 if case.model in ("GatedDeltaNet", "KDA") else 1.0)
    torch.testing.assert_close(model(ids).logits, base(ids).logits, atol=1e-6, rtol=0)


@torch.no_grad()
def test_right_pads_leave_the_end_of_the_row_in_the_cache(case: Case) -> None:
    """Also where the base model lets right pads remove from the state, as RWKV-7 does."""
    model, ids = tuned(case), ids_of(1, 4)
    mask = torch.tensor([[1, 1, 0, 0]])
    padded, alone = model(ids, attention_mask=mask, use_cache=True), model(ids[:, :2], use_cache=True)
    # The first layer's: further up, RWKV models see pads in their shifts of tokens.
    end, expected = (cache_of(out)[0]["recurrent_state"] for out in (padded, alone))
    torch.testing.assert_close(end, expected, atol=1e-6, rtol=0)


@torch.no_grad()
def test_rows_of_the_base_model_beside_rows_with_a_state() -> None:
    case = CASES["GatedLinearAttention"]
    model, ids = tuned(case), ids_of(2, 5)
    mixed = model(ids, adapter_names=["__base__", "default"]).logits
    assert torch.equal(mixed[:1], case.build()(ids).logits[:1])
    torch.testing.assert_close(mixed[1:], model(ids).logits[1:], atol=1e-6, rtol=0)


def test_gradient_checkpointing() -> None:
    case, ids = CASES["GatedLinearAttention"], ids_of(2, 5)
    gradients = []
    for checkpointing in (False, True):
        model = get_peft_model(case.build(), S0Config(init_weights=1.0, l2_lambda=0.0)).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.normal_()
        model(ids).logits.square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)
        assert plain.abs().max() > 0


@torch.no_grad()
def test_packed_rows_that_would_leak_are_refused() -> None:
    ids, boundaries = ids_of(1, 6), torch.tensor([0, 4, 6])
    with pytest.raises(ValueError, match="RWKV6Attention of fla does not run packed rows"):
        tuned(CASES["RWKV6Attention"])(ids, cu_seqlens=boundaries)
    with pytest.raises(ValueError, match=r"GatedLinearAttention does not read cu_seq_lens_q.*as cu_seqlens"):
        tuned(CASES["GatedLinearAttention"])(ids, cu_seq_lens_q=boundaries)


@pytest.mark.parametrize(
    ("layer", "mode"), [("MultiScaleRetention", "parallel"), ("GatedLinearAttention", "fused_chunk")]
)
def test_modes_that_lose_the_state_are_refused(layer: str, mode: str) -> None:
    with pytest.raises(ValueError, match=f"S0 cannot tune '.*' .{layer}.: with mode='{mode}'"):
        get_peft_model(CASES[layer].build(attn_mode=mode), S0Config())


@pytest.mark.parametrize(("name", "config"), [("Mamba2", {"head_dim": 16, "num_heads": 4}), ("GSA", {"num_heads": 2})])
def test_models_of_refused_layers(name: str, config: dict[str, Any]) -> None:
    config_class, model_class = (getattr(models, f"{name}{end}") for end in ("Config", "ForCausalLM"))
    with pytest.raises(ValueError, match=r"is recurrent, but S0 does not support its .*: it"):
        get_peft_model(model_class(config_class(**COMMON, **config)), S0Config())


def test_declared_and_refused_classes_exist() -> None:
    declared = [mixer.path for mixer in registered_mixers() if not mixer.path.startswith("transformers.")]
    paths = [*declared, *(path for path in _CLASSES if not path.startswith("transformers."))]
    for path in paths:
        module, _, name = path.rpartition(".")
        assert issubclass(getattr(importlib.import_module(module), name), nn.Module)
    assert len(set(paths)) == len(paths)
    assert {f"{case.layer.__module__}.{case.layer.__name__}" for case in CASES.values()} == {
        path for path in declared if path.startswith("fla.")
    }
