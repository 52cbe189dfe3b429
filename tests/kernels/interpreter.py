"""Runs the Triton kernels of flash-linear-attention and mamba-ssm on a CPU, under Triton's interpreter.

A pytest plugin, loaded with `-p tests.kernels.interpreter`, because all of this must happen before anything imports a
model of transformers, which takes the kernels if it can import them. Everything that stands in for a GPU is here.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import sys
import types
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

# Triton decides where a kernel is defined whether it will be interpreted or compiled.
os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime.autotuner import Autotuner
from triton.runtime.interpreter import GridExecutor, TensorHandle

_LAUNCHES: Counter[str] = Counter()
_launch = GridExecutor.__call__


@pytest.fixture
def launches() -> Counter[str]:
    """How often each kernel was launched in this test: what shows that it was the kernels that ran."""
    _LAUNCHES.clear()
    return _LAUNCHES


def _count_and_launch(executor: GridExecutor, *args: Any, **kwargs: Any) -> Any:
    _LAUNCHES[executor.fn.__name__] += 1
    return _launch(executor, *args, **kwargs)


def _smallest_blocks(tuner: Autotuner, kwargs: dict[str, Any]) -> list[Any]:
    return [min(tuner.configs, key=lambda config: math.prod(n for n in config.kwargs.values() if isinstance(n, int)))]


def _tensor_range(*bounds: Any) -> Iterator[tl.tensor]:
    for i in range(*(int(bound) for bound in bounds)):
        yield tl.tensor(TensorHandle(np.array([i], dtype=np.int32), tl.int32), tl.int32)


def _stand_in() -> None:
    GridExecutor.__call__ = _count_and_launch
    # Tuning times every configuration of a kernel, for which it wants a GPU. They all compute the same.
    Autotuner.prune_configs = _smallest_blocks
    # mamba-ssm imports this compiled module as soon as it is imported itself; its Mamba-2 kernels do not call it.
    sys.modules["selective_scan_cuda"] = types.ModuleType("selective_scan_cuda")
    # mamba-ssm makes the GPU of its arguments the current one, and sizes some grids by its number of processors.
    torch.cuda.device = lambda index: contextlib.nullcontext()
    torch.cuda.get_device_properties = lambda device: types.SimpleNamespace(multi_processor_count=1)
    with warnings.catch_warnings():
        # fla says that there is no GPU.
        warnings.simplefilter("ignore")
        for module in ("mamba_ssm", "fla.ops.gated_delta_rule", "fla.ops.kda"):
            importlib.import_module(module)
    # This kernel calls methods of its loop index, which is a tensor when compiled but a Python int when interpreted.
    importlib.import_module("fla.ops.common.chunk_delta_h").range = _tensor_range


_stand_in()
