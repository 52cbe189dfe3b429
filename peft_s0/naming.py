"""Names of mixers across the classes of one model.

The same layer is `model.layers.0` in a text-only class, `model.language_model.layers.0` in the vision-language class
and `layers.0` in a bare backbone. From the list of layers on, all classes agree; PEFT and transformers put more in
front.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_FROM_LAYER_LIST = re.compile(r"[^.]+\.\d+\..+")


def shared_name(name: str) -> str:
    """What stands the same in all classes of a model: the name from its list of layers on; all of it without a list."""
    found = _FROM_LAYER_LIST.search(name)
    return found.group() if found else name


def match_names(found: Iterable[str], expected: Iterable[str]) -> dict[str, str]:
    """Find the names of one class of a model among those of another.

    Args:
        found: names as a file or a config has them.
        expected: names as the model has them.

    Returns:
        The model's name for each name found. A name without a partner, or whose partner is not certain because one side
        has the same layer twice, stands for itself.
    """
    found, expected = set(found), set(expected)
    if found <= expected:
        return {name: name for name in found}
    partners = {shared_name(name): name for name in expected}
    certain = len(partners) == len(expected) and len({shared_name(name) for name in found}) == len(found)
    return {name: partners.get(shared_name(name), name) if certain else name for name in found}
