"""Which parameters learn once other adapters are active."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

Held = dict[str, list[dict[str, Any]]]
"""Where adapters' parameters are, by the adapters' names: the dicts of their modules, which outlive them."""


def let_learn(held: Held, names: Sequence[str]) -> None:
    """Let the parameters of some adapters learn, and no others.

    Only what changes is touched, for tasks are switched between calls.

    Args:
        held: the parameters of all adapters.
        names: the adapters that learn; without parameters here, one is passed over.
    """
    # FSDP1 has taken the parameters away.
    active = [parameters for name in names for parameters in held.get(name, ()) if parameters]
    kept = set(map(id, active))
    # Whoever is not active is frozen, also where somebody has let it learn. With many adapters in the model few do, and
    # asking is all that is done with the others.
    learning = [
        parameters
        for of_adapter in held.values()
        for parameters in of_adapter
        if "weight" in parameters and parameters["weight"].requires_grad
    ]
    for parameters in learning:
        if id(parameters) not in kept:
            parameters["weight"].requires_grad_(False)
    for parameters in active:
        parameters["weight"].requires_grad_(True)


def joined(parts: Iterable[Held]) -> Held:
    """The parameters of several layers, by adapters."""
    whole: Held = {}
    for part in parts:
        for name, parameters in part.items():
            whole.setdefault(name, []).extend(parameters)
    return whole
