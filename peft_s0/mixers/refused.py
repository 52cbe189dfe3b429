"""Recurrent layers that S0 cannot tune, and how to tell a recurrent model from a pure Transformer."""

from __future__ import annotations

import re

from torch import nn

# Class names of recurrent mixers follow the names of their recurrences.
_RECURRENT = re.compile(
    r"mamba|deltanet|deltaattention|linearattention|lightningattention|rwkv|rglru|lstm|shortconv|ccaprojection", re.I
)
_PARTS = re.compile(r"norm|rotary|cache|model|forcausallm|layer$|block$|config", re.I)

_ONE_TOKEN = "it starts from a given state only where it runs a single token"
_TWO_STATES = "its recurrence keeps two states that depend on each other, and one learnt state cannot stand for both"
_NO_STATE_ARGUMENT = "its forward pass hands its kernel no initial state"
_UNTESTED = "what a state does in it was never tested"

# Why a class is refused, by module and name.
_CLASSES = {
    "fla.layers.abc.ABCAttention": _TWO_STATES,
    "fla.layers.based.BasedLinearAttention": "it does not decode from a state",
    "fla.layers.cyfa.CyclicFlowAttention": _UNTESTED,
    "fla.layers.gdn2.GatedDeltaNet2": _UNTESTED,
    "fla.layers.gsa.GatedSlotAttention": _TWO_STATES,
    "fla.layers.hgrn.HGRNAttention": "its state is a vector, and what one does in it was never tested",
    "fla.layers.lightnet.LightNetAttention": _TWO_STATES,
    "fla.layers.log_linear_mamba2.LogLinearMamba2": _ONE_TOKEN,
    "fla.layers.mamba.Mamba": _ONE_TOKEN,
    "fla.layers.mamba2.Mamba2": _ONE_TOKEN,
    "fla.layers.mamba3.Mamba3": _ONE_TOKEN,
    "fla.layers.mesa_net.MesaNet": _TWO_STATES,
    "fla.layers.mom.MomAttention": "each token chooses which of several memories it writes to",
    "fla.layers.momentum_deltanet.MomentumDeltaNet": _UNTESTED,
    "fla.layers.precond_gated_deltanet.PrecondGatedDeltaNet": _TWO_STATES,
    "fla.layers.precond_kda.PrecondKDA": _TWO_STATES,
    "fla.layers.raven.Raven": _TWO_STATES,
    "fla.layers.rebased.ReBasedLinearAttention": "it does not decode from a state",
    "fla.layers.rodimus.RodimusAttention": _UNTESTED,
    "fla.layers.simple_gla.SimpleGatedLinearAttention": _UNTESTED,
    "mamba_ssm.modules.mamba2_simple.Mamba2Simple": "it cannot decode; it has learnable_init_states of its own",
    "mamba_ssm.modules.mamba3.Mamba3": _NO_STATE_ARGUMENT,
    "mamba_ssm.modules.mamba_simple.Mamba": _NO_STATE_ARGUMENT,
}

# Why any class of such a name is. The first that fits counts.
_REASONS = (
    (re.compile(r"ShortConv$"), "it is a short convolution, which remembers its last few inputs and keeps no state"),
    (re.compile(r"^ZayaCCAProjection$"), "what it carries from token to token is the last token's value, not a state"),
    (
        re.compile(r"^RwkvSelfAttention$"),
        "its state is a running mean (numerator, denominator and their scale), which no learnt matrix can stand for",
    ),
    (
        re.compile(r"^mLSTMLayer$"),
        "the kernels of the package xlstm were never tested; without it transformers has its own",
    ),
)


def refused(model: nn.Module) -> dict[str, str]:
    """Class names of modules that are known and refused, in the order in which they stand in the model, and why."""
    classes = dict.fromkeys(type(module) for module in model.modules())
    reasons = {module_class.__name__: _reason(module_class) for module_class in classes}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def _reason(module_class: type) -> str | None:
    known = _CLASSES.get(f"{module_class.__module__}.{module_class.__qualname__}")
    return known or next((reason for pattern, reason in _REASONS if pattern.search(module_class.__name__)), None)


def looks_recurrent(model: nn.Module) -> list[str]:
    """Class names of modules that look like recurrent mixers, in the order in which they stand in the model."""
    names = [type(module).__name__ for module in model.modules()]
    recurrent = [name for name in dict.fromkeys(names) if _RECURRENT.search(name)]
    return [name for name in recurrent if not _PARTS.search(name)] or recurrent
