from __future__ import annotations

import os
import signal

# Before any library asks: no network in tests, and no parallelism within one (pytest-xdist runs several).
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"

import hypothesis
import pytest
import torch
from architectures import MAIN, Architecture
from transformers.utils import logging
from tuned import Tuned, tune

# Where a shell starts the tests in the background they ignore Ctrl-C, and so does what they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)
logging.set_verbosity_error()
hypothesis.settings.register_profile("default", deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.load_profile("default")


@pytest.fixture(params=MAIN, ids=lambda architecture: architecture.name)
def architecture(request: pytest.FixtureRequest) -> Architecture:
    """What a test runs on; the modules that test the law run on the whole table."""
    return request.param


@pytest.fixture
def tuned(architecture: Architecture) -> Tuned:
    return tune(architecture)
