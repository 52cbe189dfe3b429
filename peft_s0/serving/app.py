"""An engine over HTTP, as OpenAI's API has it: the model's name is the task.

Needs FastAPI (`pip install "peft-s0[serve]"`).
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from jinja2 import TemplateError
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.requests import Request as HTTPRequest

from ..bank import UnknownTaskError
from ..rows import BASE
from .engine import BusyError, ClosedError, Completion, Engine, Request, TooLongError

_LOG = logging.getLogger(__name__)


class _GoneError(Exception):
    """The client has gone."""


class _FailedError(Exception):
    """The engine could not answer."""


class _Strict(BaseModel):
    """What is not known is refused: an answer that leaves out what was asked for is a wrong one."""

    model_config = ConfigDict(extra="forbid")


class StreamOptions(_Strict):
    """What a stream holds beside the answer."""

    include_usage: bool = False


class _Body(_Strict):
    """What both kinds of requests have; fields with one value are there for clients that send it."""

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = None
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    user: str | None = None


class CompletionBody(_Body):
    """A request for `/v1/completions`."""

    prompt: str | list[int]
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    logprobs: Literal[None] = None


class TextPart(_Strict):
    """Text in a message."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """A message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None


class ChatBody(_Body):
    """A request for `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: Literal[False] | None = None


def create_app(engine: Engine, name: str, max_body: int = 1 << 20) -> FastAPI:
    """The HTTP service of an engine; whoever runs it closes the engine, the service does when it is shut down.

    Args:
        engine: answers the requests.
        name: what the base model is called in requests; the tasks have the bank's names.
        max_body: how many bytes a request may have; a larger one gets status 413.

    Raises:
        ValueError: if a task has the base model's name.
    """
    if name in engine.bank:
        raise ValueError(f"The base model cannot be called '{name}', as a task is.")

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close)

    service = _Service(engine, name)
    app = FastAPI(title="peft-s0", lifespan=lifespan)
    app.add_middleware(_BodyLimit, limit=max_body)
    app.get("/health")(service.health)
    app.get("/v1/models")(service.models)
    app.get("/v1/models/{model:path}")(service.model)
    app.post("/v1/completions")(service.complete)
    app.post("/v1/chat/completions")(service.chat)
    for kind in (ValueError, BusyError, ClosedError, RequestValidationError, HTTPException, _GoneError, _FailedError):
        app.add_exception_handler(kind, _answer_error)
    return app


@dataclass
class _Kind:
    """How the answers of one kind of requests are called, and where their text stands."""

    prefix: str
    whole: str
    part: str
    choice: Callable[[str], dict[str, Any]]
    delta: Callable[[str], dict[str, Any]]
    opening: dict[str, Any] | None = None


_TEXT = _Kind("cmpl", "text_completion", "text_completion", lambda text: {"text": text}, lambda text: {"text": text})
_CHAT = _Kind(
    "chatcmpl",
    "chat.completion",
    "chat.completion.chunk",
    lambda text: {"message": {"role": "assistant", "content": text}},
    lambda text: {"delta": {"content": text} if text else {}},
    {"delta": {"role": "assistant", "content": ""}},
)


@dataclass
class _Service:
    engine: Engine
    name: str
    created: int = field(default_factory=lambda: int(time.time()))

    async def health(self) -> JSONResponse:
        """Whether requests are answered, and how many run and wait."""
        alive = self.engine.alive
        body = {"status": "ok" if alive else "closed", **self.engine.load}
        return JSONResponse(body, status_code=200 if alive else 503)

    async def models(self) -> dict[str, Any]:
        """The base model and the tasks."""
        return {"object": "list", "data": [self._describe(name) for name in (self.name, *self.engine.bank)]}

    async def model(self, model: str) -> dict[str, Any]:
        """One of them."""
        self._task(model)
        return self._describe(model)

    async def complete(self, body: CompletionBody, http: HTTPRequest) -> Response:
        """Go on with a text."""
        prompt: Any = body.prompt
        if isinstance(prompt, str):
            _check_text(prompt)
            prompt = (await asyncio.to_thread(self.engine.tokenizer, prompt))["input_ids"]
        return await self._answer(_TEXT, body, prompt, body.max_tokens or 16, http)

    async def chat(self, body: ChatBody, http: HTTPRequest) -> Response:
        """Answer a chat."""
        if self.engine.tokenizer.chat_template is None:
            raise ValueError("The tokenizer has no chat template; use /v1/completions.")
        messages = [
            {"role": message.role, "content": message.content}
            if isinstance(message.content, str)
            else {"role": message.role, "content": "".join(part.text for part in message.content)}
            for message in body.messages
        ]

        for message in messages:
            _check_text(message["content"])

        def apply() -> list[int]:
            try:
                return self.engine.tokenizer.apply_chat_template(  # type: ignore[no-any-return]
                    messages, add_generation_prompt=True, return_dict=False
                )
            except TemplateError as error:
                # How templates refuse messages, such as a role that they do not know.
                raise ValueError(f"The chat template refuses these messages: {error}") from error

        prompt = await asyncio.to_thread(apply)
        limit = body.max_completion_tokens or body.max_tokens
        # As OpenAI's: an answer may be as long as there is room.
        return await self._answer(_CHAT, body, prompt, limit or max(1, self.engine.max_length - len(prompt)), http)

    def _task(self, model: str) -> str:
        if model == self.name:
            return BASE
        if model not in self.engine.bank:
            raise UnknownTaskError(f"The model '{model}' does not exist; /v1/models lists those that do.")
        return model

    def _describe(self, model: str) -> dict[str, Any]:
        description = {"id": model, "object": "model", "created": self.created, "owned_by": "peft-s0"}
        return description if model == self.name else {**description, "parent": self.name}

    async def _answer(self, kind: _Kind, body: _Body, prompt: list[int], limit: int, http: HTTPRequest) -> Response:
        request = Request(
            prompt,
            self._task(body.model),
            limit,
            1.0 if body.temperature is None else body.temperature,
            1.0 if body.top_p is None else body.top_p,
            body.seed,
            (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
        )
        head = {"id": f"{kind.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}
        if not body.stream:
            answer = self.engine.submit(request)
            await _unless_gone(http, answer, asyncio.wrap_future(answer))
            completion = _result(answer)
            choice = {"index": 0, **kind.choice(completion.text), "finish_reason": completion.reason, "logprobs": None}
            usage = _usage(request, completion)
            return JSONResponse({**head, "object": kind.whole, "choices": [choice], "usage": usage})
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[str | None] = asyncio.Queue()

        def tell(piece: str | None) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

        answer = self.engine.submit(request, tell)
        answer.add_done_callback(lambda _: tell(None))
        # Before the status is sent: a task whose file is broken is an error, and no stream.
        first = asyncio.ensure_future(pieces.get())
        await _unless_gone(http, answer, first)
        if first.result() is None:
            _result(answer)
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        extra: dict[str, Any] = {"usage": None} if with_usage else {}
        head["object"] = kind.part

        async def events() -> AsyncIterator[str]:
            try:
                if kind.opening is not None:
                    yield _event({**head, "choices": [_part(kind.opening, None)], **extra})
                piece = first.result()
                while piece is not None:
                    yield _event({**head, "choices": [_part(kind.delta(piece), None)], **extra})
                    piece = await pieces.get()
                completion = _result(answer)
                yield _event({**head, "choices": [_part(kind.delta(""), completion.reason)], **extra})
                if with_usage:
                    yield _event({**head, "choices": [], "usage": _usage(request, completion)})
                yield "data: [DONE]\n\n"
            except Exception as error:
                yield _event(_describe_error(error)[1])
            finally:
                # The client may have gone.
                answer.cancel()

        return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


def _check_text(text: str) -> None:
    """Refuse halves of characters, which JSON may hold and tokenizers do not take.

    Raises:
        ValueError: for these.
    """
    text.encode()


def _part(content: dict[str, Any], reason: str | None) -> dict[str, Any]:
    return {"index": 0, **content, "finish_reason": reason, "logprobs": None}


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def _usage(request: Request, completion: Completion) -> dict[str, int]:
    prompt, answer = len(request.prompt), len(completion.tokens)
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


async def _unless_gone(http: HTTPRequest, answer: Future[Completion], wait: asyncio.Future[Any]) -> None:
    """Wait for something; if the client goes away first, the answer is cancelled.

    Raises:
        _GoneError: then.
        ClosedError: if the server is stopped first, and what runs has no time left.
    """

    async def gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            continue

    watch = asyncio.ensure_future(gone())
    try:
        await asyncio.wait([wait, watch], return_when=asyncio.FIRST_COMPLETED)
        if not wait.done():
            raise _GoneError
        wait.exception()  # looked at elsewhere: `answer` has the same
    except asyncio.CancelledError:
        raise ClosedError("The server was stopped before the answer was there.") from None
    finally:
        watch.cancel()
        if not wait.done():
            wait.cancel()
            answer.cancel()


def _result(answer: Future[Completion]) -> Completion:
    """The answer that is there."""
    try:
        return answer.result(timeout=0)
    except (ClosedError, UnknownTaskError):
        # The latter for a task that was removed while the request waited.
        raise
    except Exception as error:
        # Not the client's fault, whatever its kind.
        raise _FailedError from error


def _describe_error(error: Exception) -> tuple[int, dict[str, Any]]:
    """Status and body, as OpenAI's clients expect them."""
    status, kind, code, parameter = 500, "server_error", "internal_error", None
    message = str(error)
    if isinstance(error, UnknownTaskError):
        status, kind, code, parameter = 404, "invalid_request_error", "model_not_found", "model"
    elif isinstance(error, TooLongError):
        status, kind, code = 400, "invalid_request_error", "context_length_exceeded"
    elif isinstance(error, (BusyError, ClosedError)):
        status, code = 503, "overloaded" if isinstance(error, BusyError) else "closed"
    elif isinstance(error, RequestValidationError):
        status, kind, code = 400, "invalid_request_error", "invalid_value"
        first = error.errors()[0]
        parameter = ".".join(str(part) for part in first["loc"] if part != "body") or None
        message = f"{parameter or 'body'}: {first['msg']}"
    elif isinstance(error, ValueError):
        status, kind, code = 400, "invalid_request_error", "invalid_value"
    elif isinstance(error, HTTPException):
        # No such path, or another method.
        status, kind, code = error.status_code, "invalid_request_error", "unknown_url"
    elif isinstance(error, _GoneError):
        status = 499  # nobody reads it
    else:
        _LOG.error("A request failed.", exc_info=error)
        message = "The request failed; the server's log says why."
    return status, {"error": {"message": message, "type": kind, "param": parameter, "code": code}}


