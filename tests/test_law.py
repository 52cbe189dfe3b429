"""The law: a token's logits depend on its own sequence, the weights and the initial states, however it arrives.

Everything is compared with the naive twin, with random non-zero states, relative to the effect of the states.
"""

from __future__ import annotations

import copy

import pytest
import torch
from architectures import ARCHITECTURES, Architecture, mixers, output_projection
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import StaticCache
from tuned import Tuned, tune

from peft_s0.mixers import cache_of


@pytest.fixture(params=ARCHITECTURES, ids=lambda architecture: architecture.name)
def architecture(request: pytest.FixtureRequest) -> Architecture:
    """The whole table, less what a base model itself cannot do."""
    law = request.node.originalname.removeprefix("test_")
    reason = dict(request.param.lacks).get(law)
    if reason is not None:
        pytest.skip(reason)
    return request.param


@pytest.fixture(autouse=True, scope="module")
def _no_grad():
    with torch.no_grad():
        yield


def left_pad(rows: list[Tensor], side: str = "left") -> tuple[Tensor, Tensor, Tensor]:
    """Rows [tokens] of different lengths -> ids, mask and positions [rows, longest]."""
    width = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, place], mask[i, place] = row, 1
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)


def in_chunks(tuned: Tuned, ids: Tensor, ends: list[int], cache=None, mask=None, positions=None) -> Tensor:
    """Logits of a sequence that reaches the model in several calls on one cache."""
    cache = tuned.architecture.make_cache(tuned.model.config, len(ids)) if cache is None else cache
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids) if positions is None else positions
    logits, start = [], 0
    for end in ends:
        call = {tuned.architecture.cache: cache, "position_ids": positions[:, start:end]}
        # Models without attention are given no mask for single steps, as in generate().
        if mask is not None and (end - start > 1 or tuned.architecture.masks_steps):
            call["attention_mask"] = mask[:, :end]
        logits.append(tuned.model(ids[:, start:end], use_cache=True, **call).logits)
        start = end
    return torch.cat(logits, dim=1)


def test_full_forward(tuned: Tuned) -> None:
    ids = tuned.ids(3, 21)
    tuned.assert_equal(tuned.model(ids, use_cache=False).logits, tuned.expected(ids), tuned.effect(ids))


def test_cache_changes_nothing(tuned: Tuned) -> None:
    ids = tuned.ids(2, 21)
    assert torch.equal(tuned.model(ids, use_cache=True).logits, tuned.model(ids, use_cache=False).logits)


def test_token_by_token_from_the_first_token(tuned: Tuned) -> None:
    ids = tuned.ids(2, 12)
    tuned.assert_equal(in_chunks(tuned, ids, list(range(1, 13))), tuned.expected(ids), tuned.effect(ids))


def test_one_token_without_cache(tuned: Tuned) -> None:
    ids = tuned.ids(2, 1)
    tuned.assert_equal(tuned.model(ids, use_cache=False).logits, tuned.expected(ids), tuned.effect(ids))


def test_every_split_into_two_chunks(tuned: Tuned) -> None:
    ids = tuned.ids(2, 19)
    expected, effect = tuned.expected(ids), tuned.effect(ids)
    for split in range(1, 19):
        tuned.assert_equal(in_chunks(tuned, ids, [split, 19]), expected, effect)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("use_cache", [False, True])
def test_padded_rows(tuned: Tuned, side: str, use_cache: bool) -> None:
    rows = [tuned.ids(1, length, seed=length)[0] for length in (20, 13, 1, 2)]
    ids, mask, positions = left_pad(rows, side)
    logits = tuned.model(ids, attention_mask=mask, position_ids=positions, use_cache=use_cache).logits
    for i, row in enumerate(rows):
        actual = logits[i : i + 1][:, mask[i].bool()]
        tuned.assert_equal(actual, tuned.expected(row[None]), tuned.effect(row[None]))


