"""Kernels that need a GPU, and a model that is on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES
from transformers import DynamicCache
from tuned import tune

# A process without the interpreter: what a user meets who installed fla on a machine without a GPU.
WITHOUT_INTERPRETER = """
from architectures import ARCHITECTURES
from tuned import tune

tuned = tune(next(row for row in ARCHITECTURES if row.name == "qwen3_5"))
ids = tuned.ids(1, 5)
for model in (tuned.base, tuned.model):
    try:
        model(ids)
    except RuntimeError as error:
        print(error)
"""
INSTALLED = {"kimi_linear": "flash-linear-attention", "falcon_h1": "mamba-ssm"}


def test_without_the_interpreter() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    tests = Path(__file__).parents[1]
    command = [sys.executable, "-c", WITHOUT_INTERPRETER]
    done = subprocess.run(command, cwd=tests, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    of_triton, ours = done.stdout.splitlines()
    assert "0 active drivers" in of_triton
    assert "uninstall flash-linear-attention" in ours


@pytest.mark.parametrize("name", INSTALLED)
def test_only_where_a_sequence_starts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = tune(next(row for row in ARCHITECTURES if row.name == name))
    ids = tuned.ids(1, 3)
    cache = {tuned.architecture.cache: DynamicCache(config=tuned.model.config)}
    with torch.no_grad():
        tuned.model(ids, **cache)
        monkeypatch.delenv("TRITON_INTERPRET")
        tuned.model(ids[:, :1], **cache)
        with pytest.raises(RuntimeError, match=rf"on the CPU, but {INSTALLED[name]} is installed.*to a GPU.*uninstall"):
            tuned.model(ids)