async def _answer_error(http: HTTPRequest, error: Exception) -> JSONResponse:
    status, body = _describe_error(error)
    if isinstance(error, HTTPException):
        body["error"]["message"] = f"{http.method} {http.url.path}: {error.detail}"
        return JSONResponse(body, status, headers=error.headers)
    return JSONResponse(body, status, headers={"Retry-After": "1"} if status == 503 else None)


class _BodyLimit:
    """Refuses requests of more bytes than a limit, whatever they say of their length."""

    def __init__(self, app: Any, limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope: Any, receive: Callable[[], Awaitable[Any]], send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        messages: list[Any] = []
        size, more = 0, True
        while more:
            message = await receive()
            size += len(message.get("body", b""))
            more = message["type"] == "http.request" and message.get("more_body", False)
            # What is too much is read, for a client that still writes would not see the answer, but not kept.
            messages = [*messages, message] if size <= self.limit else []
        if size > self.limit:
            error = {"message": f"The request has more than {self.limit} bytes.", "type": "invalid_request_error"}
            response = JSONResponse({"error": {**error, "param": None, "code": "too_large"}}, 413)
            await response(scope, receive, send)
            return

        async def again() -> Any:
            return messages.pop(0) if messages else await receive()

        await self.app(scope, again, send)
