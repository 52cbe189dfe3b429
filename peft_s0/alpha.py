"""Which layer has which alpha: what `alpha_pattern` says of it, else `alpha`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from .naming import match_names, shared_name


def check_alpha(name: str, value: Any) -> None:
    """Refuse what cannot scale a state.

    Args:
        name: what the value is called, for the message.
        value: what was given.

    Raises:
        ValueError: if it is no finite number >= 0.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} must be a finite number >= 0, got {value!r}.")


def check_pattern(pattern: Any) -> None:
    """Refuse an `alpha_pattern` that could be right for no model.

    Raises:
        ValueError: if it is no dict of regular expressions and alphas; the message names the key.
    """
    if not isinstance(pattern, dict) or not all(isinstance(key, str) for key in pattern):
        raise ValueError(f"S0Config: alpha_pattern must be a dict from names of mixers to alphas, got {pattern!r}.")
    for key, alpha in pattern.items():
        try:
            flags = re.compile(key).flags
        except re.error as error:
            raise ValueError(f"S0Config: alpha_pattern has {key!r}, which is no regular expression: {error}.") from None
        if flags != re.UNICODE:
            # What is matched is a longer expression, with the key at its end.
            raise ValueError(
                f"S0Config: alpha_pattern has {key!r}, whose flags could only stand in front of a whole name's "
                "expression. Put them into a group, such as (?i:...)."
            )
        check_alpha(f"S0Config: alpha_pattern[{key!r}]", alpha)


def find_keys(pattern: Iterable[str], names: Iterable[str]) -> dict[str, str]:
    """The key that counts for each mixer: the first that matches the end of its name, as in PEFT's `LoraConfig`.

    Args:
        pattern: keys of `alpha_pattern`.
        names: names of mixers.

    Returns:
        Keys by names; mixers that no key matches are left out.
    """
    found = {name: next((key for key in pattern if _matches(key, name)), None) for name in names}
    return {name: key for name, key in found.items() if key is not None}


def fit_pattern(pattern: Mapping[str, float], names: Iterable[str]) -> dict[str, float]:
    """An `alpha_pattern` as it is kept for a model.

    Names of mixers may be those of another class of the model. Where several keys match a mixer the first counts, but a
    saved config has its keys sorted; so if that matters, they are replaced by one key for each mixer.

    Args:
        pattern: as it was given, in that order.
        names: names of the mixers that the adapter has states of.

    Returns:
        A pattern that means the same in any order.

    Raises:
        ValueError: for a key that matches none of the mixers.
    """
    names = list(names)
    unused = [key for key in pattern if not any(_matches(key, name) for name in names)]
    renamed = match_names(unused, names)
    unknown = [key for key in unused if renamed[key] not in names]
    if unknown:
        raise ValueError(
            f"S0Config: alpha_pattern has {unknown}, which match none of the {len(names)} mixers that are adapted, "
            f"'{names[0]}' and so on. A key is the end of a mixer's name, or a regular expression for it."
        )
    fitted = {layer_key(renamed[key], names) if key in renamed else key: alpha for key, alpha in pattern.items()}
    found = find_keys(fitted, names)
    if all(fitted[key] == fitted[found[name]] for name in found for key in fitted if _matches(key, name)):
        return fitted
    return {layer_key(name, names): fitted[key] for name, key in found.items()}


def layer_key(name: str, names: Iterable[str]) -> str:
    """The key of `alpha_pattern` for one mixer: what is the same in all classes of the model, if no other ends so."""
    short = shared_name(name)
    return short if [other for other in names if _matches(short, other)] == [name] else name


def _matches(key: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({key})$", name) is not None
