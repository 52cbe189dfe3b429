"""What a prompt cache of no tokens makes of mlx-lm, against transformers with the adapter and the naive recurrence."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import torch
from mlx_lm.models.cache import load_prompt_cache, make_prompt_cache, save_prompt_cache
from peft import LoraConfig, get_peft_model
from tuned import tune

from on_mlx.conftest import NAMES, ROWS, Case
from peft_s0.export.mlx import MLX_LM, SUPPORTED, write_cache

MakeCase = Callable[..., Case]


@pytest.mark.parametrize("chunks", [[12], [1] * 12, [5, 1, 6]], ids=str)
def test_logits(case: Case, tmp_path: Path, chunks: list[int]) -> None:
    """Those of the naive recurrence that starts from the states, in one piece, token by token, and in pieces."""
    file = write_cache(case.tuned.model, tmp_path / "task.safetensors", dtype="float32")
    ids = case.tuned.ids(1, 12)
    base = case.tuned.base(ids, use_cache=False).logits
    expected, effect = case.tuned.expected(ids), case.tuned.effect(ids)
    assert effect > 0.3
    error = float((case.logits(ids) - base).detach().abs().max())
    assert error < 1e-4 * effect, "the base models differ"
    cache = load_prompt_cache(str(file))
    found = torch.cat([case.logits(part, cache) for part in ids.split(chunks, dim=1)], dim=1)
    assert float((found - expected).abs().max()) < 1e-4 * effect