def test_many_pads(tuned: Tuned) -> None:
    rows = [tuned.ids(1, 80)[0], tuned.ids(1, 5)[0]]
    ids, mask, positions = left_pad(rows)
    logits = tuned.model(ids, attention_mask=mask, position_ids=positions).logits[1:, -5:]
    tuned.assert_equal(logits, tuned.expected(rows[1][None]), tuned.effect(rows[1][None]))


def test_many_pads_with_time_steps_clamped_from_below(tuned: Tuned) -> None:
    """The lower limit holds for real tokens and must not let the state decay at pads."""
    if not hasattr(mixers(tuned.base)[0], "time_step_limit"):
        pytest.skip("no time step to clamp")
    limit, clamped = (0.06, 0.09), 0
    for model in (tuned.base, tuned.model, tuned.slow):
        for module in model.modules():
            if hasattr(module, "time_step_limit"):
                module.time_step_limit = limit
                clamped += 1
    assert clamped == 3 * tuned.architecture.states
    row = tuned.ids(1, 6)
    ids, mask, positions = left_pad([tuned.ids(1, 36)[0], row[0]])
    logits = tuned.model(ids, attention_mask=mask, position_ids=positions).logits[1:, -6:]
    tuned.assert_equal(logits, tuned.expected(row), tuned.effect(row))
    assert {mixer.time_step_limit for mixer in mixers(tuned.model)} == {limit}


def test_bool_mask_and_no_positions(tuned: Tuned) -> None:
    rows = [tuned.ids(1, 9)[0], tuned.ids(1, 5)[0]]
    ids, mask, _ = left_pad(rows)
    logits = tuned.model(ids, attention_mask=mask.bool()).logits[1:, -5:]
    tuned.assert_equal(logits, tuned.expected(rows[1][None]), tuned.effect(rows[1][None]), tolerance=3e-5)


@pytest.mark.parametrize("split", [2, 6, 9, 11])
def test_pads_that_cross_a_chunk(tuned: Tuned, split: int) -> None:
    rows = [tuned.ids(1, 14)[0], tuned.ids(1, 6)[0]]
    ids, mask, positions = left_pad(rows)
    logits = in_chunks(tuned, ids, [split, 14], mask=mask, positions=positions)
    for i, row in enumerate(rows):
        tuned.assert_equal(logits[i : i + 1, -len(row) :], tuned.expected(row[None]), tuned.effect(row[None]))


def test_decoding_after_a_padded_prompt(tuned: Tuned) -> None:
    rows = [tuned.ids(1, 14)[0], tuned.ids(1, 6)[0]]
    ids, mask, positions = left_pad(rows)
    logits = in_chunks(tuned, ids, [9, 10, 11, 12, 13, 14], mask=mask, positions=positions)
    tuned.assert_equal(logits[1:, -6:], tuned.expected(rows[1][None]), tuned.effect(rows[1][None]))


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda architecture: architecture.name)
@given(data=st.data())
def test_any_batch_any_pads_any_chunks(architecture, data: st.DataObject) -> None:
    tuned = _tuned_once(architecture)
    lengths = data.draw(st.lists(st.integers(1, 24), min_size=1, max_size=4), label="lengths")
    rows = [tuned.ids(1, length, seed=i)[0] for i, length in enumerate(lengths)]
    ids, mask, positions = left_pad(rows)
    width = ids.shape[1]
    # One token at a time is decoding, which cannot be padded: the base model drops the mask of such calls.
    first = data.draw(st.integers(min(max(2, width - min(lengths) + 1), width), width), label="first chunk")
    every = st.just(set(range(first, width + 1)))
    cuts = data.draw(st.sets(st.integers(first, width)) if architecture.takes_chunks else every, label="cuts")
    logits = in_chunks(tuned, ids, sorted({first, width, *cuts}), mask=mask, positions=positions)
    for i, row in enumerate(rows):
        tuned.assert_equal(logits[i : i + 1, -len(row) :], tuned.expected(row[None]), tuned.effect(row[None]))


