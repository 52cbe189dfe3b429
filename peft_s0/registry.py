"""Make `S0` a method that PEFT knows.

PEFT looks every method up in the enum `PeftType`, which is closed to code outside of PEFT: `register_peft_method` wants
a member that exists, and there are no entry points. This file adds that one member; nothing else of another package is
touched anywhere in peft_s0. A PEFT with an `S0` of its own, or with open registration, makes the file obsolete.
"""

from __future__ import annotations

import warnings

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType

from .config import S0Config
from .model import S0Model

NAME = "S0"


def _add_member(name: str) -> PeftType:
    """Add `name` to `PeftType` as a real member, the way the enum machinery itself stores members.

    Args:
        name: name and value of the member.

    Returns:
        The member; the one already there if PEFT has it.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType  # type: ignore[attr-defined]
    member._sort_order_ = len(PeftType.__members__)  # type: ignore[attr-defined]
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    # Python 3.12 and later look values up in a second table, and attributes on the class itself.
    hashable_values = getattr(PeftType, "_hashable_values_", None)
    if hashable_values is not None:
        hashable_values.append(name)
    type.__setattr__(PeftType, name, member)
    return member


def register() -> None:
    """Register S0 with PEFT; harmless when called again.

    Warns:
        UserWarning: when PEFT already has a method called S0 that is not this package's.
    """
    registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(_add_member(NAME))
    if registered is None:
        register_peft_method(name=NAME.lower(), config_cls=S0Config, model_cls=S0Model)
    elif registered is not S0Config:
        warnings.warn(
            f"PEFT already has a method '{NAME}' ({registered.__module__}.{registered.__qualname__}); peft_s0 leaves "
            "it in place and does not register its own. Use PEFT's, or uninstall peft_s0.",
            stacklevel=2,
        )
