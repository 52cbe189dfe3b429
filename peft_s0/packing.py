"""Packed rows: several documents in one row, apart only by an index that the kernels read.

Each document must start from the initial state. In front of a mixer a packed row becomes one row for each document,
padded on the right; behind it the documents are laid end to end again. That is exact with every kernel, also on a CPU,
where base models refuse packed rows or let the state run from one document into the next.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# What collators say of a packed row. A mixer must not see any of it once the row is taken apart.
PACKING_ARGUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


@dataclass
class Documents:
    """Where each token of a batch of packed rows belongs.

    Args:
        document: long [batch * tokens], index of each token's document.
        position: long [batch * tokens], its place in that document.
        lengths: long [documents].
        longest: length of the longest document.
    """

    document: Tensor
    position: Tensor
    lengths: Tensor
    longest: int

    @property
    def count(self) -> int:
        """How many documents there are."""
        return self.lengths.shape[0]

    def unpack(self, packed: Tensor, width: int) -> Tensor:
        """[batch, tokens, ...] -> [documents, width, ...], zeros behind each document."""
        flat = packed.reshape(-1, *packed.shape[2:])
        rows = flat.new_zeros(self.count, width, *flat.shape[1:])
        return rows.index_put((self.document, self.position), flat)

    def pack(self, rows: Tensor, batch: int) -> Tensor:
        """[documents, width, ...] -> [batch, tokens, ...]."""
        flat = rows[self.document, self.position]
        return flat.reshape(batch, -1, *flat.shape[1:])

    def pads(self, width: int) -> Tensor:
        """Bool [documents, width], True behind each document's last token."""
        return torch.arange(width, device=self.lengths.device) >= self.lengths.unsqueeze(-1)


def find_documents(kwargs: dict[str, Any], hidden_states: Tensor) -> Documents | None:
    """The documents of packed rows, from the arguments of a mixer's call.

    Args:
        kwargs: the call's keyword arguments: `cu_seq_lens_q` (int [documents + 1], cumulative lengths of the one row's
            documents) or `seq_idx` (int [batch, tokens], index of each token's document in its row).
        hidden_states: [batch, tokens, features].

    Returns:
        The documents, or None if the rows are not packed.

    Raises:
        ValueError: if the lengths do not add up to the row.
    """
    batch, tokens = hidden_states.shape[:2]
    device = hidden_states.device
    boundaries, index = kwargs.get("cu_seq_lens_q"), kwargs.get("seq_idx")
    if boundaries is not None:
        boundaries = boundaries.to(device=device, dtype=torch.long)
        lengths = boundaries.diff()
        if batch != 1 or int(boundaries[-1]) != tokens:
            raise ValueError(
                f"cu_seq_lens_q describes one packed row of {int(boundaries[-1])} tokens, but the hidden states have "
                f"{batch} row(s) of {tokens}. Pass one row, with cumulative lengths that end at its length."
            )
    elif index is not None:
        starts = torch.ones(batch, tokens, dtype=torch.bool, device=device)
        starts[:, 1:] = index[:, 1:] != index[:, :-1]
        first = starts.flatten().nonzero().flatten()
        boundaries = torch.cat([first, first.new_tensor([batch * tokens])])
        lengths = boundaries.diff()
    else:
        return None
    order = torch.arange(batch * tokens, device=device)
    document = torch.searchsorted(boundaries, order, right=True) - 1
    return Documents(document, order - boundaries[document], lengths, int(lengths.max()))
