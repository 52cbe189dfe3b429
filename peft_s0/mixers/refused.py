"""Recurrent layers that S0 cannot tune, and how to tell a recurrent model from a pure Transformer."""

from __future__ import annotations

import re

from torch import nn

# Class names of recurrent mixers follow the names of their recurrences.
_RECURRENT = re.compile(
    r"mamba|deltanet|deltaattention|linearattention|lightningattention|rwkv|rglru|lstm|shortconv|ccaprojection", re.I
)
_PARTS = re.compile(r"norm|rotary|cache|model|forcausallm|layer$|block$|config", re.I)

# Why a class is refused. The first that fits counts.
_REASONS = (
    (re.compile(r"ShortConv$"), "it is a short convolution, which remembers its last few inputs and keeps no state"),
    (re.compile(r"^ZayaCCAProjection$"), "what it carries from token to token is the last token's value, not a state"),
    (
        re.compile(r"^RwkvSelfAttention$"),
        "its state is a running mean (numerator, denominator and their scale), which no learnt matrix can stand for",
    ),
    (
        re.compile(r"^RecurrentGemmaRglru$"),
        "it keeps its state in itself, not in a cache, and clears it where a position is 0",
    ),
    (
        re.compile(r"^(xLSTMLayer|mLSTMLayer)$"),
        "its cache does not tell the start of a sequence from a sequence that goes on, and its model ignores pads",
    ),
)


def refused(model: nn.Module) -> dict[str, str]:
    """Class names of modules that are known and refused, in the order in which they stand in the model, and why."""
    names = dict.fromkeys(type(module).__name__ for module in model.modules())
    reasons = {name: [reason for pattern, reason in _REASONS if pattern.search(name)] for name in names}
    return {name: found[0] for name, found in reasons.items() if found}


def looks_recurrent(model: nn.Module) -> list[str]:
    """Class names of modules that look like recurrent mixers, in the order in which they stand in the model."""
    names = [type(module).__name__ for module in model.modules()]
    recurrent = [name for name in dict.fromkeys(names) if _RECURRENT.search(name)]
    return [name for name in recurrent if not _PARTS.search(name)] or recurrent
