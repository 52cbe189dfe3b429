"""Recurrent layers that S0 cannot tune, and how to tell a recurrent model from a pure Transformer."""

from __future__ import annotations

import re

from torch import nn

# Class names of recurrent mixers follow the names of their recurrences.
_RECURRENT = re.compile(
    r"mamba|deltanet|deltaattention|linearattention|lightningattention|rwkv|rglru|lstm|shortconv", re.I
)
_PARTS = re.compile(r"norm|rotary|cache|model|forcausallm|layer$|block$|config", re.I)


def looks_recurrent(model: nn.Module) -> list[str]:
    """Class names of modules that look like recurrent mixers, in the order in which they stand in the model."""
    names = [type(module).__name__ for module in model.modules()]
    recurrent = [name for name in dict.fromkeys(names) if _RECURRENT.search(name)]
    return [name for name in recurrent if not _PARTS.search(name)] or recurrent
