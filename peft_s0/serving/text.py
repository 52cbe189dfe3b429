"""The text of an answer, as its tokens come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream


class Writer:
    """Turns tokens into text piece by piece, and ends at stop strings, of which it shows nothing.

    Args:
        tokenizer: a fast tokenizer of transformers.
        stop: texts that end the answer.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._stream = DecodeStream([], skip_special_tokens=True)
        self._read = ""  # the text of all tokens, but for one that is no whole character yet
        self.text = ""
        """What has been shown."""
        self.stopped = False
        """Whether a stop string has come."""

    def add(self, token: int) -> str:
        """Add a token.

        Returns:
            What can be shown now: nothing that may be the beginning of a stop string.
        """
        self._read += self._stream.step(self._tokenizer.backend_tokenizer, token) or ""
        return self._show(final=False)

    def finish(self, tokens: Sequence[int]) -> str:
        """What was held back until now, when no more tokens come.

        Args:
            tokens: all that were added.
        """
        if self.stopped:
            return ""
        whole = self._tokenizer.decode(tokens, skip_special_tokens=True)
        if whole.startswith(self._read):
            self._read = whole
        return self._show(final=True)

    def _show(self, final: bool) -> str:
        # A stop string cannot begin in what was shown, for that would have been held back.
        found = [place for stop in self._stop if (place := self._read.find(stop, len(self.text))) >= 0]
        end = len(self._read)
        if found:
            end, self.stopped = min(found), True
        elif not final:
            longest = max(map(len, self._stop), default=1)
            for start in range(max(len(self.text), end - longest + 1), end):
                if any(stop.startswith(self._read[start:]) for stop in self._stop):
                    end = start
                    break
        piece = self._read[len(self.text) : end]
        self.text += piece
        return piece