_TUNED: dict[str, Tuned] = {}


def _tuned_once(architecture) -> Tuned:
    return _TUNED.setdefault(architecture.name, tune(architecture))


def test_static_cache_and_reset(tuned: Tuned) -> None:
    cache = StaticCache(config=tuned.model.config, max_cache_len=32)
    for seed in (1, 2):
        ids = tuned.ids(2, 12, seed)
        logits = in_chunks(tuned, ids, [7, 8, 9, 12], cache=cache)
        tuned.assert_equal(logits, tuned.expected(ids), tuned.effect(ids))
        cache.reset()


def test_single_token_start_on_a_static_cache(tuned: Tuned) -> None:
    cache = StaticCache(config=tuned.model.config, max_cache_len=32)
    for seed in (1, 2):
        ids = tuned.ids(2, 5, seed)
        logits = in_chunks(tuned, ids, [1, 2, 3, 4, 5], cache=cache)
        tuned.assert_equal(logits, tuned.expected(ids), tuned.effect(ids))
        cache.reset()


def test_continued_conversation(tuned: Tuned) -> None:
    """The state enters once, however many turns follow on the same cache."""
    ids = tuned.ids(1, 10)
    first = tuned.model.generate(ids, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    turn = torch.cat([first.sequences, tuned.ids(1, 6, seed=3)], dim=1)
    cache = {tuned.architecture.cache: cache_of(first)}
    second = tuned.model.generate(turn, max_new_tokens=5, do_sample=False, **cache)
    fresh = tuned.slow.generate(turn, max_new_tokens=5, do_sample=False, use_cache=False)
    assert torch.equal(second, fresh)


def test_inputs_embeds(tuned: Tuned) -> None:
    ids = tuned.ids(2, 11)
    embeddings = tuned.model.get_input_embeddings()(ids)
    tuned.assert_equal(tuned.model(inputs_embeds=embeddings).logits, tuned.expected(ids), tuned.effect(ids))


@pytest.mark.parametrize("generation", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}, {}])
def test_generate(tuned: Tuned, generation: dict) -> None:
    ids = tuned.ids(2, 7)
    arguments = {"max_new_tokens": 8, "do_sample": False, **generation}
    actual = tuned.model.generate(ids, **arguments)
    assert torch.equal(actual, tuned.slow.generate(ids, use_cache=False, **arguments))
    assert not torch.equal(actual, tuned.base.generate(ids, **arguments))


def test_sampled_sequences_of_one_prompt(tuned: Tuned) -> None:
    """Rows that generate() repeats for num_return_sequences each start from the state."""
    ids = tuned.ids(2, 7)
    arguments = {"max_new_tokens": 6, "do_sample": True, "num_return_sequences": 3}
    torch.manual_seed(5)
    actual = tuned.model.generate(ids, **arguments)
    torch.manual_seed(5)
    assert torch.equal(actual, tuned.slow.generate(ids, use_cache=False, **arguments))


def test_greedy_generation_of_a_padded_batch_equals_each_row_alone(tuned: Tuned) -> None:
    rows = [tuned.ids(1, length, seed=length)[0] for length in (11, 4, 1)]
    ids, mask, _ = left_pad(rows)
    together = tuned.model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    for i, row in enumerate(rows):
        alone = tuned.slow.generate(row[None], max_new_tokens=8, do_sample=False, use_cache=False)[0, len(row) :]
        new = together[i, ids.shape[1] :][: len(alone)]
        assert torch.equal(new, alone)


def test_packed_rows(tuned: Tuned) -> None:
    rows = [tuned.ids(1, length, seed=length)[0] for length in (9, 1, 17, 2)]
    arguments = packed_arguments([len(row) for row in rows])
    logits = tuned.model(torch.cat(rows)[None], use_cache=False, **arguments).logits
    for row, actual in zip(rows, logits.split([len(row) for row in rows], dim=1), strict=True):
        tuned.assert_equal(actual, tuned.expected(row[None]), tuned.effect(row[None]))


