"""What the paper's recipe needs of trainers (arXiv 2604.01168): the penalty on the states, the mean over examples."""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
import torch.utils.hooks
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import DistributedType
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import Trainer

    from .layer import InitialState


class OptimizerSteps:
    """Tells the penalty where the steps of an optimiser begin, and how its gradients are scaled.

    The penalty's gradient is added once for each step. In one process and under DDP, a parameter shows itself that it
    was stepped or its gradient cleared. It does not where an engine takes gradients away after each backward pass
    (FSDP, DeepSpeed), and no parameter shows that the loss was scaled (fp16). There this is needed; `S0Callback` does
    it in trainers.

    Args:
        model: the model, wrapped in whatever way.
        scaler: what the loss is scaled with, if it is.
        may_stop: whether `end` may not be called, as when a trainer is interrupted: then a step that was not announced
            is the end.

    Example:
        >>> steps = OptimizerSteps(model, scaler)
        >>> for batches in loader:
        ...     steps.begin()
        ...     for batch in batches:
        ...         scaler.scale(loss_of(batch)).backward()
        ...     scaler.step(optimizer)
    """

    def __init__(self, model: nn.Module, scaler: torch.amp.GradScaler | None = None, *, may_stop: bool = False) -> None:
        from .layer import InitialState  # which imports this module

        self.scaler, self.may_stop = scaler, may_stop
        # Weak, for they are what this is kept for: a model that is given up takes it along, also without `end`.
        self._states = WeakSet(module for module in model.modules() if isinstance(module, InitialState))
        for state in self._states:
            _announced[state] = self
        self.begin()

    def begin(self) -> None:
        """A step begins: the next backward pass is the first of those that are accumulated."""
        self.step = next(_STEPS)

    def end(self) -> None:
        """No step will be announced any more."""
        for state in self._states:
            if _announced.get(state) is self:
                del _announced[state]


# Of all that announce, so that a training that is started anew begins no step that was seen before.
_STEPS = count(1)
# Kept here and not with the states, for a copy of a model is stepped by another optimiser, if at all.
_announced: WeakKeyDictionary[InitialState, OptimizerSteps] = WeakKeyDictionary()


class L2Penalty:
    """Adds the penalty's gradient to a state's gradient, once for each optimiser step.

    Trainers take their loss from the logits or from `outputs.loss`, divide it by the number of accumulated batches, or
    ignore it, so a term in the loss has another weight in each of them. The gradient has the same weight everywhere.
    It is added in the first backward pass since the gradient was cleared, the parameter was stepped, or a step was
    announced. Gradients are clipped afterwards, loss and penalty together, as in the paper's recipe.
    """

    def __init__(self, state: InitialState) -> None:
        # Weak, for the hook lives on a parameter of the state.
        self._state = ref(state)
        self._added: tuple[int, int] | None = None

    def __call__(self, grad: Tensor) -> Tensor | None:
        """The gradient with the penalty's added, or None if it is in already.

        Raises:
            ValueError: if the penalty would not have the weight that the config says.
        """
        state = self._state()
        if state is None:
            return None
        steps = _announced.get(state)
        if steps is not None and self._begins_unannounced(state, steps):
            steps.end()
            steps = None
        # Here as well as before the forward pass, which is not seen when it is compiled.
        check_engine(state)
        weight = state.weight
        now = (weight._version, 0 if steps is None else steps.step)
        if now == self._added and (steps is not None or not _is_cleared(weight)):
            return None
        self._added = now
        gradient = penalty_gradient(state)
        if steps is not None and steps.scaler is not None:
            gradient = steps.scaler.scale(gradient)
        return grad + gradient.to(grad.dtype)

    def _begins_unannounced(self, state: InitialState, steps: OptimizerSteps) -> bool:
        """Whether a step begins that a trainer would have announced, had it not been interrupted."""
        weight = state.weight
        if not steps.may_stop or self._added is None or self._added[1] != steps.step:
            return False
        # An engine that takes gradients away, or gathers parameters, shows the same within a step.
        if state.sharded or weight._post_accumulate_grad_hooks:
            return False
        return weight.grad is None or weight._version != self._added[0]


def _is_cleared(weight: nn.Parameter) -> bool:
    # Fused optimisers step without counting up the version, and a gradient may be cleared to zeros. It is of zeros
    # otherwise only where the penalty's is, too.
    return weight.grad is None or not bool(weight.grad.any())


def penalty_gradient(state: InitialState) -> Tensor:
    """Gradient of `l2_lambda * ||S||^2` by a state's parameter, of the parameter's shape."""
    if state.rank is None:
        return 2 * state.l2_lambda * state.weight.detach()
    with torch.enable_grad(), torch.autocast(state.weight.device.type, enabled=False):
        weight = state.weight.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(state.l2_lambda * state.compose(weight).square().sum(), weight)
    return gradient


