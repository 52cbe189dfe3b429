"""States stay float32, also where a trainer casts every parameter that it trains.

On a base model quantised by bitsandbytes, TRL's trainers write `parameter.data = parameter.data.to(torch.bfloat16)`.
Steps of training are smaller than what bfloat16 can tell apart. Cast back later, a state would have lost its last bits,
and no moment is right for it: an optimiser, and what wraps a model for several processes, count on the dtype they saw.
So the assignment itself leaves the dtype as it is.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

_DATA: Any = Tensor.data


class Float32Parameter(nn.Parameter):
    """A parameter that stays float32 when its `data` is replaced by another floating-point dtype."""

    @property
    def data(self) -> Tensor:
        """The values, without their history."""
        return _DATA.__get__(self)

    @data.setter
    def data(self, value: Tensor) -> None:
        own = self.data
        if value.is_floating_point() and value.dtype != own.dtype:
            # A cast of the values that are there takes nothing away from them.
            same = not own.is_meta and value.shape == own.shape and bool((own.to(value) == value).all())
            value = own.to(value.device) if same else value.to(own.dtype)
        _DATA.__set__(self, value)


def casts_parameters(model: nn.Module) -> bool:
    """Whether trainers cast what they train on this model: they ask for the same attributes."""
    return bool(getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False))


def keep_float32(parameter: nn.Parameter) -> None:
    """Make a parameter one that stays float32. Subclasses of Parameter, such as those of FSDP, are left alone."""
    if type(parameter) is nn.Parameter:
        # As torch does it when a lazy parameter gets its shape.
        parameter.__class__ = Float32Parameter
