"""Models that keep their states elsewhere than in the usual caches: what the law does not show of them, and limits."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, Architecture, mixers
from test_law import in_chunks, left_pad, packed_arguments
from torch import Tensor
from transformers import DynamicCache
from transformers.models.minimax.modeling_minimax import MiniMaxCache
from transformers.models.xlstm.modeling_xlstm import xLSTMCache
from tuned import Tuned, tune

from peft_s0 import S0Config

ROWS = {row.name: row for row in ARCHITECTURES}
MINIMAX, RECURRENT_GEMMA, XLSTM = (ROWS[name] for name in ("minimax", "recurrent_gemma", "xlstm"))


@pytest.fixture(autouse=True, scope="module")
def _no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("architecture", [MINIMAX, RECURRENT_GEMMA, XLSTM], ids=lambda row: row.name)
def test_generation(tuned: Tuned) -> None:
    """Greedy with the cache, and with beams without it, since none of these caches follows the beams."""
    ids = tuned.ids(2, 7)
    greedy, beams = {"max_new_tokens": 8, "do_sample": False}, {"max_new_tokens": 8, "do_sample": False, "num_beams": 3}
    actual = tuned.model.generate(ids, **greedy)
    assert torch.equal(actual, tuned.slow.generate(ids, use_cache=False, **greedy))
    assert not torch.equal(actual, tuned.base.generate(ids, **greedy))
    assert torch.equal(
        tuned.model.generate(ids, use_cache=False, **beams), tuned.slow.generate(ids, use_cache=False, **beams)
    )


def test_beams_of_minimax() -> None:
    state = torch.randn(3, 2, 4, 4)
    cache = MiniMaxCache()
    cache.set_linear_cache(0, state.clone())
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert torch.equal(cache.get_linear_cache(0), state)


def test_beams_of_recurrent_gemma() -> None:
    """The base model's beams are other ones with its cache than without."""
    base = RECURRENT_GEMMA.build()
    ids = tune(RECURRENT_GEMMA).ids(4, 9)
    beams = {"max_new_tokens": 12, "do_sample": False, "num_beams": 4}
    assert not torch.equal(base.generate(ids, **beams), base.generate(ids, use_cache=False, **beams))


def test_beams_of_xlstm() -> None:
    tuned = tune(XLSTM)
    with pytest.raises(ValueError, match="the cache cannot be reordered"):
        tuned.model.generate(tuned.ids(2, 7), max_new_tokens=3, do_sample=False, num_beams=2)


@pytest.fixture
def recurrent_first() -> Tuned:
    """A MiniMax whose first layer is recurrent."""
    values = MINIMAX.config().to_dict()
    values["layer_types"] = ["linear_attention", "full_attention", "linear_attention"]
    return tune(dataclasses.replace(MINIMAX, config=lambda: transformers.MiniMaxConfig(**values)))


def test_minimax_whose_first_layer_is_recurrent(recurrent_first: Tuned) -> None:
    """Its attention layers see a wrong mask in a later call of several tokens: that is refused. All else is right."""
    tuned = recurrent_first
    ids = tuned.ids(2, 12)
    expected, effect = tuned.expected(ids), tuned.effect(ids)
    tuned.assert_equal(tuned.model(ids).logits, expected, effect)
    tuned.assert_equal(in_chunks(tuned, ids, list(range(1, 13))), expected, effect)
    with pytest.raises(ValueError, match=r"first layer is a lightning attention cannot continue .* whole prompt"):
        in_chunks(tuned, ids, [5, 12])


def test_minimax_whose_first_layer_is_recurrent_and_a_batch_with_pads(recurrent_first: Tuned) -> None:
    """Nor do they see the pads when it is decoded: the base model's fault, pinned here, and refused with S0."""
    tuned = recurrent_first
    rows = [tuned.ids(1, length, seed=length)[0] for length in (9, 4)]
    padded, mask, positions = left_pad(rows)
    cache, alone = ({MINIMAX.cache: MiniMaxCache()} for _ in range(2))
    tuned.base(padded, attention_mask=mask, position_ids=positions, **cache)
    tuned.base(rows[1][None], **alone)
    step = {"attention_mask": torch.cat([mask, mask[:, -1:]], dim=1), "position_ids": positions[:, -1:] + 1}
    decoded = tuned.base(padded[:, -1:], **cache, **step).logits[1]
    expected = tuned.base(rows[1][None, -1:], **alone, position_ids=positions[1:, -1:] + 1).logits[0]
    assert float((decoded - expected).abs().max()) > 1e-2
    greedy = {"max_new_tokens": 4, "do_sample": False}
    with pytest.raises(ValueError, match=r"nor a batch that has pads .* use_cache=False"):
        tuned.model.generate(padded, attention_mask=mask, **greedy)
    together = tuned.model.generate(padded, attention_mask=mask, use_cache=False, **greedy)
    for row, new in zip(rows, together[:, padded.shape[1] :], strict=True):
        assert torch.equal(new, tuned.slow.generate(row[None], use_cache=False, **greedy)[0, len(row) :])
    assert tuned.model.generate(torch.stack([rows[0]] * 2), **greedy).shape == (2, 13)


