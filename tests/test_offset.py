"""State offsets: what is read from a learnt tensor beside the state, at every step, however the tokens arrive.

The laws are those of the initial state, on every architecture whose mixers take offsets: with an offset alone, and with
a state and an offset.
"""

from __future__ import annotations

import pytest
import test_compile
import test_gradients
import test_law
import torch
from architectures import ARCHITECTURES, MAIN, Architecture
from conftest import tune
from reference import GatedDeltaRule, Mamba2
from test_gradients import gradients, loss_of
from test_law import left_pad, packed_arguments

TAKING = [row for row in ARCHITECTURES if issubclass(row.slow_mixer, (GatedDeltaRule, Mamba2))]
every = pytest.mark.parametrize("architecture", TAKING, ids=lambda architecture: architecture.name)
both_variants = pytest.mark.parametrize("variant", ["offset", "both"])


def hold(module, tuned, laws: dict[str, dict]) -> None:
    """Run laws of another module with one model, less what its base model cannot do."""
    for name, arguments in laws.items():
        name = name.partition(" ")[0]
        if name not in dict(tuned.architecture.lacks):
            getattr(module, f"test_{name}")(tuned, **arguments)


@every
@both_variants
@torch.no_grad()
def test_laws(architecture: Architecture, variant: str) -> None:
    laws = {
        "full_forward": {},
        "token_by_token_from_the_first_token": {},
        "one_token_without_cache": {},
        "padded_rows left": {"side": "left", "use_cache": True},
        "padded_rows right": {"side": "right", "use_cache": False},
        "pads_that_cross_a_chunk": {"split": 9},
        "decoding_after_a_padded_prompt": {},
        "static_cache_and_reset": {},
        "single_token_start_on_a_static_cache": {},
        "packed_rows": {},
        "packed_row_filled_up_with_pads": {"pads": 2},
        "several_packed_rows": {},
        "generate": {"generation": {"num_beams": 3}},
        "use_never_changes_a_state": {},
    }
    hold(test_law, tune(architecture, variant=variant), laws)


@every
def test_gradients_are_those_of_the_naive_twin(architecture: Architecture) -> None:
    laws = {
        "packed_rows": {},
        "one_token_rows": {"training": True},
    }
    hold(test_gradients, tune(architecture, variant="both"), {"equal_the_naive_twin": {}, **laws})
    hold(test_gradients, tune(architecture, variant="offset"), laws)
