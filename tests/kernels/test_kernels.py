"""The law on the kernels that a GPU runs, interpreted: whole models against the naive twins of their mixers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from architectures import ARCHITECTURES, Architecture, mixers, output_projection
from reference import SlowMixer
from test_gradients import assert_equal, gradients, loss_of, reference_gradients, squares_of
from test_law import in_chunks, left_pad, packed_arguments
from tuned import Tuned, tune

from peft_s0.mixers import cache_of


@dataclass(frozen=True)
class Kernels:
    """The kernels that carry a mixer's state: over a sequence, back over it, over a single step; and a sequence of more
    than one of their chunks."""

    sequence: str
    backward: str
    step: str
    long: int


CHUNKS = ("chunk_gated_delta_rule_fwd_kernel_h_blockdim64", "chunk_gated_delta_rule_bwd_kernel_dhu_blockdim64")
MAMBA2 = Kernels("_state_passing_fwd_kernel", "_state_passing_bwd_kernel", "_selective_scan_update_kernel", 18)
KERNELS = {
    "qwen3_5": Kernels(*CHUNKS, "fused_recurrent_gated_delta_rule_fwd_kernel", 66),
    "kimi_linear": Kernels(*CHUNKS, "fused_recurrent_kda_fwd_kernel", 66),
    "falcon_h1": MAMBA2,
    "mamba2": MAMBA2,
}


@pytest.fixture(params=[row for row in ARCHITECTURES if row.name in KERNELS], ids=lambda row: row.name)
def architecture(request: pytest.FixtureRequest) -> Architecture:
    return request.param.shallow(2)


@pytest.fixture
def kernels(architecture: Architecture) -> Kernels:
    return KERNELS[architecture.name]


@torch.no_grad()
def test_sequence_and_final_state(tuned: Tuned, kernels: Kernels, launches: Counter[str]) -> None:
    ids = tuned.ids(1, kernels.long)
    output = tuned.model(ids, use_cache=True)
    assert launches[kernels.sequence] == tuned.architecture.states
    tuned.assert_equal(output.logits, tuned.expected(ids), tuned.effect(ids))
    cache = cache_of(output)
    twins = [module for module in tuned.slow.modules() if isinstance(module, SlowMixer)]
    assert len(twins) == tuned.architecture.states
    for twin in twins:
        final = cache.get_recurrent_state(twin.mixer.layer_idx)
        assert final.dtype == torch.float32
        torch.testing.assert_close(final, twin.final.float(), atol=1e-5 * float(twin.final.abs().max()), rtol=0)


@torch.no_grad()
def test_left_padded_rows(tuned: Tuned, kernels: Kernels, launches: Counter[str]) -> None:
    rows = [tuned.ids(1, length, seed=length)[0] for length in (20, 5, 1)]
    ids, mask, positions = left_pad(rows)
    logits = tuned.model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    assert launches[kernels.sequence] == tuned.architecture.states
    effect = tuned.effect(rows[0][None])
    for row, actual in zip(rows, logits, strict=True):
        tuned.assert_equal(actual[None, -len(row) :], tuned.expected(row[None]), effect)


@torch.no_grad()
def test_token_by_token_from_the_first_token(tuned: Tuned, kernels: Kernels, launches: Counter[str]) -> None:
    ids = tuned.ids(2, 4)
    logits = in_chunks(tuned, ids, [1, 2, 3, 4])
    assert launches[kernels.sequence] == tuned.architecture.states
    assert launches[kernels.step] == 3 * tuned.architecture.states
    tuned.assert_equal(logits, tuned.expected(ids), tuned.effect(ids))


@torch.no_grad()
def test_packed_rows(tuned: Tuned, kernels: Kernels, launches: Counter[str]) -> None:
    rows = [tuned.ids(1, length, seed=length)[0] for length in (20, 1, 9)]
    lengths = [len(row) for row in rows]
    logits = tuned.model(torch.cat(rows)[None], use_cache=False, **packed_arguments(lengths)).logits
    assert launches[kernels.sequence] == tuned.architecture.states
    effect = tuned.effect(rows[0][None])
    for row, actual in zip(rows, logits.split(lengths, dim=1), strict=True):
        tuned.assert_equal(actual, tuned.expected(row[None]), effect)


def test_gradients_of_padded_rows(tuned: Tuned, kernels: Kernels, launches: Counter[str]) -> None:
    rows = [tuned.ids(1, length, seed=length)[0] for length in (20, 5)]
    ids, mask, positions = left_pad(rows)
    labels = torch.where(mask.cumsum(1) > 1, ids, -100)
    found = gradients(tuned, loss_of(tuned.model, ids, labels, attention_mask=mask, position_ids=positions))
    assert launches[kernels.backward] == tuned.architecture.states
    assert_equal(found, reference_gradients(tuned, rows))


def test_gradients_of_packed_rows(tuned: Tuned, kernels: Kernels, launches: Counter[str]) -> None:
    rows = [tuned.ids(1, length, seed=length)[0] for length in (9, 2, 4)]
    ids = torch.cat(rows)[None]
    arguments = packed_arguments([9, 2, 4])
    labels = torch.where(arguments["position_ids"] > 0, ids, -100)
    found = gradients(tuned, loss_of(tuned.model, ids, labels, use_cache=False, **arguments))
    assert launches[kernels.backward] == tuned.architecture.states
    assert_equal(found, reference_gradients(tuned, rows))


def test_gradients_of_one_token_rows(tuned: Tuned, kernels: Kernels, launches: Counter[str]) -> None:
    """The kernels of single steps have no backward pass, or none that reaches the state."""
    tuned.model.train()
    rows = tuned.ids(2, 1)
    found = gradients(tuned, squares_of(tuned.model, rows))
    assert launches[kernels.step] == 0
    assert launches[kernels.backward] == tuned.architecture.states
    assert_equal(found, reference_gradients(tuned, list(rows), squares_of))


@torch.no_grad()
def test_documents_stay_in_one_row_where_the_kernels_tell_them_apart(tuned: Tuned) -> None:
    """And the cache is that of the last document."""
    rows = [tuned.ids(1, length, seed=length)[0] for length in (5, 1, 9)]
    shapes = []
    for mixer in mixers(tuned.model):
        output_projection(mixer).register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape[:2]))
    packed = tuned.model(torch.cat(rows)[None], use_cache=True, **packed_arguments([5, 1, 9]))
    # Three zeros behind each document keep a convolution of four tokens from looking back into the one before.
    native = tuned.architecture.name == "qwen3_5"
    assert set(shapes) == {(1, 24) if native else (3, 9)}
    alone = tuned.model(rows[-1][None], use_cache=True)
    # The first layer's only: with a cache, transformers lets attention run across the documents.
    first = mixers(tuned.model)[0].layer_idx
    actual, expected = (cache_of(output).layers[first] for output in (packed, alone))
    for name in ("recurrent_states", "conv_states"):
        torch.testing.assert_close(getattr(actual, name)[0], getattr(expected, name)[0], atol=2e-6, rtol=0)


@torch.no_grad()
def test_offsets(architecture: Architecture, kernels: Kernels, launches: Counter[str]) -> None:
    tuned = tune(architecture, variant="both")
    test_token_by_token_from_the_first_token(tuned, kernels, launches)
    launches.clear()
    test_packed_rows(tuned, kernels, launches)


def test_gradients_of_offsets(architecture: Architecture, kernels: Kernels, launches: Counter[str]) -> None:
    """In training mode, where Mamba-2 has a fused path that calls no norm. Nothing is learnt in front of the first
    recurrence, or in it."""
    tuned = tune(architecture, variant="offset")
    tuned.model.train()
    rows = [tuned.ids(1, length, seed=length)[0] for length in (20, 5)]
    ids, mask, positions = left_pad(rows)
    labels = torch.where(mask.cumsum(1) > 1, ids, -100)
    found = gradients(tuned, loss_of(tuned.model, ids, labels, attention_mask=mask, position_ids=positions))
    assert launches[kernels.backward] == tuned.architecture.states - 1
    assert_equal(found, reference_gradients(tuned, rows))
