"""Threads that call one model at the same time. What S0 does in a call of a mixer, it does for one thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from architectures import ARCHITECTURES, Architecture, mixers
from test_law import left_pad
from torch import Tensor, nn
from tuned import Tuned, tune

from peft_s0.taps import Tap


def padded(tuned: Tuned) -> dict[str, object]:
    ids, mask, _ = left_pad([tuned.ids(1, n, seed=n)[0] for n in (9, 4)])
    return {"input_ids": ids, "attention_mask": mask}


def padded_otherwise(tuned: Tuned) -> dict[str, object]:
    ids, mask, _ = left_pad([tuned.ids(1, n, seed=n)[0] for n in (3, 7)])
    return {"input_ids": ids, "attention_mask": mask}


def without_pads(tuned: Tuned) -> dict[str, object]:
    return {"input_ids": tuned.ids(3, 5)}


def a_single_token(tuned: Tuned) -> dict[str, object]:
    return {"input_ids": tuned.ids(2, 1)}


@torch.no_grad()
def a_step(tuned: Tuned) -> dict[str, object]:
    cache = tuned.architecture.make_cache(tuned.model.config, 2)
    tuned.model(tuned.ids(2, 6), use_cache=True, **{tuned.architecture.cache: cache})
    return {"input_ids": tuned.ids(2, 1), "use_cache": True, tuned.architecture.cache: cache}


# The others' mixers keep their states themselves, so that even the base model serves one thread.
SHARED = [architecture for architecture in ARCHITECTURES if architecture.name != "recurrent_gemma"]


@pytest.mark.parametrize("architecture", SHARED, ids=lambda architecture: architecture.name)
def test_padded_rows_in_every_architecture(architecture: Architecture) -> None:
    check(tune(architecture), padded_otherwise)


@pytest.mark.parametrize("other", [padded, without_pads, a_single_token, a_step])
def test_calls_that_meet_in_every_mixer(tuned: Tuned, other: Callable[[Tuned], dict[str, object]]) -> None:
    check(tuned, other)


def check(tuned: Tuned, other: Callable[[Tuned], dict[str, object]]) -> None:
    """Whenever one of a mixer's projections is called, both threads are in it. They get what they get alone."""
    pair, together = [padded(tuned), other(tuned)], threading.Barrier(2)

    def meet(part: nn.Module, args: object) -> None:
        together.wait(timeout=60)

    @torch.no_grad()
    def call(arguments: dict[str, object]) -> Tensor:
        logits: Tensor = tuned.model(**arguments).logits
        return logits

    parts = [part for mixer in mixers(tuned.model) for part in mixer.children() if isinstance(part, nn.Linear)]
    handles = [part.register_forward_pre_hook(meet) for part in parts]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(call, pair))
    for handle in handles:
        handle.remove()
    assert not any(isinstance(module, Tap) for module in tuned.model.modules())
    for arguments, logits in zip((padded(tuned), other(tuned)), found, strict=True):
        assert torch.equal(logits, call(arguments))