def penalize(state: InitialState) -> None:
    """Put the penalty on a state's parameter, if it is being learnt and the penalty is not there yet.

    Called whenever a module gets its parameter or goes into training mode, and also when the state is used with
    gradients: some put parameters in place of others without telling the module, and those come without their hooks.
    """
    weight = state.weight
    if state.l2_lambda == 0 or torch.compiler.is_compiling() or not weight.requires_grad:
        return
    if hasattr(weight, "full_tensor"):
        # A shard; the backward pass goes to the whole that it is gathered to.
        state.sharded = True
        return
    # Not a leaf: a replica's copy of the parameter. What is added to the parameter must not be added to each.
    if not weight.requires_grad or not weight.is_leaf:
        return
    if not any(isinstance(hook, L2Penalty) for hook in (weight._backward_hooks or {}).values()):
        weight.register_hook(torch.utils.hooks.unserializable_hook(L2Penalty(state)))


def check_engine(state: InitialState) -> None:
    """Refuse to train with a penalty that would not have the weight that the config says.

    Raises:
        ValueError: under FSDP, DeepSpeed or fp16 without `OptimizerSteps`; under FSDP1 and DeepSpeed's fp16 always.
    """
    if state.l2_lambda == 0 or torch.compiler.is_compiling() or not state.weight.requires_grad:
        return
    accelerate: Any = AcceleratorState() if is_initialized() else None
    engine = None if accelerate is None else accelerate.distributed_type
    device = state.weight.device.type
    half = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
    half = half or (accelerate is not None and accelerate.mixed_precision == "fp16")
    reason, advice = None, "Set "
    if engine == DistributedType.FSDP and getattr(accelerate.fsdp_plugin, "fsdp_version", 1) == 1:
        reason, advice = "FSDP1 flattens parameters", "Use fsdp_version: 2, or set "
    elif engine == DistributedType.DEEPSPEED and half:
        reason, advice = "DeepSpeed scales fp16 gradients by itself", "Use bf16, or set "
    elif state not in _announced:
        advice = (
            "Pass callbacks=[peft_s0.S0Callback()] to the trainer (in a loop of your own, use "
            "peft_s0.training.OptimizerSteps), or set "
        )
        if engine == DistributedType.DEEPSPEED or engine == DistributedType.FSDP or state.sharded:
            reason = "a sharded parameter does not show where an optimiser step begins"
        elif half:
            reason = "gradients are scaled in fp16"
    if reason is not None:
        raise ValueError(
            f"S0Config: the penalty of l2_lambda={state.l2_lambda} would get another weight here: {reason}. {advice}"
            "l2_lambda=0."
        )


def check_precision(state: InitialState) -> None:
    """Refuse to train a state that an engine has cast to fewer digits than a step of training needs.

    Raises:
        ValueError: under FSDP's mixed precision, and where DeepSpeed's bf16 or fp16 is enabled.
    """
    weight = state.weight
    if weight.requires_grad and weight.dtype.itemsize < 4:
        raise ValueError(
            f"S0 states are trained in float32, but this one is {weight.dtype} in the forward pass: the mixed "
            "precision of FSDP and DeepSpeed casts all parameters. Switch that off (mixed_precision: 'no', and "
            "bf16=False in the trainer's arguments) and load the base model in bfloat16 instead (dtype='bfloat16'), "
            "which stays so."
        )


def average_over_examples(trainer: Trainer) -> None:
    """Let a trainer average its loss over the examples of a step, as the paper's recipe does.

    transformers' Trainer and TRL's SFTTrainer average over all tokens of a step, so that long examples count for more.
    Without the number of tokens they take the mean of each batch, and of those the mean; a batch must hold one example.

    Args:
        trainer: a `Trainer` or `SFTTrainer` with `per_device_train_batch_size=1`, before its `train` is called.

    Raises:
        ValueError: if its batches hold more than one example, or it computes its loss in another way.

    Example:
        >>> trainer = SFTTrainer(..., args=SFTConfig(per_device_train_batch_size=1, gradient_accumulation_steps=48))
        >>> average_over_examples(trainer)
    """
    size, packing = trainer.args.per_device_train_batch_size, getattr(trainer.args, "packing", False)
    if size != 1 or packing:
        raise ValueError(
            "average_over_examples needs batches of one example: per_device_train_batch_size=1 and packing=False, "
            f"found {size} and {packing}. Set gradient_accumulation_steps to the number of examples of a step."
        )
    if trainer.compute_loss_func is not None or trainer.loss_is_scaled_for_ga is not None:
        raise ValueError(
            "average_over_examples is for the loss of transformers' Trainer and TRL's SFTTrainer, but this "
            f"{type(trainer).__name__} computes its loss in a way of its own."
        )
    trainer.model_accepts_loss_kwargs = False
