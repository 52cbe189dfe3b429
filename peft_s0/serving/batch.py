"""Rows of different lengths and ages that decode together in one cache.

Prompts are padded on the left and run once. What they leave in the cache is put beside the rows that are there: keys
and values behind a gap that the attention mask covers, convolution and recurrent states as they are. So rows join and
leave between any two steps, and no row sees another, nor a pad.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.cache_utils import (
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)

from ..mixers import cache_argument, cache_of, parameter_names

Run = Callable[..., Any]
"""Runs the model: `run(tasks, starts, **inputs)`, with the task of each row and whether sequences start here."""

# What is known of how these grow and what their rows are; others keep windows or more than keys and values.
_LAYERS = (DynamicLayer, LinearAttentionLayer, LinearAttentionAndFullAttentionLayer, DummyLayer)


class Batch:
    """The rows that a model decodes.

    Args:
        model: a causal language model of transformers, for its signature, its device and its vocabulary.
        run: what calls it.
    """

    def __init__(self, model: nn.Module, run: Run) -> None:
        self._run = run
        parameters = parameter_names(type(model))
        self._takes_positions = "position_ids" in parameters
        self._keeps = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        # A model that takes no cache gives none back, which `join` refuses.
        self._cache_argument = cache_argument(type(model)) or "cache"
        self.device = next(weight.device for weight in model.parameters() if not weight.is_meta)
        self._cache: Any = None
        # Bool [rows, columns]: which columns of keys and values are a row's own. They are its last ones.
        self._seen = torch.zeros(0, 0, dtype=torch.bool, device=self.device)
        self._tasks: list[str] = []

    def __len__(self) -> int:
        return len(self._tasks)

    @property
    def columns(self) -> int:
        """Number of tokens that the cache has room for in each row: those of the longest one."""
        return self._seen.shape[1]

    def join(self, prompts: Sequence[Sequence[int]], tasks: Sequence[str]) -> Tensor:
        """Run prompts and let them decode with the others from now on, as the last rows.

        If the prompts fail, nothing is changed. If there is no memory to put them beside the others, all rows are lost.

        Args:
            prompts: token ids of each, at least one.
            tasks: the task of each.

        Returns:
            The logits of each prompt's next token, [prompts, vocabulary].

        Raises:
            ValueError: if the model's cache is of a kind that rows cannot be put into.
        """
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=self.device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        seen = torch.arange(longest, device=self.device) >= longest - lengths[:, None]
        output = self._run(list(tasks), True, **self._inputs(ids, seen, seen.long()), use_cache=True)
        cache: Any = cache_of(output)
        kinds = {type(layer).__name__ for layer in getattr(cache, "layers", ()) if type(layer) not in _LAYERS}
        if type(cache) is not DynamicCache or kinds:
            kind = ", ".join([type(cache).__name__, *sorted(kinds)])
            raise ValueError(
                f"The cache of this model ({kind}) is of a kind into which rows cannot be put while others decode."
            )
        if self._cache is None:
            self._cache, self._seen = cache, seen
        else:
            columns = max(self.columns, longest)
            try:
                for layer, new in zip(self._cache.layers, cache.layers, strict=True):
                    _put_beside(layer, new)
                self._seen = torch.cat([_widen(rows, columns) for rows in (self._seen, seen)])
            except Exception:
                # Some layers have the new rows, and some do not.
                self.keep([])
                raise
        self._tasks += tasks
        return output.logits[:, -1]

    def step(self, tokens: Tensor) -> Tensor:
        """Run one more token of each row.

        Args:
            tokens: int64 [rows].

        Returns:
            The logits of each row's next token, [rows, vocabulary].
        """
        self._seen = pad(self._seen, (0, 1), value=True)
        inputs = self._inputs(tokens[:, None], self._seen, self._seen[:, -1:].long())
        if not any(isinstance(layer, DynamicLayer) for layer in self._cache.layers):
            # Recurrent layers have no use for it, and some would take it for one of this token.
            del inputs["attention_mask"]
        output = self._run(list(self._tasks), False, **inputs, use_cache=True, **{self._cache_argument: self._cache})
        return output.logits[:, -1]

    def keep(self, rows: Sequence[int]) -> None:
        """Let all other rows leave, and the columns that no row needs any more.

        Args:
            rows: which stay, in this order.
        """
        if not rows:
            self._cache, self._tasks, self._seen = None, [], self._seen[:0, :0]
            return
        index = torch.tensor(rows, device=self.device)
        self._cache.reorder_cache(index)
        self._tasks = [self._tasks[row] for row in rows]
        self._seen = self._seen[index]
        columns = int(self._seen.sum(1).max())
        for layer in self._cache.layers:
            if isinstance(layer, DynamicLayer) and layer.is_initialized and columns < self.columns:
                for name in ("keys", "values"):
                    # A copy, since a view would hold the memory of all columns.
                    setattr(layer, name, getattr(layer, name)[..., -columns:, :].clone())
        self._seen = self._seen[:, -columns:]

    def _inputs(self, ids: Tensor, seen: Tensor, new: Tensor) -> dict[str, Any]:
        """What a model is called with: the mask of all columns, and where the new tokens stand in their rows."""
        inputs = {"input_ids": ids, "attention_mask": seen.long(), **self._keeps}
        if self._takes_positions:
            before = seen[:, : seen.shape[1] - new.shape[1]].sum(1, keepdim=True)
            # Pads stand where the first token does; nothing looks at them.
            inputs["position_ids"] = (before + new.cumsum(1) - 1).clamp(min=0)
        return inputs


def _put_beside(layer: Any, new: Any) -> None:
    """Put a layer's cache of new rows below that of the rows which are there."""
    if isinstance(layer, DynamicLayer) and layer.is_initialized:
        columns = max(layer.get_seq_length(), new.get_seq_length())
        for name in ("keys", "values"):
            rows = [_widen(getattr(part, name), columns, dimension=-2) for part in (layer, new)]
            setattr(layer, name, torch.cat(rows))
    if isinstance(layer, LinearAttentionLayer):
        for states, others in (
            (layer.conv_states, new.conv_states),
            (layer.recurrent_states, new.recurrent_states),
        ):
            for index, state in states.items():
                if state is not None:
                    states[index] = torch.cat([state, others[index]])


def _widen(tensor: Tensor, columns: int, dimension: int = -1) -> Tensor:
    """Zeros in front, up to a number of columns."""
    missing = columns - tensor.shape[dimension]
    behind = (0, 0) * (-dimension - 1)
    return pad(tensor, (*behind, missing, 0)) if missing else tensor