def test_recurrent_gemma_goes_on_by_single_tokens_only() -> None:
    tuned = tune(RECURRENT_GEMMA)
    ids = tuned.ids(2, 9)
    tuned.assert_equal(in_chunks(tuned, ids, [4, *range(5, 10)]), tuned.expected(ids), tuned.effect(ids))
    with pytest.raises(ValueError, match=r"by 5 tokens in one call: .* one token at a time"):
        in_chunks(tuned, ids, [4, 9])
    # The base model's fault, pinned here.
    cache = {RECURRENT_GEMMA.cache: DynamicCache(config=tuned.base.config)}
    tuned.base(ids[:, :4], use_cache=True, **cache)
    later = tuned.base(ids[:, 4:], use_cache=True, **cache).logits
    assert float((later - tuned.base(ids).logits[:, 4:]).abs().max()) > 1e-2


def test_recurrent_gemma_forgets_the_last_sequence() -> None:
    """Its layers keep their states: a new sequence must not see what an earlier one of as many rows left there."""
    tuned = tune(RECURRENT_GEMMA)
    for seed in range(3):
        ids = tuned.ids(2, 5, seed)
        for ends in ([1, 2, 3, 4, 5], [5]):
            tuned.assert_equal(in_chunks(tuned, ids, ends), tuned.expected(ids), tuned.effect(ids))


@pytest.mark.parametrize("names", [None, ["default", "__base__"], ["__base__", "default"]], ids=str)
def test_recurrent_gemma_begins_a_row_while_others_go_on(names: list[str] | None) -> None:
    """The shorter row has nothing but pads in the first call, and begins in one of a single token."""
    tuned = tune(RECURRENT_GEMMA)
    rows = [tuned.ids(1, length, seed=length)[0] for length in (9, 2)]
    ids, mask, positions = left_pad(rows)
    cache, logits = tuned.architecture.make_cache(tuned.model.config, 2), []
    for start, end in [(0, 7), (7, 8), (8, 9)]:
        call = {
            "attention_mask": mask[:, :end],
            "position_ids": positions[:, start:end],
            tuned.architecture.cache: cache,
        }
        logits.append(tuned.model(ids[:, start:end], use_cache=True, adapter_names=names, **call).logits)
    together = torch.cat(logits, dim=1)
    for i, row in enumerate(rows):
        if names is None or names[i] == "default":
            actual = together[i : i + 1, -len(row) :]
            tuned.assert_equal(actual, tuned.expected(row[None]), tuned.effect(row[None]))
    if names is not None and names[0] == "__base__":
        expected = tuned.base(rows[0][None], use_cache=False).logits
        torch.testing.assert_close(together[:1], expected, atol=1e-5, rtol=0)


@torch.enable_grad()
def test_recurrent_gemma_is_copied_between_two_steps_of_training() -> None:
    """What its layers keep of a call belongs to no graph, unless somebody goes on from it."""
    tuned = tune(RECURRENT_GEMMA)
    ids = tuned.ids(2, 9)
    tuned.model(ids, labels=ids, use_cache=False).loss.backward()
    copied = copy.deepcopy(tuned.model)
    assert torch.equal(copied(ids).logits, tuned.model(ids).logits)


@pytest.mark.parametrize("lengths", [(7, 7), (11, 4), (6, 1)], ids=str)
def test_recurrent_gemma_on_a_static_cache(lengths: tuple[int, int]) -> None:
    """generate() then passes no mask, but one for each kind of layers."""
    tuned = tune(RECURRENT_GEMMA)
    rows = [tuned.ids(1, length, seed=i)[0] for i, length in enumerate(lengths)]
    ids, mask, _ = left_pad(rows)
    greedy = {"max_new_tokens": 6, "do_sample": False}
    together = tuned.model.generate(ids, attention_mask=mask, cache_implementation="static", **greedy)
    for row, new in zip(rows, together[:, ids.shape[1] :], strict=True):
        assert torch.equal(new, tuned.slow.generate(row[None], use_cache=False, **greedy)[0, len(row) :])


