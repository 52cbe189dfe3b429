"""Pads that change nothing.

A base model zeroes its input at pads, which suffices as long as the state is zero: the state then has nothing to lose.
A learnt initial state still decays by its gate at every pad in front of the first token, and right pads write into the
state that the cache keeps. So at pads the state is held: no decay, no write.
"""

from __future__ import annotations

from torch import Tensor


def pads_of(attention_mask: Tensor | None, tokens: int) -> Tensor | None:
    """Where a mask says pad.

    Args:
        attention_mask: [batch, past + tokens] of any dtype, zero at pads; None or any other rank: no pads known.
        tokens: length of this call's segment.

    Returns:
        bool [batch, tokens], or None.
    """
    if attention_mask is None or attention_mask.ndim != 2:
        return None
    # To slice takes as long as to compare.
    return (attention_mask if attention_mask.shape[1] == tokens else attention_mask[:, -tokens:]) == 0


def held_positions(pads: Tensor | None, rows: Tensor | None, added: Tensor | None) -> Tensor | None:
    """Where the state must stay as it is.

    Args:
        pads: bool [batch, tokens], the batch's own pads.
        rows: bool [batch] or [1]: rows whose state is not the base model's zero. The others keep the base model's own
            arithmetic at their pads, to the last bit. None: all rows.
        added: bool [batch or 1, tokens], positions that this package appended; held in every row.

    Returns:
        bool [batch or 1, tokens], or None if there are none.
    """
    if pads is not None and rows is not None:
        pads = pads & (rows if rows.shape[0] == 1 else rows.unsqueeze(-1))
    if pads is None:
        return added
    return pads if added is None else pads | added
