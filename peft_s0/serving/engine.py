"""Requests for many tasks, answered together by one model: a queue, a thread, and a batch that rows join and leave."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import TopPLogitsWarper

from ..bank import StateBank, UnknownTaskError
from ..rows import BASE
from .batch import Batch
from .text import Writer

Listener = Callable[[str], None]
# Below this temperature nothing but the likeliest token is drawn, and logits divided by it may be infinite.
_COLD = 1e-5


class TooLongError(ValueError):
    """A request for more tokens than a row may have."""


class BusyError(RuntimeError):
    """A request that came when the queue was full."""


class ClosedError(RuntimeError):
    """A request that an engine which was closed has not answered."""


@dataclass(frozen=True)
class Request:
    """What to answer, and how.

    Args:
        prompt: token ids, special tokens included.
        task: a task of the bank, or `"__base__"` for the base model.
        max_tokens: how many tokens the answer may have, its end included.
        temperature: 0: the likeliest token each time, as below 1e-5; else tokens are drawn.
        top_p: draw from the likeliest tokens that have this much probability together.
        seed: where drawing starts. The draws of a request do not depend on what runs beside it; its probabilities
            do not but for rounding. None: each time another.
        stop: texts that end the answer.

    Raises:
        TypeError: for a text where token ids or a list of texts is expected.
        ValueError: for values out of range.
    """

    prompt: Sequence[int]
    task: str = BASE
    max_tokens: int = 16
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = ()

    def __post_init__(self) -> None:
        if isinstance(self.prompt, str):
            raise TypeError(f"prompt must be token ids, as of tokenizer(text)['input_ids'], got {self.prompt!r}.")
        if isinstance(self.stop, str):
            raise TypeError(f"stop must be a list of texts, got {self.stop!r}; pass [{self.stop!r}].")
        if not self.prompt:
            raise ValueError("The prompt has no token.")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}.")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be a finite number >= 0, got {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}.")
        if not all(self.stop):
            raise ValueError("A stop text is empty.")


@dataclass(frozen=True)
class Completion:
    """An answer.

    Args:
        text: without special tokens and the stop string.
        tokens: all that the model chose, the end of the sequence included.
        reason: "stop": the model ended it, or a stop text; "length": it has `max_tokens`.
    """

    text: str
    tokens: list[int]
    reason: Literal["stop", "length"]


@dataclass
class _Row:
    """A request that waits or decodes."""

    request: Request
    future: Future[Completion]
    listener: Listener | None
    writer: Writer
    generator: torch.Generator | None
    tokens: list[int] = field(default_factory=list)
    settled: bool = False  # whether the future was given what it gets


class Engine:
    """Answers requests for the tasks of a bank, up to `rows` at a time, each row with its own task.

    Requests wait in a queue, first come first served. A thread runs the prompts of those for which there is room, each
    from the state of its task, and lets them decode with all others; an answer that is done makes room at once. Only
    prompts need slots of the bank: states enter at a sequence's start, so a batch may decode more tasks than the bank
    holds. An answer depends on its own request alone, to rounding.

    When an engine is made, it compares rows of different lengths in a batch with the same rows alone.

    Memory is bounded: by `rows` times `max_length` tokens in the cache, by the `queue`, by the bank's slots.

    Args:
        bank: the model and its tasks. Other threads may use it meanwhile, and add and remove tasks.
        tokenizer: a fast tokenizer of transformers.
        rows: how many requests run at a time.
        queue: how many wait; further ones are refused.
        max_length: tokens of a prompt and its answer together. None: what the model's config says.
        prefill_tokens: how many tokens of prompts, pads included, run at once; a longer prompt runs alone.

    Raises:
        TypeError: for a tokenizer of another kind.
        ValueError: for sizes below 1, a config that gives no length, and a model whose rows change when they run
            beside others, such as longer ones, or whose cache cannot be put together from rows.

    Example:
        >>> with Engine(bank, tokenizer) as engine:
        ...     future = engine.submit(Request(tokenizer("def f(x):")["input_ids"], task="sql"))
        ...     print(future.result().text)
    """

    def __init__(
        self,
        bank: StateBank,
        tokenizer: Any,
        rows: int = 32,
        queue: int = 256,
        max_length: int | None = None,
        prefill_tokens: int = 4096,
    ) -> None:
        if not hasattr(tokenizer, "backend_tokenizer"):
            raise TypeError(f"Engine needs a fast tokenizer of transformers, got {type(tokenizer).__name__}.")
        model: Any = bank.model.get_base_model()
        if max_length is None:
            max_length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
            if max_length is None:
                raise ValueError("The model's config has no max_position_embeddings; pass max_length.")
        sizes = {"rows": rows, "queue": queue, "max_length": max_length, "prefill_tokens": prefill_tokens}
        for name, size in sizes.items():
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"Engine: {name} must be an integer >= 1, got {size!r}.")
        fixed = _fixed_length(model)
        if max_length > fixed:
            raise ValueError(
                f"The rotary embedding of {type(model).__name__} changes for all rows of a batch when one of them has "
                f"more than {fixed} tokens, and max_length is {max_length}. Pass max_length={fixed}."
            )
        self.bank, self.tokenizer, self.max_length = bank, tokenizer, max_length
        self.rows, self.queue, self.prefill_tokens = rows, queue, prefill_tokens
        self._vocabulary = model.get_input_embeddings().weight.shape[0]
        ends = model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        self._ends = {end for end in (*ends, tokenizer.eos_token_id) if end is not None}
        self._model = model
        self._check()
        self._batch = Batch(model, self.run)
        self._running: list[_Row] = []
        # What waits, and whether to go on, changes under this lock; all else is the thread's own.
        self._changed = threading.Condition()
        self._waiting: deque[_Row] = deque()
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="peft-s0 engine", daemon=True)
        self._thread.start()

    def run(self, tasks: Sequence[str], starts: bool, **inputs: Any) -> Any:
        """Call the model.

        Args:
            tasks: the task of each row.
            starts: whether these are prompts. What follows them does not ask which task it is.
            inputs: the model's own arguments.
        """
        with self.bank.use(list(tasks) if starts else [BASE] * len(tasks)):
            return self.bank.model(**inputs)

    def check(self, request: Request) -> None:
        """Refuse what `submit` would refuse.

        Raises:
            UnknownTaskError: if the bank has no such task.
            TooLongError: if prompt and answer have more than `max_length` tokens.
            ValueError: for tokens that the model does not have.
        """
        if request.task != BASE and request.task not in self.bank:
            raise UnknownTaskError(f"There is no task {request.task!r}.")
        length = len(request.prompt) + request.max_tokens
        if length > self.max_length:
            raise TooLongError(
                f"The prompt has {len(request.prompt)} tokens and the answer may have {request.max_tokens}, together "
                f"{length}; a row has at most {self.max_length}."
            )
        wrong = [token for token in request.prompt if not 0 <= token < self._vocabulary]
        if wrong:
            raise ValueError(f"Tokens {wrong[:5]} are outside of the vocabulary of {self._vocabulary}.")

    def submit(self, request: Request, listener: Listener | None = None) -> Future[Completion]:
        """Ask for an answer.

        Args:
            request: see `Request`.
            listener: is given each piece of text when it is there, by the engine's thread, which waits for it. If it
                raises, the request ends with that exception.

        Returns:
            The answer to come. Cancelling it, which is possible until it is done, gives its row to others.

        Raises:
            UnknownTaskError: see `check`.
            TooLongError: see `check`.
            ValueError: see `check`.
            BusyError: if the queue is full.
            ClosedError: if the engine was closed.
        """
        self.check(request)
        generator = None
        if request.temperature >= _COLD:
            generator = torch.Generator(self._batch.device)
            if request.seed is None:
                generator.seed()
            else:
                generator.manual_seed(request.seed)
        writer = Writer(self.tokenizer, request.stop, request.prompt)
        row = _Row(request, Future(), listener, writer, generator)
        with self._changed:
            if self._closed:
                raise ClosedError("The engine is closed.")
            if len(self._waiting) >= self.queue:
                self._forget_cancelled()
            if len(self._waiting) >= self.queue:
                raise BusyError(f"{self.queue} requests are waiting already; try again later.")
            self._waiting.append(row)
            self._changed.notify_all()
        return row.future

    @property
    def load(self) -> dict[str, int]:
        """How many requests run and wait."""
        return {"running": len(self._running), "waiting": len(self._waiting)}

    @property
    def alive(self) -> bool:
        """Whether requests are answered."""
        return self._thread.is_alive() and not self._closed

    def close(self) -> None:
        """Answer no more: what runs and waits ends with `ClosedError`."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @torch.inference_mode()
    def _check(self) -> None:
        """Compare the base model's rows in a batch, which start together or join, with the same rows alone.

        Raises:
            ValueError: if they differ.
        """
        prompts = [[(7 * place + 3) % self._vocabulary for place in range(length)] for length in (2, 11, 5)]
        alone = torch.cat([self._two_steps([[prompt]]) for prompt in prompts])
        error = (self._two_steps([prompts[:2], prompts[2:]]) - alone).float().norm()
        error = float(error / (alone - alone.mean(-1, keepdim=True)).float().norm())
        tolerance = 1e-3 if alone.dtype == torch.float32 else 0.1
        if not error < tolerance:
            raise ValueError(
                f"{type(self._model).__name__} answers otherwise when rows of different lengths decode together: its "
                f"logits are off by {error:.1g} of their size, where {tolerance:.1g} is rounding. It cannot be served "
                "in batches."
            )

    def _two_steps(self, joins: list[list[list[int]]]) -> Tensor:
        """Logits of a first and a second token after prompts that join one after another, [prompts, 2 * vocabulary]."""
        batch = Batch(self._model, self.run)
        first = torch.cat([batch.join(prompts, [BASE] * len(prompts)) for prompts in joins])
        return torch.cat([first, batch.step(torch.ones(len(batch), dtype=torch.long, device=first.device))], dim=1)

    @torch.inference_mode()
    def _serve(self) -> None:
        try:
            while True:
                with self._changed:
                    while not (self._closed or self._waiting or self._running):
                        self._changed.wait()
                    if self._closed:
                        break
                    joining = self._next_rows()
                if joining:
                    self._join(joining)
                self._leave()
                if self._running:
                    self._step()
                    self._leave()
        finally:
            with self._changed:
                self._closed = True
                rows = [*self._running, *self._waiting]
                self._running.clear()
                self._waiting.clear()
            self._batch.keep([])
            for row in rows:
                _settle(row, ClosedError("The engine was closed."))

    def _forget_cancelled(self) -> None:
        for row in self._waiting:
            if row.future.cancelled():
                _settle(row)
        self._waiting = deque(row for row in self._waiting if not row.settled)

    def _next_rows(self) -> list[_Row]:
        """Take from the queue what is to start now."""
        self._forget_cancelled()
        rows: list[_Row] = []
        while self._waiting and len(self._running) + len(rows) < self.rows:
            requests = [row.request for row in (*rows, self._waiting[0])]
            size = len(requests) * max(len(request.prompt) for request in requests)
            tasks = {request.task for request in requests} - {BASE}
            if rows and (size > self.prefill_tokens or len(tasks) > self.bank.capacity):
                break
            rows.append(self._waiting.popleft())
        return rows

    def _join(self, rows: list[_Row]) -> None:
        try:
            logits = self._batch.join([row.request.prompt for row in rows], [row.request.task for row in rows])
        except Exception as error:
            lost = len(self._batch) < len(self._running)
            if lost:
                for row in self._running:
                    _settle(row, error)
                self._running = []
            # One of them may be to blame, such as one whose task's file was changed; the others shall not suffer.
            if len(rows) == 1 and not lost:
                _settle(rows[0], error)
            else:
                for row in rows:
                    self._join([row])
            return
        self._running += rows
        self._choose(rows, logits)

    def _step(self) -> None:
        try:
            tokens = torch.tensor([row.tokens[-1] for row in self._running], device=self._batch.device)
            logits = self._batch.step(tokens)
        except Exception as error:
            for row in self._running:
                _settle(row, error)
            return
        self._choose(self._running, logits)

    def _choose(self, rows: list[_Row], logits: Tensor) -> None:
        """The next token of each row."""
        likeliest, tokens = (values.tolist() for values in logits.max(-1))
        for index, row in enumerate(rows):
            try:
                # The largest is NaN if any is.
                if not math.isfinite(likeliest[index]):
                    raise ValueError(f"Task '{row.request.task}': the model's logits are NaN or infinite.")
                token = tokens[index] if row.generator is None else _draw(logits[index], row.request, row.generator)
                row.tokens.append(token)
                self._show(row, token)
            except Exception as error:
                _settle(row, error)

    def _show(self, row: _Row, token: int) -> None:
        """Give a row's listener what is new, and its future the answer when it is done."""
        ended, full = token in self._ends, len(row.tokens) >= row.request.max_tokens
        piece = "" if ended else row.writer.add(token)
        ended = ended or row.writer.stopped
        if ended or full:
            piece += row.writer.finish()
        if piece and row.listener is not None and not row.future.cancelled():
            row.listener(piece)
        if ended or full:
            reason: Literal["stop", "length"] = "stop" if ended or row.writer.stopped else "length"
            _settle(row, Completion(row.writer.text, row.tokens, reason))

    def _leave(self) -> None:
        """Let rows that are answered, have failed or were cancelled leave the batch."""
        for row in self._running:
            if row.future.cancelled():
                _settle(row)
        stay = [index for index, row in enumerate(self._running) if not row.settled]
        if len(stay) < len(self._running):
            self._batch.keep(stay)
            self._running = [self._running[index] for index in stay]


