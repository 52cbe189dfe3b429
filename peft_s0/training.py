"""The penalty on the states: lambda * sum over layers of ||S||^2 (arXiv 2604.01168, training objective)."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch
import torch.utils.hooks
from torch import Tensor

if TYPE_CHECKING:
    from .layer import InitialState


class L2Penalty:
    """Adds the penalty's gradient to a state's gradient, once for each optimiser step.

    Trainers take their loss from the logits or from `outputs.loss`, divide it by the number of accumulated batches, or
    ignore it, so a term in the loss has another weight in each of them. The gradient has the same weight everywhere.
    It is added in the first backward pass since the gradient was cleared or the parameter was stepped.
    """

    def __init__(self, state: InitialState) -> None:
        # Weak, for the hook lives on a parameter of the state.
        self._state = weakref.ref(state)
        self._version: int | None = None

    def __call__(self, grad: Tensor) -> Tensor | None:
        """The gradient with the penalty's added, or None if it is in already."""
        state = self._state()
        if state is None:
            return None
        weight = state.weight
        if weight.grad is not None and weight._version == self._version:
            return None
        self._version = weight._version
        return grad + penalty_gradient(state).to(grad.dtype)


def penalty_gradient(state: InitialState) -> Tensor:
    """Gradient of `l2_lambda * ||S||^2` by a state's parameter, of the parameter's shape."""
    if state.rank is None:
        return 2 * state.l2_lambda * state.weight.detach()
    with torch.enable_grad():
        weight = state.weight.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(state.l2_lambda * state.compose(weight).square().sum(), weight)
    return gradient


def penalize(state: InitialState) -> None:
    """Put the penalty on a state's parameter, if it is being learnt and the penalty is not there yet.

    Called whenever a module gets its parameter, and also when the state is used with gradients: some put parameters in
    place of others without telling the module, and those come without their hooks.
    """
    weight = state.weight
    if state.l2_lambda == 0 or torch.compiler.is_compiling() or not weight.requires_grad:
        return
    if not any(isinstance(hook, L2Penalty) for hook in (weight._backward_hooks or {}).values()):
        weight.register_hook(torch.utils.hooks.unserializable_hook(L2Penalty(state)))
