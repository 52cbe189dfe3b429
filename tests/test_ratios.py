"""The job that watches what S0 costs fails where it costs more."""

from __future__ import annotations

import sys
import time
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import ratios
from overhead import METHODS, base

from peft_s0 import S0Layer


def times(*values: float) -> partial:
    return partial(next, cycle(values))


def test_a_ratio_within_its_bound_is_measured_once() -> None:
    asked = iter([1.04, 1.05, 1.06, 1.05])
    bound = ratios.Bound("decode", partial(next, asked), times(1.0), "base", 1.06)
    row = bound.judge(rounds=3, tries=3)
    assert row["held"]
    assert row["ratio"] == 1.05
    assert next(asked, None) is None


def test_noise_is_given_another_try() -> None:
    asked = iter([1.0, 1.3, 1.3, 1.0, 1.0, 1.0, 1.0, 1.0])
    row = ratios.Bound("decode", partial(next, asked), times(1.0), "base", 1.06).judge(rounds=3, tries=2)
    assert row["held"]
    assert row["ratio"] == 1.0


def test_a_slower_candidate_fails_after_all_tries() -> None:
    row = ratios.Bound("decode", times(1.1), times(1.0), "base", 1.06).judge(rounds=3, tries=2)
    assert not row["held"]
    assert row["ratio"] == 1.1


def test_a_slow_hook_fails_the_job(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """A hook on each mixer that takes two milliseconds of the processor's time, where a step takes ten or twenty."""

    def slow(model: nn.Module) -> nn.Module:
        adapted = adapt(model)
        for module in [module for module in adapted.modules() if _is_tuned(module)]:
            module.register_forward_hook(burn)
        return adapted

    def burn(*args: Any) -> None:
        end = time.process_time() + 2e-3
        while time.process_time() < end:
            pass

    adapt, bounds = METHODS["S0"], ratios.bounds
    monkeypatch.setattr(ratios, "bounds", lambda: bounds()[:1])
    monkeypatch.setitem(METHODS, "S0", slow)
    assert ratios.main(["--rounds", "4", "--tries", "2"]) == 1
    assert "above its bound: decode" in capsys.readouterr().out


def test_the_base_model_against_itself_passes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    step = partial(ratios.step, base("cpu"))
    monkeypatch.setattr(ratios, "bounds", lambda: [ratios.Bound("decode", step, step, "base", 1.06)])
    assert ratios.main(["--rounds", "4", "--tries", "8", "--json", str(tmp_path / "ratios.json")]) == 0
    assert '"held": true' in (tmp_path / "ratios.json").read_text()


def _is_tuned(module: nn.Module) -> bool:
    return any(isinstance(child, S0Layer) for child in module.children())
