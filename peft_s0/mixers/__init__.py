"""The recurrent mixers that S0 knows: one file for each recurrence, one declaration for each architecture."""

from . import gated_delta_rule, lightning_attention, mamba1, mamba2
from .base import Call, Family, Gate, Mixer, find_mixer, parameter_names, register_mixer, registered_mixers

__all__ = [
    "Call",
    "Family",
    "Gate",
    "Mixer",
    "find_mixer",
    "gated_delta_rule",
    "lightning_attention",
    "mamba1",
    "mamba2",
    "parameter_names",
    "register_mixer",
    "registered_mixers",
]