def test_a_packed_row_leaves_the_cache_of_its_last_document(tuned: Tuned) -> None:
    rows = [tuned.ids(1, 9)[0], tuned.ids(1, 5, seed=1)[0]]
    arguments = packed_arguments([9, 5])
    packed = cache_of(tuned.model(torch.cat(rows)[None], use_cache=True, **arguments))
    alone = cache_of(tuned.model(rows[1][None], use_cache=True))
    # The first layer's alone: with a cache, transformers lets the attention of a packed row run across its documents,
    # and what stands behind the first attention has seen that.
    index = next(i for i, layer in enumerate(alone.layers) if hasattr(layer, "recurrent_states"))
    for name in ("recurrent_states", "conv_states"):
        actual, expected = (getattr(cache.layers[index], name)[0] for cache in (packed, alone))
        torch.testing.assert_close(actual, expected, atol=2e-6, rtol=0)


def packed_arguments(lengths: list[int]) -> dict[str, object]:
    """What TRL's collator passes with one packed row."""
    boundaries = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    return {
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
        "seq_idx": torch.cat([torch.full((length,), i) for i, length in enumerate(lengths)])[None].int(),
    }


def test_sequence_index_alone(tuned: Tuned) -> None:
    rows = [tuned.ids(1, 6)[0], tuned.ids(1, 8)[0]]
    arguments = packed_arguments([6, 8])
    arguments = {name: arguments[name] for name in ("position_ids", "seq_idx")}
    logits = tuned.model(torch.cat(rows)[None], use_cache=False, **arguments).logits
    tuned.assert_equal(logits[:, 6:], tuned.expected(rows[1][None]), tuned.effect(rows[1][None]))


@pytest.mark.parametrize("use_cache", [False, True])
def test_positions_alone(tuned: Tuned, use_cache: bool) -> None:
    """What DataCollatorWithFlattening passes: nothing says where a document ends but positions that begin again."""
    rows = [tuned.ids(1, 6)[0], tuned.ids(1, 8, seed=1)[0]]
    positions = packed_arguments([6, 8])["position_ids"]
    logits = tuned.model(torch.cat(rows)[None], position_ids=positions, use_cache=use_cache).logits
    if not use_cache:
        # With a cache transformers lets attention run across the documents, of the base model, too.
        tuned.assert_equal(logits[:, 6:], tuned.expected(rows[1][None]), tuned.effect(rows[1][None]))
    tuned.assert_equal(logits[:, :6], tuned.expected(rows[0][None]), tuned.effect(rows[0][None]))


def test_positions_that_only_start_later(tuned: Tuned) -> None:
    """One document whose positions do not begin at zero is one document."""
    ids = tuned.ids(2, 9)
    positions = torch.arange(5, 14).expand(2, -1)
    tuned.assert_equal(tuned.model(ids, position_ids=positions).logits, tuned.expected(ids), tuned.effect(ids), 3e-5)


def test_several_packed_rows(tuned: Tuned) -> None:
    rows = [tuned.ids(1, length, seed=length)[0] for length in (6, 8, 9, 5)]
    ids = torch.cat(rows).view(2, 14)
    positions = torch.cat([torch.arange(len(row)) for row in rows]).view(2, 14)
    logits = tuned.model(ids, position_ids=positions, use_cache=False).logits.view(1, 28, -1)
    for row, actual in zip(rows, logits.split([len(row) for row in rows], dim=1), strict=True):
        tuned.assert_equal(actual, tuned.expected(row[None]), tuned.effect(row[None]))


