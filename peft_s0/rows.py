"""Which adapter each row of a batch starts from, in a call with `adapter_names`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .switching import Held, joined, let_learn

if TYPE_CHECKING:
    from .layer import S0Layer

BASE = "__base__"


class Routing:
    """What all tuner layers of a model look up to know whose rows they see.

    Attributes:
        rows: the adapters of the rows while a call with `adapter_names` runs; None: all rows have the active adapters.
        layers: these layers, in the order of the model, so that switching need not search it.
        held: their parameters, by adapters; None when they are to be gathered anew.
        idle_on: while a step runs in which no mixer that is called with this cache has anything to do, that cache.
    """

    def __init__(self) -> None:
        self.rows: RowAdapters | None = None
        self.layers: list[S0Layer] = []
        self.held: Held | None = None
        self.idle_on: Any = None

    def let_learn(self, names: Sequence[str]) -> None:
        """Let these adapters' parameters learn, in all layers, and no others'."""
        if self.held is None:
            self.held = joined(layer.held for layer in self.layers)
        let_learn(self.held, names)


class RowAdapters:
    """The adapters of a call's rows. Made once for a call, read by every layer where a sequence starts.

    Args:
        names: one name for each row of the input, `"__base__"` for the base model.
        inputs: number of rows of the input, if it is known before the model runs. `generate()` may then repeat each row
            for beams and returned sequences.
        argument: what the names were passed as, for the message.

    Raises:
        ValueError: if there are more or fewer names than rows.
    """

    def __init__(self, names: Sequence[str], inputs: int | None = None, argument: str = "adapter_names") -> None:
        self.names, self.argument = tuple(names), argument
        self.different = tuple(dict.fromkeys(self.names))
        self._repeated = False
        self._of_documents: Sequence[str] = ()
        if inputs is not None:
            self.check(inputs)
            self._repeated = True

    def of(self, batch: int, documents: Sequence[int] | None = None) -> Sequence[str]:
        """The adapter of each sequence in a batch.

        Args:
            batch: number of rows that a mixer sees.
            documents: for packed rows, the row of each document.

        Returns:
            One name for each row, or for each document.

        Raises:
            ValueError: if there are more or fewer names than rows.
        """
        self.check(batch)
        repeats = batch // len(self.names)
        names = self.names if repeats == 1 else [name for name in self.names for _ in range(repeats)]
        if documents is None:
            return names
        self._of_documents = [names[row] for row in documents]
        return self._of_documents

    def in_mixer(self, batch: int) -> Sequence[str]:
        """The adapter of each sequence that a part of a mixer sees: of packed rows, of each document.

        Args:
            batch: number of sequences.

        Raises:
            ValueError: see `of`.
        """
        return self._of_documents if len(self._of_documents) == batch else self.of(batch)

    def check(self, batch: int) -> None:
        """Refuse a batch that does not have these rows.

        Raises:
            ValueError: see `of`.
        """
        repeated = self._repeated and bool(self.names) and batch % len(self.names) == 0
        if batch != len(self.names) and not repeated:
            raise ValueError(
                f"{self.argument} has {len(self.names)} entries, but the batch has {batch} rows. Pass one name for "
                "each row of the input."
            )
