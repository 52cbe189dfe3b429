"""What a mixer sees in place of its cache at the start of a sequence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class SequenceStart:
    """A view of a transformers cache with no past, but a state to start from.

    What the mixer stores goes to the real cache, if there is one.

    Args:
        cache: the real cache, or None.
        states: float32 [rows, heads, ...], what each row starts from; None for a mixer that is to start from zero.
        kept: the rows whose end the real cache keeps; None: the call's own rows, whole.
        tokens: the columns of the kept rows that are real tokens, wherever there are kept rows and a cache.
    """

    def __init__(
        self, cache: Any, states: Tensor | None, kept: slice | None = None, tokens: slice | None = None
    ) -> None:
        self.cache = cache
        self.states = states
        self.kept = kept
        self.tokens = tokens

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Any:
        """There are no tokens before the first."""
        return

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """The states to start from."""
        return self.states

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, **kwargs: Any) -> Tensor:
        """Store the convolution's input [rows, channels, tokens]; returns what the convolution is to see."""
        if self.cache is None:
            return conv_states
        if self.kept is None:
            return self.cache.update_conv_state(conv_states, layer_idx, **kwargs)
        self.cache.update_conv_state(conv_states[self.kept, :, self.tokens], layer_idx, **kwargs)
        return conv_states

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, **kwargs: Any) -> Tensor:
        """Store the final states [rows, heads, ...]."""
        if self.cache is None:
            return recurrent_states
        kept = recurrent_states if self.kept is None else recurrent_states[self.kept]
        return self.cache.update_recurrent_state(kept, layer_idx, **kwargs)

    def is_recording_past(self, layer_idx: int) -> bool:
        """Whether the real cache keeps its past to be rolled back."""
        return self.cache is not None and self.cache.is_recording_past(layer_idx)


class ScanFromZero(SequenceStart):
    """A view of a transformers cache for a mixer that scans from zero, whatever state its cache holds.

    Args:
        cache: the real cache, or None.
        continues: whether the call continues a sequence, so that the convolution sees what the cache holds.
        end: from the final states of a scan from zero [rows, heads, ...] to those that the real cache is to keep.
        kept: see `SequenceStart`.
        tokens: see `SequenceStart`.
    """

    def __init__(
        self,
        cache: Any,
        continues: bool,
        end: Callable[[Tensor], Tensor],
        kept: slice | None = None,
        tokens: slice | None = None,
    ) -> None:
        super().__init__(cache, None, kept, tokens)
        self.continues = continues
        self.end = end

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Any:
        """The tokens before this call's first, if it continues a sequence."""
        return self.cache.get_conv_state(layer_idx, state_idx=state_idx) if self.continues else None

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, **kwargs: Any) -> Tensor:
        """Store the states at the end of the call."""
        if self.cache is not None:
            self.cache.update_recurrent_state(self.end(recurrent_states), layer_idx, **kwargs)
        return recurrent_states


class Stored:
    """Stands in for a cache and keeps what a mixer stores, for `JoinedRows` to store it with other rows.

    Args:
        cache: the real cache.
    """

    def __init__(self, cache: Any) -> None:
        self.cache = cache
        self.states: dict[tuple[str, int], Tensor] = {}

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """Keep the convolution's input."""
        self.states["conv", state_idx] = conv_states
        return conv_states

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        """Keep the final states."""
        self.states["recurrent", state_idx] = recurrent_states
        return recurrent_states

    def set_linear_cache(self, layer_idx: int, states: Tensor) -> None:
        """Keep the final states of a lightning attention."""
        self.states["linear", 0] = states

    def is_recording_past(self, layer_idx: int) -> bool:
        """Whether the real cache keeps its past to be rolled back."""
        return bool(self.cache.is_recording_past(layer_idx))


class JoinedRows:
    """A view of a cache that stores some rows as they come, and in place of the others what another call made of them.

    Args:
        cache: the real cache.
        stored: what the other call stored.
        others: bool [rows], the rows to take from it.
    """

    def __init__(self, cache: Any, stored: Stored, others: Tensor) -> None:
        self.cache = cache
        self.stored = stored
        self.others = others

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, **kwargs: Any) -> Any:
        """Store the convolution's input [rows, channels, tokens]."""
        joined = join_rows(self.others, self.stored.states["conv", kwargs.get("state_idx", 0)], conv_states)
        return self.cache.update_conv_state(joined, layer_idx, **kwargs)

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, **kwargs: Any) -> Any:
        """Store the final states [rows, heads, ...]."""
        joined = join_rows(self.others, self.stored.states["recurrent", kwargs.get("state_idx", 0)], recurrent_states)
        return self.cache.update_recurrent_state(joined, layer_idx, **kwargs)

    def set_linear_cache(self, layer_idx: int, states: Tensor) -> None:
        """Store the final states of a lightning attention."""
        self.cache.set_linear_cache(layer_idx, join_rows(self.others, self.stored.states["linear", 0], states))


def join_rows(rows: Tensor, these: Tensor, others: Tensor) -> Tensor:
    """These rows of one tensor and the other rows of another; bool [rows] says which."""
    return torch.where(rows.view(-1, *[1] * (these.ndim - 1)), these, others)
