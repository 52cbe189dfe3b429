"""The law on a real GPU, with the real kernels, at real head sizes.

    pip install -e '.[test,fla,mamba]' causal-conv1d
    python -m pytest tests/gpu

Models have the layer shapes of Qwen3.5-4B and FalconH1-7B, random weights and few layers. Errors are relative to the
effect of the states: 1e-3 in float32 (TF32 off in torch, thrice in Triton, which is nearly as exact; the kernels
accumulate in another order than the twin) and 6e-2 in bfloat16, whose own rounding of the base model is of that size.
`S0_TEST_DEVICE=cpu` runs the same tests without a GPU and without the kernels, to check the tests.
"""

from __future__ import annotations

import copy
import os
import sys
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("TRITON_F32_DEFAULT", "tf32x3")  # before Triton is imported; "ieee" takes minutes to compile

import pytest
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import architectures
import reference
from test_law import in_chunks, left_pad, packed_arguments
from torch import Tensor
from tuned import Tuned, tune

DEVICE = os.environ.get("S0_TEST_DEVICE", "cuda")
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 6e-2}

if DEVICE == "cuda" and not torch.cuda.is_available():
    pytest.skip("there is no GPU here", allow_module_level=True)

COMMON = {"vocab_size": architectures.VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ROWS = (
    # Qwen3.5-4B: 32 heads of 128 x 128.
    replace(
        architectures.ARCHITECTURES[0],
        name="qwen3_5_4b",
        config=lambda: transformers.Qwen3_5TextConfig(
            **COMMON,
            hidden_size=2560,
            intermediate_size=1024,
            num_hidden_layers=4,
            num_attention_heads=16,
            num_key_value_heads=4,
            head_dim=256,
            linear_num_key_heads=16,
            linear_num_value_heads=32,
            linear_key_head_dim=128,
            linear_value_head_dim=128,
        ),
        slow_mixer=reference.GatedDeltaRule,
    ),
    # FalconH1-7B: 24 heads of 128 x 256.
    replace(
        architectures.ARCHITECTURES[1],
        name="falcon_h1_7b",
        config=lambda: transformers.FalconH1Config(
            **COMMON,
            hidden_size=3072,
            intermediate_size=1024,
            num_hidden_layers=2,
            num_attention_heads=12,
            num_key_value_heads=2,
            head_dim=128,
            mamba_d_ssm=3072,
            mamba_n_heads=24,
            mamba_d_head=128,
            mamba_n_groups=1,
            mamba_d_state=256,
            mamba_chunk_size=256,
        ),
        slow_mixer=reference.FalconH1,
    ),
)


@pytest.fixture(params=ROWS, ids=lambda row: row.name, scope="module")
def in_float32(request: pytest.FixtureRequest) -> Tuned:
    torch.backends.cuda.matmul.allow_tf32 = False
    tuned = tune(request.param, init_weights=0.3)
    for model in (tuned.base, tuned.model, tuned.slow):
        model.to(DEVICE)
    return tuned


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def tuned(in_float32: Tuned, request: pytest.FixtureRequest) -> Tuned:
    # A copy: what bfloat16 rounds off does not come back.
    tuned = replace(in_float32, model=copy.deepcopy(in_float32.model).to(request.param))
    assert all(p.dtype == torch.float32 for n, p in tuned.model.named_parameters() if "s0_state" in n)
    return tuned


def ids(tuned: Tuned, tokens: int, seed: int = 0) -> Tensor:
    return tuned.ids(1, tokens, seed).to(DEVICE)


def check(tuned: Tuned, actual: Tensor, row: Tensor) -> None:
    tolerance = TOLERANCE[tuned.model.get_input_embeddings().weight.dtype]
    tuned.assert_equal(actual.float(), tuned.expected(row), tuned.effect(row), tolerance)


@torch.no_grad()
def test_kernels_are_installed(tuned: Tuned) -> None:
    """What is tested here is worth nothing on the fallback."""
    if DEVICE == "cpu":
        pytest.skip("no kernels on a CPU")
    import causal_conv1d  # noqa: F401
    import fla  # noqa: F401
    import mamba_ssm  # noqa: F401


@torch.no_grad()
def test_full_and_cached(tuned: Tuned) -> None:
    row = ids(tuned, 150)
    for use_cache in (False, True):
        check(tuned, tuned.model(row, use_cache=use_cache).logits, row)


@torch.no_grad()
def test_token_by_token_and_chunks(tuned: Tuned) -> None:
    row = ids(tuned, 24)
    for ends in (list(range(1, 25)), [1, 24], [13, 24]):
        check(tuned, in_chunks(tuned, row, ends), row)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded(tuned: Tuned, side: str) -> None:
    rows = [tuned.ids(1, length, seed=length)[0] for length in (150, 40, 3, 1)]
    batch, mask, positions = (tensor.to(DEVICE) for tensor in left_pad(rows, side))
    logits = tuned.model(batch, attention_mask=mask, position_ids=positions).logits
    for i, row in enumerate(rows):
        check(tuned, logits[i : i + 1][:, mask[i].bool()], row[None].to(DEVICE))


@torch.no_grad()
def test_packed(tuned: Tuned) -> None:
    lengths = [70, 1, 129, 8]
    rows = [tuned.ids(1, length, seed=length).to(DEVICE) for length in lengths]
    arguments = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in packed_arguments(lengths).items()}
    logits = tuned.model(torch.cat(rows, dim=1), use_cache=False, **arguments).logits
    for row, actual in zip(rows, logits.split(lengths, dim=1), strict=True):
        check(tuned, actual, row)


@torch.no_grad()
def test_zero_and_disabled_states_are_the_base_model(in_float32: Tuned) -> None:
    row = ids(in_float32, 60)
    with in_float32.model.disable_adapter():
        assert torch.equal(in_float32.model(row).logits, in_float32.base(row).logits)
    zero = tune(in_float32.architecture, init_weights=True)
    model = zero.model.to(DEVICE)
    assert torch.equal(model(row).logits, zero.base.to(DEVICE)(row).logits)


def test_gradients(tuned: Tuned) -> None:
    """Of padded rows and of rows of one token, against the twin."""
    from test_gradients import loss_of, reference_gradients

    rows = [tuned.ids(1, length, seed=length)[0].to(DEVICE) for length in (90, 20)]
    batch, mask, positions = (tensor.to(DEVICE) for tensor in left_pad([row.cpu() for row in rows]))
    labels = torch.where(mask.cumsum(1) > 1, batch, -100)
    tuned.model.train()
    tuned.model.zero_grad()
    loss_of(tuned.model, batch, labels, attention_mask=mask, position_ids=positions).backward()
    expected = reference_gradients(tuned, rows)
    tolerance = TOLERANCE[tuned.model.get_input_embeddings().weight.dtype]
    for name, parameter in tuned.model.named_parameters():
        if parameter.requires_grad:
            scale = float(expected[name].abs().max())
            assert float((parameter.grad - expected[name].to(DEVICE)).abs().max()) <= tolerance * scale, name
    tuned.model.zero_grad()
    tuned.model(ids(tuned, 1), use_cache=False).logits.float().square().sum().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in tuned.model.parameters() if p.requires_grad)
    tuned.model.eval()
