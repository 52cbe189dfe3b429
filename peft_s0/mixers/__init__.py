"""The recurrent mixers that S0 knows: one file for each recurrence, one declaration for each architecture."""

from . import fla, gated_delta_rule, lightning_attention, mamba1, mamba2, mamba_ssm, mlstm, rg_lru
from .base import (
    CACHE_ARGUMENTS,
    Call,
    Courier,
    Family,
    Gate,
    Mixer,
    Readout,
    cache_argument,
    cache_of,
    find_mixer,
    parameter_names,
    register_mixer,
    registered_mixers,
)

__all__ = [
    "CACHE_ARGUMENTS",
    "Call",
    "Courier",
    "Family",
    "Gate",
    "Mixer",
    "Readout",
    "cache_argument",
    "cache_of",
    "find_mixer",
    "fla",
    "gated_delta_rule",
    "lightning_attention",
    "mamba1",
    "mamba2",
    "mamba_ssm",
    "mlstm",
    "parameter_names",
    "register_mixer",
    "registered_mixers",
    "rg_lru",
]
