"""The law on mamba-ssm's own models with Mamba-2 layers, whose kernels run interpreted."""

from __future__ import annotations

import functools
from typing import Any

import naive_layers
import pytest
import torch
from mamba_ssm.models.config_mamba import MambaConfig
from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
from mamba_ssm.modules.mamba2 import Mamba2
from mamba_ssm.utils.generation import InferenceParams
from peft import PeftModel, get_peft_model
from torch import Tensor

from peft_s0 import S0Config
from peft_s0.injection import has_layer, layer_of

ALPHA = 0.7
VARIANTS: dict[str, dict[str, Any]] = {
    "norm": {"ngroups": 2},
    "no norm": {"rmsnorm": False, "conv_bias": False},
    "part of the channels": {"d_ssm": 32, "dt_limit": (0.3, 0.6)},
}


def build(layer: str = "Mamba2", **options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"d_state": 16, "headdim": 16, "chunk_size": 16} if layer == "Mamba2" else {}
    config = MambaConfig(
        d_model=32,
        n_layer=2,
        vocab_size=64,
        ssm_cfg={"layer": layer, **sizes, **options},
        fused_add_norm=False,
    )
    model = MambaLMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
            elif name.endswith("A_log"):
                parameter.uniform_(-2, 0)
            elif name.endswith("dt_bias"):
                parameter.fill_(-1)
    return model


@functools.cache
def tuned(variant: str = "norm") -> PeftModel:
    model = build(**VARIANTS[variant])
    return get_peft_model(model, S0Config(init_weights=1.0, alpha=ALPHA, l2_lambda=0.0)).eval()


def ids_of(rows: int, tokens: int) -> Tensor:
    return torch.randint(3, 64, (rows, tokens), generator=torch.Generator().manual_seed(1))


def relative(actual: Tensor, expected: Tensor, effect: Tensor | float) -> float:
    return float((actual - expected).detach().abs().max()) / float(effect)


@pytest.mark.parametrize("variant", VARIANTS)
def test_layer_and_its_gradient_against_the_formula(variant: str) -> None:
    mixer = next(module for module in tuned(variant).modules() if has_layer(module))
    twin = next(module for module in build(**VARIANTS[variant]).modules() if isinstance(module, Mamba2)).double()
    weight = layer_of(mixer).state("default").weight
    hidden = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(2))
    state = weight.detach().double().requires_grad_()
    expected = naive_layers.mamba2(twin, hidden.double(), ALPHA * state.expand(2, *state.shape))
    zero = torch.zeros(2, *state.shape, dtype=torch.float64)
    effect = (expected - naive_layers.mamba2(twin, hidden.double(), zero)).detach().abs().max()
    assert effect > 0.3
    assert mixer.use_mem_eff_path
    actual = mixer(hidden)
    assert mixer.use_mem_eff_path
    assert relative(actual, expected, effect) < 3e-6
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3))
    (gradient,) = torch.autograd.grad((actual * direction).sum(), weight)
    (reference,) = torch.autograd.grad((expected * direction).sum(), state)
    assert relative(gradient, reference, reference.abs().max()) < 3e-6


@torch.no_grad()
@pytest.mark.parametrize(("variant", "prompt"), [("norm", 3), ("no norm", 1)])
def test_a_prompt_and_steps(variant: str, prompt: int) -> None:
    model, ids = tuned(variant), ids_of(2, 5)
    full = model(ids).logits
    cache = InferenceParams(max_seqlen=8, max_batch_size=2)
    logits = []
    for start, end in [(0, prompt), *((i, i + 1) for i in range(prompt, 5))]:
        logits.append(model(ids[:, start:end], inference_params=cache).logits)
        cache.seqlen_offset = end
    assert relative(torch.cat(logits, dim=1), full, full.abs().max()) < 3e-6


@torch.no_grad()
def test_generate(monkeypatch: pytest.MonkeyPatch) -> None:
    # It measures its time by events of the GPU, or would if it were asked to.
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: None)
    model, ids = tuned(), ids_of(1, 4)
    expected = ids
    for _ in range(2):
        expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(model.generate(input_ids=ids, max_length=6), expected)


@torch.no_grad()
def test_documents_of_packed_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without causal-conv1d the layer runs no packed rows: a convolution that does stands in for its kernel."""

    def convolve(x: Tensor, weight: Tensor, bias: Tensor, activation: str, seq_idx: Tensor | None) -> Tensor:
        assert activation == "silu"
        if seq_idx is None:
            return torch.nn.functional.silu(
                torch.nn.functional.conv1d(x, weight[:, None], bias, padding=3, groups=len(weight))[..., :-3]
            )
        (lengths,) = (torch.unique_consecutive(row, return_counts=True)[1].tolist() for row in seq_idx)
        return torch.cat([convolve(part, weight, bias, activation, None) for part in x.split(lengths, -1)], dim=-1)

    monkeypatch.setattr("mamba_ssm.modules.mamba2.causal_conv1d_fn", convolve)
    model, ids = tuned(), ids_of(2, 6)
    apart = model(ids).logits
    row = torch.cat([ids[0], ids[1, :2]])[None]
    together = model(row, seq_idx=torch.tensor([[0] * 6 + [1] * 2], dtype=torch.int32)).logits[0]
    assert relative(together, torch.cat([apart[0], apart[1, :2]]), apart.abs().max()) < 3e-6
    with pytest.raises(ValueError, match="does not run mamba-ssm's Mamba2 with cu_seqlens"):
        model(row, cu_seqlens=torch.tensor([0, 6, 8]))


@torch.no_grad()
def test_disabled_and_zero_states_are_the_base_model() -> None:
    base, model, ids = build(use_mem_eff_path=False, **VARIANTS["norm"]), tuned(), ids_of(2, 5)
    for module in model.modules():
        if has_layer(module):
            module.use_mem_eff_path = False
    expected = base(ids).logits
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, expected)
    for module in model.modules():
        if has_layer(module):
            module.use_mem_eff_path = True
    zero = get_peft_model(build(**VARIANTS["norm"]), S0Config()).eval()
    assert zero.peft_config["default"].alpha == 0.65
    assert torch.equal(zero(ids).logits, expected)


@pytest.mark.parametrize("layer", ["Mamba1"])
def test_other_layers_are_refused(layer: str) -> None:
    with pytest.raises(ValueError, match="does not support its Mamba: its forward pass hands its kernel no initial"):
        get_peft_model(build(layer), S0Config())