def _fixed_length(model: nn.Module) -> float:
    """How many tokens the longest row may have, for the others to have the rotary embedding that they have alone."""
    lengths = [math.inf]
    for module in model.modules():
        kind: Any = getattr(module, "rope_type", None)
        if kind == "longrope":
            config: Any = module.config
            lengths.append(config.rope_parameters["original_max_position_embeddings"])
        elif kind == "dynamic":
            length: Any = module.original_max_seq_len
            lengths.append(length)
    return min(lengths)


def _draw(logits: Tensor, request: Request, generator: torch.Generator) -> int:
    scores = logits.float()[None] / request.temperature
    if request.top_p < 1:
        warp: Any = TopPLogitsWarper(request.top_p)
        scores = warp(None, scores)  # it does not look at tokens
    return int(torch.multinomial(scores.softmax(-1)[0], 1, generator=generator))


def _settle(row: _Row, outcome: Completion | Exception | None = None) -> None:
    """Give a future what it gets, unless it has that; one that was cancelled tells those who wait for it."""
    if row.settled:
        return
    row.settled = True
    # False for one that was cancelled, also in this moment.
    if not row.future.set_running_or_notify_cancel():
        return
    if isinstance(outcome, Completion):
        row.future.set_result(outcome)
    else:
        row.future.set_exception(outcome)
