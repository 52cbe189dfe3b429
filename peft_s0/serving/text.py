"""The text of an answer, as its tokens come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Writer:
    """Turns tokens into text piece by piece, and ends at stop strings, of which it shows nothing.

    The text is what follows the prompt's: many tokenizers write a token's space only where something stands before it.

    Args:
        tokenizer: a fast tokenizer of transformers.
        stop: texts that end the answer.
        prompt: the tokens before.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), prompt: Sequence[int] = ()) -> None:
        self._tokenizer, self._stop = tokenizer.backend_tokenizer, tuple(stop)
        self._read = ""  # the text of all tokens, but for one that is no whole character yet
        # Tokens that were read last, how many characters they have, and those that came since.
        self._before, self._new = self._end_of(list(prompt)), list[int]()
        self._known = len(self._decode(self._before))
        self.text = ""
        """What has been shown."""
        self.stopped = False
        """Whether a stop string has come."""

    def add(self, token: int) -> str:
        """Add a token.

        Returns:
            What can be shown now: nothing that may be the beginning of a stop string.
        """
        self._new.append(token)
        text = self._decode(self._before + self._new)
        if len(text) > self._known and not text.endswith("\ufffd"):
            self._read += text[self._known :]
            self._before, self._new = self._new, []
            self._known = len(self._decode(self._before))
        return self._show(final=False)

    def finish(self) -> str:
        """What was held back until now, when no more tokens come."""
        if self.stopped:
            return ""
        self._read += self._decode(self._before + self._new)[self._known :]
        return self._show(final=True)

    def _end_of(self, prompt: list[int]) -> list[int]:
        """A few tokens that stand for all, unless they begin within a character."""
        few = 8
        while few < len(prompt) and self._decode(prompt[-few:]).startswith("\ufffd"):
            few *= 2
        return prompt[-few:]

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text

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
