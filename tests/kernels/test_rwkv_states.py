"""RWKV's files of tuned states in fla's RWKV models, whose kernels run interpreted."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from test_fla_models import CASES, Case, ids_of, relative
from torch import Tensor, nn

from peft_s0 import S0Config
from peft_s0.convert import export_rwkv, export_s0_tuning, import_rwkv

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:fla"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


@pytest.fixture(params=["RWKV7Attention", "RWKV6Attention"])
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@functools.cache
def build(case: Case) -> Any:
    return case.build()


def sizes(case: Case) -> tuple[int, int, int]:
    """Heads, key dimension and value dimension: of RWKV-6 the key is half as wide as the value."""
    layer = next(module for module in build(case).modules() if type(module) is case.layer)
    return layer.num_heads, getattr(layer, "head_k_dim", layer.head_dim), layer.head_v_dim


def time_states(case: Case, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """What a file holds: rows are values, columns are keys."""
    heads, keys, values = sizes(case)
    generator = torch.Generator().manual_seed(3)
    states = (torch.randn(heads, values, keys, generator=generator).to(dtype) for _ in range(2))
    return {f"blocks.{i}.att.time_state": state for i, state in enumerate(states)}


@torch.no_grad()
def test_rows_are_values_and_columns_are_keys(case: Case, tmp_path: Path) -> None:
    """The first token's output in RWKV's own notation: S_0 is read by r, after decay and removal from the right."""
    states = time_states(case)
    torch.save(states, tmp_path / "state.pth")
    import_rwkv(tmp_path / "state.pth", tmp_path / "adapter", build(case))
    model = PeftModel.from_pretrained(case.build(), tmp_path / "adapter")
    for index, layer in enumerate(layer for layer in model.modules() if type(layer) is case.layer):
        hidden = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(index))
        # fla's value-first layers keep [heads, value, key]; the naive twin takes what fla's RWKV layers keep.
        state = torch.einsum("hvk->hkv", states[f"blocks.{index}.att.time_state"].double())
        twin = next(m for i, m in enumerate(m for m in build(case).modules() if type(m) is case.layer) if i == index)
        first = {} if index == 0 or case.model == "RWKV6" else {"v_first": torch.randn(2, 5, 32)}
        if first:
            continue  # later layers of RWKV-7 mix in the first one's values, which the twin does not
        twin = _double(twin)
        expected = case.naive(twin, hidden.double(), state.expand(2, *state.shape))
        nothing = case.naive(twin, hidden.double(), torch.zeros(2, *state.shape).double())
        effect = (expected - nothing).abs().max()
        assert effect > 0.1
        assert relative(layer(hidden_states=hidden)[0], expected, effect) < 1e-5
