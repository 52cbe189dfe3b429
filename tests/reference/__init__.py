"""The naive twins, one file for each recurrence."""

from .base import SlowMixer, with_slow_mixers
from .gated_delta_rule import GatedDeltaRule
from .mamba2 import Mamba2

__all__ = ["GatedDeltaRule", "Mamba2", "SlowMixer", "with_slow_mixers"]