@pytest.mark.parametrize("side", ["left", "right"])
def test_recurrent_gemma_keeps_the_end_of_each_row(side: str) -> None:
    tuned = tune(RECURRENT_GEMMA)
    rows = [tuned.ids(1, length, seed=length)[0] for length in (11, 4)]
    ids, mask, positions = left_pad(rows, side)
    tuned.model(ids, attention_mask=mask, position_ids=positions)
    padded = [mixer.rg_lru.recurrent_states for mixer in mixers(tuned.model)]
    for i, row in enumerate(rows):
        tuned.model(row[None])
        # Further up, right pads behind a row are what the model's attention makes of them.
        for states, mixer in list(zip(padded, mixers(tuned.model), strict=True))[: 3 if side == "left" else 1]:
            torch.testing.assert_close(states[i], mixer.rg_lru.recurrent_states[0], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("lengths", [(9, 5), (5, 2), (4, 1)], ids=str)
def test_recurrent_gemma_keeps_the_end_of_a_packed_row(lengths: tuple[int, int]) -> None:
    tuned = tune(RECURRENT_GEMMA)
    rows = [tuned.ids(1, length, seed=length)[0] for length in lengths]
    tuned.model(torch.cat(rows)[None], use_cache=True, **packed_arguments(list(lengths)))
    mixer = mixers(tuned.model)[0]
    packed = mixer.rg_lru.recurrent_states, mixer.conv1d_state
    tuned.model(rows[1][None], use_cache=True)
    for actual, expected in zip(packed, (mixer.rg_lru.recurrent_states, mixer.conv1d_state), strict=True):
        if len(rows[1]) == 1:
            # A call of one token keeps the tokens before it as well, which a new sequence has as zeros.
            assert expected.shape == actual.shape
        torch.testing.assert_close(actual, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("architecture", [RECURRENT_GEMMA, XLSTM], ids=lambda row: row.name)
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_the_base_model_in_a_padded_batch(tuned: Tuned, side: str) -> None:
    """They keep its own arithmetic to the last bit, though it takes pads for tokens; rows with a state are right."""
    rows = [tuned.ids(1, length, seed=length)[0] for length in (9, 4, 4)]
    ids, mask, positions = left_pad(rows, side)
    call = {"attention_mask": mask, "position_ids": positions}
    mixed = tuned.model(ids, adapter_names=["default", "default", "__base__"], **call).logits
    assert torch.equal(mixed[2], tuned.base(ids, **call).logits[2])
    for i in (0, 1):
        actual = mixed[i : i + 1][:, mask[i].bool()]
        tuned.assert_equal(actual, tuned.expected(rows[i][None]), tuned.effect(rows[i][None]))


def states_of_xlstm(tuned: Tuned, ids: Tensor, **arguments: object) -> dict[int, tuple[Tensor, ...]]:
    cache = xLSTMCache(tuned.model.config, len(ids), dtype=torch.float32)
    tuned.model(ids, use_cache=True, **{tuned.architecture.cache: cache}, **arguments)
    return cache.rnn_state


def test_xlstm_keeps_the_end_of_a_packed_row() -> None:
    tuned = tune(XLSTM)
    rows = [tuned.ids(1, length, seed=length)[0] for length in (17, 5)]
    packed = states_of_xlstm(tuned, torch.cat(rows)[None], **packed_arguments([17, 5]))
    alone = states_of_xlstm(tuned, rows[1][None])
    for layer, expected in alone.items():
        torch.testing.assert_close(packed[layer], expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_xlstm_keeps_the_end_of_each_row(side: str) -> None:
    tuned = tune(XLSTM)
    rows = [tuned.ids(1, length, seed=length)[0] for length in (20, 6)]
    ids, mask, _ = left_pad(rows, side)
    padded = states_of_xlstm(tuned, ids, attention_mask=mask)
    for i, row in enumerate(rows):
        for layer, expected in states_of_xlstm(tuned, row[None]).items():
            for actual, part in zip(padded[layer], expected, strict=True):
                torch.testing.assert_close(actual[i], part[0], atol=2e-6, rtol=1e-5)


def test_rows_that_xlstm_runs_in_pieces() -> None:
    tuned = tune(XLSTM)
    # Not the twin's, which would begin anew with each piece.
    tuned.model.config.max_inference_chunksize = 8
    ids = tuned.ids(2, 19)
    tuned.assert_equal(tuned.model(ids).logits, tuned.expected(ids), tuned.effect(ids))
    padded, mask, _ = left_pad([ids[0], ids[1, :5]])
    for call in ({"attention_mask": mask}, {"position_ids": packed_arguments([9, 10])["position_ids"]}):
        with pytest.raises(ValueError, match=r"max_inference_chunksize=8 tokens in pieces; these have 19 tokens and"):
            tuned.model(padded, **call)
    row, short = ids[1:, :5], {"attention_mask": mask[1:, -8:]}
    tuned.assert_equal(tuned.model(padded[1:, -8:], **short).logits[:, -5:], tuned.expected(row), tuned.effect(row))


@pytest.mark.parametrize("architecture", [RECURRENT_GEMMA, XLSTM], ids=lambda row: row.name)
def test_pads_where_only_some_layers_are_tuned(architecture: Architecture) -> None:
    """The others take pads for tokens. Behind a row that does not matter, in front of it that is refused; also where
    another adapter has tuned them."""
    tuned = tune(architecture, layers_to_transform=[0])
    tuned.model.add_adapter("second", S0Config(layers_to_transform=[1], alpha=0.7, init_weights=1.0))
    rows = [tuned.ids(1, length, seed=length)[0] for length in (9, 4)]
    ids, mask, positions = left_pad(rows, "right")
    logits = tuned.model(ids, attention_mask=mask, position_ids=positions).logits
    for i, row in enumerate(rows):
        actual = logits[i : i + 1, : len(row)]
        tuned.assert_equal(actual, tuned.expected(row[None]), tuned.effect(row[None]))
    ids, mask, positions = left_pad(rows)
    with pytest.raises(ValueError, match=r"pads in front of a row.* here 1 of \d; .* rows of the same length"):
        tuned.model(ids, attention_mask=mask, position_ids=positions)