@pytest.mark.parametrize("pads", [1, 2, 7])
def test_packed_row_filled_up_with_pads(tuned: Tuned, pads: int) -> None:
    """Each pad is a document of its own then; they share one row."""
    rows = [tuned.ids(1, 6)[0], tuned.ids(1, 8, seed=1)[0], *[torch.zeros(1, dtype=torch.long)] * pads]
    lengths = [len(row) for row in rows]
    counts = []
    handles = [
        output_projection(mixer).register_forward_pre_hook(lambda module, args: counts.append(args[0].shape[0]))
        for mixer in mixers(tuned.model)
    ]
    logits = tuned.model(torch.cat(rows)[None], use_cache=False, **packed_arguments(lengths)).logits
    for handle in handles:
        handle.remove()
    assert set(counts) == {3}
    for row, actual in zip(rows, logits.split(lengths, dim=1), strict=True):
        tuned.assert_equal(actual, tuned.expected(row[None]), tuned.effect(rows[0][None]))


def test_lengths_that_do_not_add_up(tuned: Tuned) -> None:
    arguments = {**packed_arguments([6, 8]), "position_ids": None}
    with pytest.raises(ValueError, match=r"14 tokens.*of 13"):
        tuned.model(tuned.ids(1, 13), **arguments)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_zero_states_are_the_base_model_bit_for_bit(architecture, padded: bool, training: bool) -> None:
    tuned = tune(architecture, init_weights=True)
    rows = [tuned.ids(1, 13)[0], tuned.ids(1, 6)[0]] if padded else list(tuned.ids(2, 13))
    ids, mask, positions = left_pad(rows)
    for model in (tuned.base, tuned.model):
        model.train(training)
    for first in (13, 1):
        call = {"attention_mask": mask[:, :first], "position_ids": positions[:, :first]}
        assert torch.equal(tuned.model(ids[:, :first], **call).logits, tuned.base(ids[:, :first], **call).logits)


@pytest.mark.parametrize("tokens", [1, 9])
def test_disabled_adapter_is_the_base_model_bit_for_bit(tuned: Tuned, tokens: int) -> None:
    ids, mask, _ = left_pad([tuned.ids(1, tokens)[0], tuned.ids(1, max(1, tokens - 4))[0]])
    expected = tuned.base(ids, attention_mask=mask)
    with tuned.model.disable_adapter():
        actual = tuned.model(ids, attention_mask=mask)
        generated = tuned.model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    assert torch.equal(actual.logits, expected.logits)
    assert torch.equal(generated, tuned.base.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False))
    assert not torch.equal(tuned.model(ids, attention_mask=mask).logits, expected.logits)


def test_use_never_changes_a_state(tuned: Tuned) -> None:
    before = copy.deepcopy(tuned.model.state_dict())
    for ids in (tuned.ids(1, 1), tuned.ids(2, 1), tuned.ids(1, 9)):
        tuned.model.generate(ids, max_new_tokens=4, do_sample=False)
        tuned.model(ids, use_cache=False)
    after = tuned.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_alpha_of_one_and_a_batch_of_one_do_not_alias_the_parameter(architecture) -> None:
    """The case in which a state could reach a kernel uncopied."""
    tuned = tune(architecture, alpha=1.0)
    before = copy.deepcopy(tuned.model.state_dict())
    cache = tuned.architecture.make_cache(tuned.model.config, 1)
    for token in tuned.ids(1, 6)[0]:
        tuned.model(token.view(1, 1), use_cache=True, **{architecture.cache: cache})
    after = tuned.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_bf16_base_with_float32_states(tuned: Tuned) -> None:
    ids = tuned.ids(2, 20)
    effect = tuned.effect(ids)
    model = tuned.model.to(torch.bfloat16)
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if "s0_state" in n)
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    full = model(ids).logits.float()
    # bf16 has 8 bits: the error is that of the base model in bf16, far below the effect.
    tuned.assert_equal(full, tuned.expected(ids), effect, tolerance=0.1)
    ends = [1, 5, 20] if tuned.architecture.takes_chunks else list(range(1, 21))
    tuned.assert_equal(in_chunks(tuned, ids, ends).float(), full, effect, tolerance=0.05)
