"""State offsets: what is read from a learnt tensor beside the state, at every step, however the tokens arrive.

The laws are those of the initial state, on all architectures that take offsets, with an offset alone and with both.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from architectures import ARCHITECTURES, Architecture
from conftest import Tuned, tune
from reference import GatedDeltaRule, Mamba2
from test_law import (  # noqa: F401 - run here with offsets
    test_full_forward,
    test_one_token_without_cache,
    test_packed_rows,
    test_padded_rows,
    test_pads_that_cross_a_chunk,
    test_token_by_token_from_the_first_token,
)

TAKING = [row for row in ARCHITECTURES if issubclass(row.slow_mixer, (GatedDeltaRule, Mamba2))]


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(params=TAKING, ids=lambda architecture: architecture.name)
def architecture(request: pytest.FixtureRequest) -> Architecture:
    law = request.node.originalname.removeprefix("test_")
    reason = dict(request.param.lacks).get(law)
    if reason is not None:
        pytest.skip(reason)
    return request.param


@pytest.fixture(params=["offset", "both"])
def tuned(architecture: Architecture, request) -> Tuned:
    return tune(architecture, variant=request.param)
