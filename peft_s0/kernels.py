"""Optional kernels: whether a mixer runs on them, and what must hold then."""

from __future__ import annotations

import os
import sys

import torch

_DISTRIBUTIONS = {"fla": "flash-linear-attention", "mamba_ssm": "mamba-ssm"}


# Compiled code would otherwise be compiled again once any module at all was imported since.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def in_use(module: str | None) -> bool:
    """Whether a mixer runs on optional kernels.

    transformers takes them where it can import them, and imports them together with the mixer: they are in use if they
    are there. A package that failed half-way leaves some of its modules behind, but not itself.

    Args:
        module: the module that holds them, as in "fla.ops.kda"; None: the mixer has no such kernels.
    """
    return module is not None and module in sys.modules and module.partition(".")[0] in sys.modules


def check_device(module: str | None, device: torch.device) -> None:
    """Refuse hidden states that a mixer's kernels cannot read.

    Args:
        module: see `in_use`.
        device: where the hidden states are.

    Raises:
        RuntimeError: if Triton kernels would be launched on a CPU.
    """
    if device.type != "cpu" or torch.compiler.is_compiling() or not in_use(module):
        return
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        return
    package = str(module).partition(".")[0]
    distribution = _DISTRIBUTIONS.get(package, package)
    raise RuntimeError(
        f"The model is on the CPU, but {distribution} is installed, so its recurrent layers run on Triton kernels "
        f"that need a GPU. Move the model to a GPU (model.to('cuda')), or, to run on the CPU, uninstall {distribution} "
        f"(pip uninstall {distribution}) and start Python again."
    )
