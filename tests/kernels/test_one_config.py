"""benchmarks/one_config.py knows the kernels that run, and what they are configured by."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from fla.ops.gated_delta_rule import chunk_gated_delta_rule
from fla.ops.utils import cache
from triton.runtime.autotuner import Autotuner

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from one_config import CONFIGS, write


def tuners() -> dict[str, list[Autotuner]]:
    """What flash-linear-attention tunes, by kernel; several kernels have the same name."""
    found: dict[str, list[Autotuner]] = {}
    for name, module in list(sys.modules.items()):
        for value in vars(module).values() if name.startswith("fla.") else ():
            while not isinstance(value, Autotuner) and hasattr(value, "fn"):
                value = value.fn
            if isinstance(value, Autotuner):
                found.setdefault(value.base_fn.__name__, []).append(value)
    return found


def test_all_kernels_of_a_step(launches: Counter[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    monkeypatch.setenv("FLA_CONFIG_DIR", str(tmp_path))
    monkeypatch.setattr(cache, "FLA_CACHE_MODE", cache.FlaCacheMode.DEFAULT)
    known = tuners()
    inputs = [torch.randn(1, 70, 2, 16, requires_grad=True) for _ in range(3)]
    gates = [torch.rand(1, 70, 2).requires_grad_() for _ in range(2)]
    state = torch.randn(1, 2, 16, 16, requires_grad=True)
    query, key, value = inputs
    output, _ = chunk_gated_delta_rule(
        query, key, value, g=-gates[0], beta=gates[1], initial_state=state, use_qk_l2norm_in_kernel=True
    )
    output.sum().backward()
    assert set(CONFIGS) == {name for name in launches if len(known.get(name, [])) > 0}
    for name, (sizes, warps, stages) in CONFIGS.items():
        assert any(set(tuner.configs[0].kwargs) == set(sizes) for tuner in known[name])
        config = cache.load_cached_config(name)
        assert (config["kwargs"], config["num_warps"], config["num_stages"]) == (sizes, warps, stages)
