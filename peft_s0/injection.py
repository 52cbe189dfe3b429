"""The hooks on a mixer: when a sequence starts, and what the mixer is called with then.

Every mixer asks its cache for the state to start from and hands it to whatever kernel is in use. So where a sequence
starts, the mixer is called with a small view in place of its cache, which answers with the learnt state. On a cache
that already holds a state of this layer the mixer is called untouched: decoding runs the base model's own code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from . import padding
from .layer import S0Layer
from .mixers import parameter_names
from .packing import PACKING_ARGUMENTS, find_documents

CHILD = "s0"


class SequenceStart:
    """What a mixer sees in place of its cache at the start of a sequence.

    There is no past, but a state to start from. What the mixer stores goes to the real cache, if there is one.

    Args:
        cache: the real cache, or None.
        states: float32 [rows, heads, ...], what each row starts from.
        restore: brings the mixer's output back to the rows and tokens of the call; None: they are the call's own.
        kept: the rows whose end the real cache keeps.
        tokens: how many tokens of these rows are real; None: all.
    """

    def __init__(
        self,
        cache: Any,
        states: Tensor,
        restore: Callable[[Tensor], Tensor] | None = None,
        kept: slice = slice(None),
        tokens: int | None = None,
    ) -> None:
        self.cache = cache
        self.states = states
        self.restore = restore
        self.kept = kept
        self.tokens = tokens

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> None:
        """There are no tokens before the first."""
        return

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor:
        """The states to start from."""
        return self.states

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, **kwargs: Any) -> Tensor:
        """Store the convolution's input [rows, channels, tokens]; returns what the convolution is to see."""
        if self.cache is None:
            return conv_states
        if self.restore is None:
            return self.cache.update_conv_state(conv_states, layer_idx, **kwargs)
        self.cache.update_conv_state(conv_states[self.kept, :, : self.tokens], layer_idx, **kwargs)
        return conv_states

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, **kwargs: Any) -> Tensor:
        """Store the final states [rows, heads, ...]."""
        if self.cache is None:
            return recurrent_states
        return self.cache.update_recurrent_state(recurrent_states[self.kept], layer_idx, **kwargs)

    def is_recording_past(self, layer_idx: int) -> bool:
        """Whether the real cache keeps its past to be rolled back."""
        return self.cache is not None and self.cache.is_recording_past(layer_idx)


def layer_of(mixer: nn.Module) -> S0Layer:
    """The tuner layer of a mixer that has one."""
    return cast(S0Layer, mixer.s0)


def has_layer(module: nn.Module) -> bool:
    """Whether a module is a mixer with a tuner layer."""
    return isinstance(getattr(module, CHILD, None), S0Layer)


def attach(mixer: nn.Module, layer: S0Layer) -> None:
    """Make a tuner layer the child of its mixer and hook the mixer."""
    mixer.add_module(CHILD, layer)
    layer.handles = [
        mixer.register_forward_pre_hook(_before_mixer, with_kwargs=True),
        # Always, so that a mixer that raises leaves nothing frozen behind.
        mixer.register_forward_hook(_after_mixer, with_kwargs=True, always_call=True),
        *padding.install(mixer, layer.declaration),
    ]


def detach(mixer: nn.Module) -> None:
    """Undo `attach`."""
    layer = layer_of(mixer)
    for handle in layer.handles:
        handle.remove()
    padding.uninstall(mixer, layer.declaration)
    delattr(mixer, CHILD)


def _before_mixer(mixer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    layer = layer_of(mixer)
    if not layer.participates:
        return None
    declaration = layer.declaration
    if args:
        kwargs = {**dict(zip(parameter_names(type(mixer)), args, strict=False)), **kwargs}
    cache = kwargs.get(declaration.cache_argument)
    hidden_states, mask = kwargs["hidden_states"], kwargs.get("attention_mask")
    batch, tokens = hidden_states.shape[:2]
    continues = cache is not None and cache.get_conv_state(mixer.layer_idx, state_idx=0) is not None
    pads = padding.pads_of(mask, tokens)
    if continues and pads is None:
        return None

    documents = None if continues else find_documents(kwargs, hidden_states)
    states, rows = layer.start_states(batch if documents is None else documents.count, hidden_states.device)
    if continues:
        _freeze(mixer, layer, padding.frozen_positions(pads, rows, None))
        return None

    kwargs = dict(kwargs)
    start = SequenceStart(cache, states)
    added = None
    if documents is not None:
        width = max(documents.longest, 2)
        hidden_states = documents.unpack(hidden_states, width)
        added = documents.pads(width)
        pads = None if pads is None else documents.unpack(pads, width)
        mask = None if mask is None or mask.ndim != 2 else documents.unpack(mask[:, -tokens:], width)
        for name in PACKING_ARGUMENTS:
            kwargs.pop(name, None)
        start.restore = lambda output: documents.pack(output, batch)
        # The packed row ends where its last document ends.
        start.kept, start.tokens = slice(-1, None), None if cache is None else int(documents.lengths[-1])
    elif tokens == 1 and not _stays_zero(states):
        # Single steps are made for decoding: some kernels have no backward pass, some write to the state they are
        # given, some ignore the mask. A single first token is therefore run as two tokens, the second being a pad.
        hidden_states = pad(hidden_states, (0, 0, 0, 1))
        added = torch.tensor([[False, True]], device=hidden_states.device)
        pads = None if pads is None else pad(pads, (0, 1))
        mask = None if mask is None or mask.ndim != 2 else pad(mask[:, -1:], (0, 1))
        start.restore, start.tokens = _first_token, 1
    elif tokens == 1:
        return None
    kwargs.update({"hidden_states": hidden_states, "attention_mask": mask, declaration.cache_argument: start})
    _freeze(mixer, layer, padding.frozen_positions(pads, rows, added))
    return (), kwargs


def _after_mixer(mixer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    layer = layer_of(mixer)
    start = kwargs.get(layer.declaration.cache_argument)
    if layer.freezes:
        layer.freezes = False
        padding.release(mixer, layer.declaration)
    if not isinstance(start, SequenceStart) or start.restore is None or output is None:
        return None
    return start.restore(output)


def _freeze(mixer: nn.Module, layer: S0Layer, frozen: Tensor | None) -> None:
    if frozen is None:
        return
    if not torch.compiler.is_compiling():
        layer.handles.extend(padding.install(mixer, layer.declaration))
    layer.freezes = True
    padding.freeze(mixer, layer.declaration, frozen)


def _stays_zero(states: Tensor) -> bool:
    """Whether a single first token may run the base model's own code, which is the same to the last bit then."""
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and states.requires_grad):
        return False
    return not bool(states.any())


def _first_token(output: Tensor) -> Tensor:
    return output[:, :1]
