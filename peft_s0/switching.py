"""Which parameters learn once other adapters are active."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

Held = dict[str, list[nn.Module]]
"""The modules that hold the parameters of adapters, each called `weight`, by the adapters' names.

Not the parameters, nor the dicts that modules keep them in: loaders, FSDP and `torch.export` put others there.
"""


def let_learn(held: Held, names: Sequence[str]) -> None:
    """Let the parameters of some adapters learn, and no others.

    Only what changes is touched, for tasks are switched between calls.

    Args:
        held: the modules of all adapters.
        names: the adapters that learn; without modules here, one is passed over.
    """
    # By their dicts, for attributes of modules take longer. FSDP1 has taken the parameters away.
    found: list[dict[str, Any]] = [learnt._parameters for name in names for learnt in held.get(name, ())]
    active = [parameters for parameters in found if parameters]
    kept = set(map(id, active))
    # Whoever is not active is frozen, also where somebody has let it learn. With many adapters in the model few do, and
    # asking is all that is done with the others.
    everywhere: list[dict[str, Any]] = [learnt._parameters for modules in held.values() for learnt in modules]
    learning = [
        parameters for parameters in everywhere if "weight" in parameters and parameters["weight"].requires_grad
    ]
    for parameters in learning:
        if id(parameters) not in kept:
            parameters["weight"].requires_grad_(False)
    for parameters in active:
        parameters["weight"].requires_grad_(True)


def joined(parts: Iterable[Held]) -> Held:
    """The modules of several layers, by adapters."""
    whole: Held = {}
    for part in parts:
        for name, modules in part.items():
            whole.setdefault(name, []).extend(modules)
    return whole
