"""Packed rows: several documents in one row, apart only by an index that the kernels read.

Each document must start from the initial state. In front of a mixer a packed row becomes one row for each document,
padded on the right; behind it the documents are laid end to end again. That is exact with every kernel, also on a CPU,
where base models refuse packed rows or let the state run from one document into the next.

Kernels that take the documents' boundaries and a state for each are spared the padding: the documents stay in one row,
with just so many zeros between them that the convolution in front of the recurrence keeps them apart. Not every
convolution reads boundaries, and those that do read them differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

# What collators say of a packed row. A mixer must not see any of it once the row is taken apart.
PACKING_ARGUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx", "cu_seqlens")


class Carried(NamedTuple):
    """An argument of the layer around a mixer that also carries what the model would not tell the mixer.

    Args:
        value: the argument itself.
        told: further arguments of the mixer's call by name, such as those in `PACKING_ARGUMENTS`.
    """

    value: Any
    told: dict[str, Any]


@dataclass
class Documents:
    """Where each token of a batch of packed rows goes.

    Args:
        row: long [batch * tokens], the row that each token goes to.
        column: long [batch * tokens], its place in that row.
        lengths: long [documents].
        source: the packed row of each document.
        shape: number of rows and their width.
        own: how many tokens have a place of their own; those behind them share the last one.
        boundaries: long [documents + 1], where documents begin and end, if they are all in one row.
    """

    row: Tensor
    column: Tensor
    lengths: Tensor
    source: list[int]
    shape: tuple[int, int]
    own: int
    boundaries: Tensor | None

    def unpack(self, packed: Tensor) -> Tensor:
        """[batch, tokens, ...] -> [rows, width, ...], zeros behind each document."""
        flat = packed.reshape(-1, *packed.shape[2:])
        rows = flat.new_zeros(*self.shape, *flat.shape[1:])
        return rows.index_put((self.row[: self.own], self.column[: self.own]), flat[: self.own])

    def pack(self, rows: Tensor, batch: int) -> Tensor:
        """[rows, width, ...] -> [batch, tokens, ...]."""
        flat = rows[self.row, self.column]
        return flat.reshape(batch, -1, *flat.shape[1:])

    def pads(self) -> Tensor:
        """Bool [rows, width], True where there is no token."""
        pads = torch.ones(self.shape, dtype=torch.bool, device=self.row.device)
        pads[self.row, self.column] = False
        return pads

    def end(self) -> slice:
        """The columns of the last document, in the last row."""
        stop = int(self.column[-1]) + 1
        return slice(stop - int(self.lengths[-1]), stop)


def find_documents(kwargs: dict[str, Any], hidden_states: Tensor, gap: int | None = None) -> Documents | None:
    """The documents of packed rows, from the arguments of a mixer's call.

    Collators that fill a packed row up to a round length make each pad a document of its own. Being the same, they are
    run once: documents of one token at the end of a row that all have the same hidden state share a row.

    Args:
        kwargs: the call's keyword arguments: `cu_seq_lens_q` (int [documents + 1], cumulative lengths of the one row's
            documents) or `seq_idx` (int [batch, tokens], index of each token's document in its row).
        hidden_states: [batch, tokens, features].
        gap: None gives each document a row, of two tokens at least; a number keeps all in one row, with so many zeros
            behind each.

    Returns:
        The documents, or None if the rows are not packed.

    Raises:
        ValueError: if the lengths do not add up to the row.
    """
    boundaries = _boundaries(kwargs, hidden_states)
    if boundaries is None:
        return None
    batch, tokens = hidden_states.shape[:2]
    lengths = boundaries.diff()
    order = torch.arange(batch * tokens, device=hidden_states.device)
    document = torch.searchsorted(boundaries, order, right=True) - 1
    position = order - boundaries[document]
    shared = max(_same_at_the_end(lengths, hidden_states) - 1, 0)
    count, own = lengths.shape[0] - shared, batch * tokens - shared
    lengths, document = lengths[:count], document.clamp(max=count - 1)
    source = (boundaries[:count] // tokens).tolist()
    if gap is None:
        return Documents(document, position, lengths, source, (count, max(int(lengths.max()), 2)), own, None)
    boundaries = boundaries[: count + 1] + gap * torch.arange(count + 1, device=boundaries.device)
    column = boundaries[document] + position
    return Documents(torch.zeros_like(column), column, lengths, source, (1, own + gap * count), own, boundaries)


def find_boundaries(position_ids: Tensor | None) -> dict[str, Tensor]:
    """What says that rows are packed, from their positions alone: a document begins where they do not go up by one.

    Args:
        position_ids: int [batch, tokens], or [4, batch, tokens] with those of time, height and width behind the text's.

    Returns:
        `seq_idx`, int32 [batch, tokens], and for a single row `cu_seq_lens_q`, int32 [documents + 1]; nothing if every
        row is one document.
    """
    starts = _starts(position_ids)
    if starts is None or not bool(starts[:, 1:].any()):
        return {}
    found = {"seq_idx": starts.cumsum(1, dtype=torch.int32) - 1}
    if starts.shape[0] == 1:
        first = starts[0].nonzero().flatten()
        found["cu_seq_lens_q"] = torch.cat([first, first.new_tensor([starts.shape[1]])]).int()
    return found


def refuse_boundaries(position_ids: Tensor | None) -> None:
    """Raise a RuntimeError, when a compiled model runs, if `find_boundaries` would find something.

    How many documents there are cannot be known while a model is compiled.
    """
    starts = _starts(position_ids)
    if starts is not None:
        torch._assert_async(
            ~starts[:, 1:].any(),
            "position_ids do not go up by one, so the row is packed. A compiled model cannot find the documents from "
            "positions alone: pass cu_seq_lens_q or seq_idx as well, or do not compile.",
        )


def _starts(position_ids: Tensor | None) -> Tensor | None:
    """Where documents begin, bool [batch, tokens]; None if positions say nothing of it."""
    if position_ids is not None and position_ids.ndim == 3 and position_ids.shape[0] == 4:
        position_ids = position_ids[0]
    if position_ids is None or position_ids.ndim != 2 or position_ids.shape[1] == 1:
        return None
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids.diff(dim=1) != 1
    return starts


def _boundaries(kwargs: dict[str, Any], hidden_states: Tensor) -> Tensor | None:
    """Where documents begin in the flattened batch, and its end: long [documents + 1]."""
    boundaries = kwargs.get("cu_seq_lens_q")
    if boundaries is not None:
        batch, tokens = hidden_states.shape[:2]
        boundaries = boundaries.to(device=hidden_states.device, dtype=torch.long)
        if batch != 1 or int(boundaries[-1]) != tokens:
            raise ValueError(
                f"cu_seq_lens_q describes one packed row of {int(boundaries[-1])} tokens, but the hidden states have "
                f"{batch} row(s) of {tokens}. Pass one row, with cumulative lengths that end at its length."
            )
        return boundaries
    index = kwargs.get("seq_idx")
    if index is None:
        return None
    starts = torch.ones(hidden_states.shape[:2], dtype=torch.bool, device=hidden_states.device)
    starts[:, 1:] = index[:, 1:] != index[:, :-1]
    first = starts.flatten().nonzero().flatten()
    return torch.cat([first, first.new_tensor([starts.numel()])])


def _same_at_the_end(lengths: Tensor, hidden_states: Tensor) -> int:
    """How many documents of one token with the same hidden state stand at the end of the last row."""
    longer = (lengths != 1).nonzero()
    # Not those of the row before, which may start from another adapter's state.
    single = min(lengths.shape[0] - (int(longer[-1]) + 1 if len(longer) else 0), hidden_states.shape[1])
    if single < 2:
        return single
    ends = hidden_states[-1].detach()[-single:]
    different = (ends != ends[-1]).any(dim=1).nonzero()
    return single - (int(different[-1]) + 1 if len(different) else 0)
