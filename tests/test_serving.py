"""Many tasks as a service: rows that join and leave, an engine that threads share, and the same over HTTP."""

from __future__ import annotations

import ast
import json
import random
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
import uvicorn
from architectures import ARCHITECTURES, Architecture
from fastapi.testclient import TestClient
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models
from torch import Tensor
from transformers import PreTrainedTokenizerBase, pipeline
from tuned import tune
from typer.testing import CliRunner

from peft_s0 import S0Config, StateBank
from peft_s0.mixers import cache_of
from peft_s0.serving import BusyError, ClosedError, Engine, Request, TooLongError, UnknownTaskError
from peft_s0.serving import batch as batch_module
from peft_s0.serving.app import create_app
from peft_s0.serving.batch import Batch
from peft_s0.serving.text import Writer
from peft_s0_cli import app

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

from miniature.base import FOLDER, load_base, load_tokenizer  # noqa: E402
from miniature.evaluate import HELD_OUT, complete  # noqa: E402

TASKS = ("first", "second", "third", "fourth")
ALL = (*TASKS, "__base__")
PROMPTS = [problem.prompt for problem in HELD_OUT[:12]]

# Caches that are more than keys, values and states, or that the models keep to themselves.
REFUSED = {
    "qwen4_exp": "DynamicCache, DynamicIndexedLayer",
    "qwen4_exp_ple": "DynamicCache, DynamicIndexedLayer",
    "glm5_next": "DynamicCache, DynamicIndexedLayer",
    "minimax": "MiniMaxCache",
    "recurrent_gemma": "NoneType",
    "xlstm": "xLSTMCache",
}


class Rows:
    """A batch, and what each of its rows is alone: random tokens, of which the first are the prompt.

    Sizes are the numbers of tokens and of those of the prompt, and the task.
    """

    def __init__(self, architecture: Architecture, folder: Path, sizes: list[tuple[int, int, str]]) -> None:
        tuned = tune(architecture)
        tuned.model.save_pretrained(folder)
        self.bank = StateBank(tuned.model, capacity=1)
        self.bank.add("task", folder)
        self.batch = Batch(tuned.model.get_base_model(), self.run)
        self.tokens = [tuned.ids(1, length, seed=i) for i, (length, _, _) in enumerate(sizes)]
        self.done = [prompt for _, prompt, _ in sizes]
        self.tasks = [task for _, _, task in sizes]
        models = {"task": tuned.model, "__base__": tuned.base}
        self.alone = [
            models[task](ids, use_cache=False).logits[0] for ids, task in zip(self.tokens, self.tasks, strict=True)
        ]
        self.effect = max(
            tuned.effect(ids) for ids, task in zip(self.tokens, self.tasks, strict=True) if task == "task"
        )
        self.live: list[int] = []

    def run(self, tasks: list[str], starts: bool, **inputs: Any) -> Any:
        with self.bank.use(tasks if starts else ["__base__"] * len(tasks)):
            return self.bank.model(**inputs)

    def join(self, *rows: int) -> None:
        prompts = [self.tokens[row][0, : self.done[row]].tolist() for row in rows]
        self.check(self.batch.join(prompts, [self.tasks[row] for row in rows]), rows)
        self.live += rows

    def step(self) -> None:
        logits = self.batch.step(torch.tensor([self.tokens[row][0, self.done[row]] for row in self.live]))
        for row in self.live:
            self.done[row] += 1
        self.check(logits, self.live)

    def leave(self, *rows: int) -> None:
        stay = [i for i, row in enumerate(self.live) if row not in rows]
        self.batch.keep(stay)
        self.live = [self.live[i] for i in stay]
        assert self.batch.columns == max(self.done[row] for row in self.live)

    def check(self, logits: Tensor, rows: Any) -> None:
        expected = torch.stack([self.alone[row][self.done[row] - 1] for row in rows])
        assert float((logits - expected).abs().max()) < 1e-4 * self.effect


@pytest.mark.parametrize("row", [row for row in ARCHITECTURES if row.name not in REFUSED], ids=lambda row: row.name)
@torch.no_grad()
def test_rows_join_and_leave(row: Architecture, tmp_path: Path) -> None:
    """A prompt of one token, one shorter and one longer than all others, with the base model's rows in between."""
    sizes = [(4, 2, "task"), (14, 8, "__base__"), (4, 1, "task"), (9, 5, "task"), (20, 15, "__base__")]
    rows = Rows(row, tmp_path, sizes)
    assert rows.effect > 0.3
    rows.join(0, 1)
    rows.step()
    rows.leave(0)
    rows.step()
    rows.join(2)
    rows.join(3, 4)
    rows.step()
    rows.leave(1, 4)
    rows.step()
    rows.step()


@pytest.mark.parametrize("name", REFUSED)
@torch.no_grad()
def test_caches_that_cannot_be_put_together(name: str) -> None:
    model = next(row for row in ARCHITECTURES if row.name == name).build()
    batch = Batch(model, lambda tasks, starts, **inputs: model(**inputs))
    with pytest.raises(ValueError, match=rf"cache of this model \({REFUSED[name]}\) is of a kind into which rows"):
        batch.join([[3, 4]], ["__base__"])


@torch.no_grad()
def test_a_prompt_that_fails_changes_nothing(tmp_path: Path) -> None:
    rows = Rows(ARCHITECTURES[0], tmp_path, [(9, 2, "task"), (9, 4, "task")])
    rows.join(0, 1)
    with pytest.raises(ValueError, match="unknown task 'none'"):
        rows.batch.join([[3, 4, 5]], ["none"])
    rows.step()
    rows.step()


@dataclass
class Served:
    """Saved tasks of the tiny model, and what each answers alone to the prompts, greedily."""

    folder: Path
    tokenizer: PreTrainedTokenizerBase
    answers: dict[str, list[str]]

    def bank(self, capacity: int = 2) -> StateBank:
        bank = StateBank(get_peft_model(load_base(), S0Config(task_type="CAUSAL_LM")).eval(), capacity)
        for task in TASKS:
            bank.add(task, self.folder / task)
        return bank

    def engine(self, **arguments: Any) -> Engine:
        return Engine(self.bank(), self.tokenizer, **arguments)

    def request(
        self, prompt: str = PROMPTS[0], task: str = "__base__", max_tokens: int = 32, **options: Any
    ) -> Request:
        return Request(self.tokenizer(prompt)["input_ids"], task, max_tokens, **options)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    folder, tokenizer, answers = tmp_path_factory.mktemp("tasks"), load_tokenizer(), {}
    for seed, task in enumerate(TASKS):
        torch.manual_seed(seed)
        model = get_peft_model(load_base(), S0Config(alpha=2.0, init_weights=1.0)).eval()
        model.save_pretrained(folder / task)
        # One row at a time.
        answers[task] = complete(model, tokenizer, PROMPTS, batch_size=1)
    answers["__base__"] = complete(load_base(), tokenizer, PROMPTS, batch_size=1)
    different = [len({answers[task][i] for task in ALL}) for i in range(len(PROMPTS))]
    assert sum(different) > 4 * len(PROMPTS), "tasks that answer alike would show nothing"
    return Served(folder, tokenizer, answers)


@pytest.fixture(scope="module")
def engine(served: Served) -> Iterator[Engine]:
    with served.engine(rows=8, queue=64) as engine:
        yield engine


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.002)


def test_threads_get_what_each_task_answers_alone(served: Served, engine: Engine) -> None:
    """60 requests for 4 tasks and the base model from 8 threads, with 8 rows and 2 slots."""
    wanted = [(i, task) for i in range(len(PROMPTS)) for task in ALL]
    random.Random(0).shuffle(wanted)

    def ask(one: tuple[int, str]) -> str:
        return engine.submit(served.request(PROMPTS[one[0]], one[1])).result(timeout=60).text

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, wanted))
    assert answers == [served.answers[task][i] for i, task in wanted]
    assert len(engine.bank.resident) == 2
    until(lambda: engine.load == {"running": 0, "waiting": 0})


def test_more_tasks_decode_than_the_bank_holds(served: Served) -> None:
    """States enter with the prompt: slots are free again when the answer begins."""
    bank = served.bank(capacity=1)
    seen: list[int] = []

    class Watched(Engine):
        def run(self, tasks: Any, starts: bool, **inputs: Any) -> Any:
            seen.append(0 if starts else len(set(tasks)))
            return super().run(tasks, starts, **inputs)

    with Watched(bank, served.tokenizer) as engine:
        futures = [engine.submit(served.request(PROMPTS[0], task)) for task in ALL]
        assert [future.result(timeout=60).text for future in futures] == [served.answers[task][0] for task in ALL]
    assert max(seen) == 5


def test_draws_do_not_depend_on_what_runs_beside(served: Served, engine: Engine) -> None:
    request = served.request(PROMPTS[1], "first", temperature=1.0, top_p=0.9, seed=7)
    alone = engine.submit(request).result(timeout=60)
    others = [engine.submit(served.request(PROMPTS[i], ALL[i % 5], temperature=1.0, seed=i)) for i in range(6)]
    assert engine.submit(request).result(timeout=60) == alone
    assert len({tuple(other.result(timeout=60).tokens) for other in others}) > 3
    more = [engine.submit(served.request(PROMPTS[1], "first", temperature=1.0)) for _ in range(8)]
    assert len({tuple(other.result(timeout=60).tokens) for other in more}) > 3, "without a seed they differ"


def test_draws_follow_the_probabilities(served: Served, engine: Engine) -> None:
    """The first token, drawn 600 times, against the model's own probabilities."""
    request = served.request("def f(x):\n    return x", "second", 1)
    alone = PeftModel.from_pretrained(load_base(), served.folder / "second").eval()
    with torch.no_grad():
        expected = (alone(torch.tensor([request.prompt])).logits[0, -1] / 2.0).softmax(-1)
    kept = expected.sort(descending=True)
    count = int((kept.values.cumsum(0) < 0.8).sum()) + 1
    expected = torch.zeros_like(expected).index_copy(0, kept.indices[:count], kept.values[:count])
    expected /= expected.sum()
    found = torch.zeros_like(expected)
    for start in range(0, 600, 50):
        futures = [
            engine.submit(served.request("def f(x):\n    return x", "second", 1, temperature=2.0, top_p=0.8, seed=seed))
            for seed in range(start, start + 50)
        ]
        for future in futures:
            found[future.result(timeout=60).tokens[0]] += 1 / 600
    assert not found[expected == 0].any()
    assert 3 <= count < 60
    # Five standard deviations.
    assert ((found - expected).abs() < 5 * (expected * (1 - expected) / 600).sqrt() + 1e-9).all()


def test_why_an_answer_ends(served: Served, engine: Engine) -> None:
    whole = engine.submit(served.request(PROMPTS[0])).result(timeout=60)
    assert (whole.reason, whole.tokens[-1]) == ("stop", 2)
    assert whole.text == served.tokenizer.decode(whole.tokens, skip_special_tokens=True)
    short = engine.submit(served.request(PROMPTS[0], max_tokens=3)).result(timeout=60)
    assert (short.reason, short.tokens) == ("length", whole.tokens[:3])
    stop = whole.text[5:9]
    pieces: list[str] = []
    cut = engine.submit(served.request(PROMPTS[0], stop=["never", stop]), pieces.append).result(timeout=60)
    assert (cut.reason, cut.text) == ("stop", whole.text[: whole.text.index(stop)])
    assert "".join(pieces) == cut.text
    assert len(cut.tokens) < len(whole.tokens)


def test_the_models_own_defaults_are_not_taken(served: Served) -> None:
    """A request says all but where its answer ends."""
    bank = served.bank()
    bank.model.get_base_model().generation_config.update(do_sample=True, top_k=1, repetition_penalty=9.0)
    with Engine(bank, served.tokenizer) as engine:
        answer = engine.submit(served.request(PROMPTS[0], "first")).result(timeout=60)
        assert answer.text == served.answers["first"][0]
        drawn = [engine.submit(served.request(temperature=1.0, max_tokens=8, seed=seed)) for seed in range(8)]
        assert len({tuple(future.result(timeout=60).tokens) for future in drawn}) > 1


class Bytes:
    """A tokenizer of which the tokens are bytes."""

    def __init__(self) -> None:
        # As byte-level BPE writes them: printable ones as they are, the others from 256 on.
        kept = {*range(33, 127), *range(161, 173), *range(174, 256)}
        others = iter(range(256, 512))
        letters = {chr(i if i in kept else next(others)): i for i in range(256)}
        self.backend_tokenizer = Tokenizer(models.BPE(letters, []))
        self.backend_tokenizer.decoder = decoders.ByteLevel()


@pytest.mark.parametrize("stop", [(), ("äb",), ("bc", "cde"), ("ü",)])
def test_text_comes_in_whole_characters_and_without_stop_strings(stop: tuple[str, ...]) -> None:
    text = "aäa b äc cd cdé €"
    writer, pieces = Writer(Bytes(), stop), []
    for token in text.encode():
        pieces.append(writer.add(token))
    pieces.append(writer.finish())
    assert "".join(pieces) == text
    assert not writer.stopped
    for token in "äbcdeü".encode():
        pieces.append(writer.add(token))
        if writer.stopped:
            break
    ends = ["äbcdeü".index(one) for one in stop if one in "äbcdeü"]
    assert writer.stopped == bool(stop)
    assert "".join(pieces) == text + "äbcdeü"[: min(ends, default=6)]


def test_a_character_that_is_cut_off() -> None:
    writer = Writer(Bytes())
    pieces = [writer.add(token) for token in "a€".encode()[:-1]]
    assert pieces == ["a", "", ""]
    assert (writer.finish(), writer.text) == ("\ufffd", "a\ufffd")


class Words:
    """A tokenizer as Llama's: words with the space before them, other characters as bytes; 256 to 259 are words."""

    def __init__(self) -> None:
        tokens = [*(f"<0x{byte:02X}>" for byte in range(256)), "▁return", "▁x", "x", "("]
        vocabulary = {token: i for i, token in enumerate(tokens)}
        self.backend_tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
        parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        self.backend_tokenizer.decoder = decoders.Sequence(parts)

    def read(self, tokens: list[int], prompt: list[int]) -> str:
        writer = Writer(self, (), prompt)
        pieces = [*map(writer.add, tokens), writer.finish()]
        assert "".join(pieces) == writer.text
        return writer.text


def test_text_goes_on_where_the_prompt_ends() -> None:
    """With the space that the first word begins with, as in what transformers makes of both together."""
    tokenizer, draw = Words(), random.Random(0)
    assert tokenizer.read([256, 257], [258, 259]) == " return x"
    assert tokenizer.read([256, 257], []) == "return x"
    parts = [[256], [257], [258], [259], list("é".encode()), list("😀".encode())]
    for _ in range(300):
        prompt, answer = ([*chain(*draw.choices(parts, k=draw.randint(1, 9)))] for _ in range(2))
        before, whole = map(tokenizer.backend_tokenizer.decode, (prompt, prompt + answer))
        assert tokenizer.read(answer, prompt) == whole[len(before) :]
    # A prompt of which the last tokens begin within a character.
    assert tokenizer.read([257, *"é".encode()], list("éééééaa😀".encode())) == " xé"


def test_bytes_that_are_no_characters() -> None:
    """Which such tokenizers take back: what was read as a character, they do not with what comes after it."""
    assert Words().read([97, 131, 258], [258]) == "a\ufffdx"
    assert Words().read([97, 131], [258]) == "a\ufffd"


def test_an_end_that_has_text(served: Served) -> None:
    """Not every model's end is a special token; the answer is without it all the same."""
    with served.engine() as engine:
        whole = engine.submit(served.request()).result(timeout=60)
        engine._ends = {whole.tokens[4]}
        cut = engine.submit(served.request()).result(timeout=60)
    assert (cut.reason, cut.tokens) == ("stop", whole.tokens[: whole.tokens.index(whole.tokens[4]) + 1])
    assert cut.text == served.tokenizer.decode(cut.tokens[:-1])


@contextmanager
def halted(bank: StateBank) -> Iterator[None]:
    """The engine waits for the model, which this thread has."""
    with bank.use(["__base__"]):
        yield


def test_the_queue_is_bounded(served: Served) -> None:
    with served.engine(rows=1, queue=3) as engine:
        with halted(engine.bank):
            running = engine.submit(served.request())
            until(lambda: engine.load["waiting"] == 0)
            waiting = [engine.submit(served.request()) for _ in range(3)]
            with pytest.raises(BusyError, match="3 requests are waiting already"):
                engine.submit(served.request())
            # What is cancelled waits no more.
            assert waiting[1].cancel()
            waiting.append(engine.submit(served.request()))
            with pytest.raises(BusyError):
                engine.submit(served.request())
        texts = {future.result(timeout=60).text for future in [running, *waiting] if not future.cancelled()}
        assert texts == {served.answers["__base__"][0]}


def test_a_cancelled_request_gives_its_row_to_others(served: Served) -> None:
    # No end before its length: whatever the model says, it is asked for more than it can say.
    with served.engine(rows=1) as engine:
        engine._ends = set()
        pieces: list[str] = []
        long = engine.submit(served.request(max_tokens=480), pieces.append)
        until(lambda: len(pieces) > 3)
        assert long.cancel()
        other = engine.submit(served.request(max_tokens=4))
        assert len(other.result(timeout=60).tokens) == 4
        assert len(pieces) < 300
        with pytest.raises(CancelledError):
            long.result()
        until(lambda: engine.load == {"running": 0, "waiting": 0})
        assert len(engine._batch) == 0


def test_who_waits_for_cancelled_requests_is_told(served: Served) -> None:
    """Of one that decodes and of those in the queue."""
    with served.engine(rows=1) as engine:
        engine._ends, started = set(), []
        futures = [engine.submit(served.request(max_tokens=480), started.append) for _ in range(3)]
        until(lambda: bool(started))
        assert all(future.cancel() for future in futures)
        assert not wait(futures, timeout=20).not_done
        assert engine.submit(served.request(max_tokens=2)).result(timeout=60)


def test_a_listener_that_raises_ends_its_request_alone(served: Served, engine: Engine) -> None:
    def raises(piece: str) -> None:
        raise OSError("gone")

    bad, good = engine.submit(served.request(), raises), engine.submit(served.request())
    with pytest.raises(OSError, match="gone"):
        bad.result(timeout=60)
    assert good.result(timeout=60).text == served.answers["__base__"][0]


def test_a_task_whose_file_was_changed_fails_alone(served: Served, tmp_path: Path) -> None:
    with served.engine() as engine:
        shutil.copytree(served.folder / "first", tmp_path / "copy")
        engine.bank.add("copy", tmp_path / "copy")
        shutil.copy(served.folder / "second" / "adapter_model.safetensors", tmp_path / "copy")
        with halted(engine.bank):
            futures = {task: engine.submit(served.request(PROMPTS[2], task)) for task in ("first", "copy", "__base__")}
        with pytest.raises(ValueError, match=r"'copy', file .*: The file was changed since it was added"):
            futures.pop("copy").result(timeout=60)
        for task, future in futures.items():
            assert future.result(timeout=60).text == served.answers[task][2]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_end_their_request_alone(served: Served, temperature: float) -> None:
    class Overflowing(Engine):
        def run(self, tasks: Any, starts: bool, **inputs: Any) -> Any:
            output = super().run(tasks, starts, **inputs)
            if not starts:
                output.logits[[task == "second" for task in tasks], :, 5] = torch.nan
            return output

    with Overflowing(served.bank(), served.tokenizer) as engine:
        with halted(engine.bank):
            bad = engine.submit(served.request(task="second", temperature=temperature))
            good = [engine.submit(served.request(PROMPTS[i], "third")) for i in range(2)]
        with pytest.raises(ValueError, match="Task 'second': the model's logits are NaN or infinite"):
            bad.result(timeout=60)
        assert [future.result(timeout=60).text for future in good] == served.answers["third"][:2]
        assert engine.alive


def test_temperatures_too_low_to_divide_by(served: Served, engine: Engine) -> None:
    for temperature in (1e-6, 1e-40, 5e-324):
        answer = engine.submit(served.request(PROMPTS[0], "first", temperature=temperature)).result(timeout=60)
        assert answer.text == served.answers["first"][0]


def test_a_step_that_fails_ends_what_runs_and_nothing_else(served: Served) -> None:
    class Failing(Engine):
        fails = False

        def run(self, tasks: Any, starts: bool, **inputs: Any) -> Any:
            if self.fails and not starts:
                self.fails = False
                raise RuntimeError("out of memory")
            return super().run(tasks, starts, **inputs)

    with Failing(served.bank(), served.tokenizer, rows=1) as engine:
        with halted(engine.bank):
            futures = [engine.submit(served.request(PROMPTS[i], "third")) for i in range(3)]
            engine.fails = True
        with pytest.raises(RuntimeError, match="out of memory"):
            futures[0].result(timeout=60)
        for i, future in enumerate(futures[1:], 1):
            assert future.result(timeout=60).text == served.answers["third"][i]


def test_rows_that_cannot_be_put_together_are_lost_and_nothing_else(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_beside, calls = batch_module._put_beside, iter(range(1, 1000))

    def fail_once(layer: Any, new: Any) -> None:
        if next(calls) == 2:
            raise RuntimeError("out of memory")
        put_beside(layer, new)

    with served.engine() as engine:
        engine._ends, started = set(), []
        first = engine.submit(served.request(max_tokens=400), started.append)
        until(lambda: bool(started))
        monkeypatch.setattr(batch_module, "_put_beside", fail_once)
        second = engine.submit(served.request(PROMPTS[1], "third", max_tokens=8))
        with pytest.raises(RuntimeError, match="out of memory"):
            first.result(timeout=60)
        assert served.answers["third"][1].startswith(second.result(timeout=60).text)
        assert len(second.result().tokens) == 8


def test_memory_is_bounded(served: Served) -> None:
    """An endless stream of requests that overlap: the cache has no more columns than the longest row."""
    columns: list[tuple[int, int]] = []

    class Watched(Engine):
        def run(self, tasks: Any, starts: bool, **inputs: Any) -> Any:
            output = super().run(tasks, starts, **inputs)
            if not starts:
                columns.append((len(tasks), cache_of(inputs).layers[3].keys.shape[2]))
            return output

    with Watched(served.bank(), served.tokenizer, rows=3, queue=200, max_length=40) as engine:
        engine._ends = set()
        futures = [engine.submit(served.request("def f(x):", ALL[i % 5], 12 + i % 19)) for i in range(60)]
        assert [len(future.result(timeout=60).tokens) for future in futures] == [12 + i % 19 for i in range(60)]
    assert max(rows for rows, _ in columns) == 3
    assert 30 < max(length for _, length in columns) <= 40
    assert len(columns) > 300
    assert engine._batch._cache is None


def test_closing(served: Served) -> None:
    engine = served.engine(rows=1)
    engine._ends = set()
    started: list[str] = []
    futures = [engine.submit(served.request(max_tokens=480), started.append) for _ in range(2)]
    until(lambda: bool(started))
    engine.close()
    for future in futures:
        with pytest.raises(ClosedError):
            future.result(timeout=5)
    with pytest.raises(ClosedError):
        engine.submit(served.request())
    assert not engine.alive
    engine.close()


def test_what_an_engine_refuses(served: Served, engine: Engine) -> None:
    request = served.request
    with pytest.raises(UnknownTaskError, match="no task 'fifth'"):
        engine.submit(request(task="fifth"))
    with pytest.raises(TooLongError, match=r"has 500 tokens and the answer may have 13, .* 513; a row has .* 512"):
        engine.submit(Request([5] * 500, max_tokens=13))
    assert engine.submit(Request([5] * 500, max_tokens=12)).result(timeout=60)
    with pytest.raises(ValueError, match=r"Tokens \[67, -1\] are outside of the vocabulary of 67"):
        engine.submit(Request([5, 67, -1]))
    for arguments, message in [
        ({"prompt": []}, "The prompt has no token"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"temperature": -1.0}, "temperature must be a finite number >= 0, got -1.0"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"stop": [""]}, "A stop text is empty"),
    ]:
        with pytest.raises(ValueError, match=message):
            Request(**{"prompt": [5], **arguments})
    for arguments, message in [
        ({"prompt": "def"}, r"must be token ids, as of tokenizer\(text\)\['input_ids'\], got 'def'"),
        ({"stop": "return"}, r"stop must be a list of texts, got 'return'; pass \['return'\]"),
    ]:
        with pytest.raises(TypeError, match=message):
            Request(**{"prompt": [5], **arguments})
    with pytest.raises(ValueError, match="rows must be an integer >= 1, got 0"):
        served.engine(rows=0)
    with pytest.raises(TypeError, match="needs a fast tokenizer of transformers, got str"):
        Engine(engine.bank, "tokenizer")


def bank_of(name: str) -> StateBank:
    row = next(row for row in ARCHITECTURES if row.name == name)
    return StateBank(get_peft_model(row.build(), S0Config()).eval(), 1)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "longrope", "factor": 4.0, "short_factor": [1.0] * 8, "long_factor": [3.0] * 8},
        {"rope_type": "dynamic", "factor": 4.0},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_rows_that_change_beside_longer_ones(served: Served, rope: dict[str, Any]) -> None:
    """By a rotary embedding that is chosen by the longest row of a batch."""
    row = next(row for row in ARCHITECTURES if row.name == "falcon_h1")
    config = row.build().config
    config.max_position_embeddings = 16
    config.rope_parameters = {**config.rope_parameters, **rope, "original_max_position_embeddings": 16}
    torch.manual_seed(0)
    model = row.model_class(config).eval()
    short, long = [5, 9, 3], list(range(3, 40))
    with torch.no_grad():
        together = Batch(model, lambda tasks, starts, **inputs: model(**inputs)).join([short, long], ["__base__"] * 2)
        assert float((together[0] - model(torch.tensor([short])).logits[0, -1]).abs().max()) > 0.05
    bank = StateBank(get_peft_model(model, S0Config()).eval(), 1)
    with pytest.raises(ValueError, match=r"rotary embedding of FalconH1ForCausalLM changes .* Pass max_length=16"):
        Engine(bank, served.tokenizer, max_length=64)
    Engine(bank, served.tokenizer, max_length=16).close()


def test_models_that_cannot_be_served(served: Served) -> None:
    with pytest.raises(ValueError, match="is of a kind into which rows cannot be put"):
        Engine(bank_of("glm5_next"), served.tokenizer, max_length=64)

    class Leaking(Engine):
        def run(self, tasks: Any, starts: bool, **inputs: Any) -> Any:
            output = super().run(tasks, starts, **inputs)
            output.logits += output.logits.mean(0, keepdim=True)
            return output

    with pytest.raises(ValueError, match=r"Qwen3_5ForCausalLM answers otherwise when rows .* off by .* be served"):
        Leaking(served.bank(), served.tokenizer)


def test_a_pipeline_with_a_task_for_each_row(served: Served) -> None:
    bank = served.bank()
    generate = pipeline("text-generation", model=bank.model, tokenizer=served.tokenizer)
    served.tokenizer.padding_side = "left"
    tasks = ["first", "__base__", "second", "first"]
    with bank.use(tasks):
        found = generate(PROMPTS[:4], batch_size=4, max_new_tokens=32, do_sample=False, return_full_text=False)
    assert [one[0]["generated_text"] for one in found] == [served.answers[task][i] for i, task in enumerate(tasks)]


# Over HTTP.


@dataclass
class Site:
    """A server on loopback."""

    engine: Engine
    url: str

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def send(self, path: str, body: bytes | dict[str, Any], close: bool = False) -> tuple[int, dict[str, Any]] | None:
        """A request without a client that looks at it first; or one whose client goes away at once."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        host, port = self.url.removeprefix("http://").split(":")
        connection = socket.create_connection((host, int(port)))
        head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nConnection: close\r\n"
        connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        with connection:
            if close:
                until(lambda: self.engine.load["running"] > 0)
                return None
            received = b"".join(iter(lambda: connection.recv(65536), b""))
        status, _, rest = received.partition(b"\r\n\r\n")
        return int(status.split()[1]), json.loads(rest)


@contextmanager
def site(engine: Engine, **options: Any) -> Iterator[Site]:
    options = {"port": 0, "log_level": "error", "lifespan": "on", **options}
    server = uvicorn.Server(uvicorn.Config(create_app(engine, "tiny"), **options))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started)
        yield Site(engine, f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}")
    finally:
        server.should_exit = True
        thread.join()
    assert not engine.alive


@pytest.fixture(scope="module")
def http(served: Served) -> Iterator[Site]:
    tokenizer = load_tokenizer()
    tokenizer.chat_template = (
        "{{ bos_token }}{% for message in messages %}"
        "{% if message['role'] == 'developer' %}{{ raise_exception('Unexpected role developer.') }}{% endif %}"
        "{{ message['content'] }}{% endfor %}"
    )
    with site(Engine(served.bank(), tokenizer, rows=8, queue=64)) as running:
        yield running


def test_models(http: Site) -> None:
    assert [model.id for model in http.client.models.list()] == ["tiny", *TASKS]
    assert http.client.models.retrieve("first").parent == "tiny"
    with pytest.raises(openai.NotFoundError, match="The model 'fifth' does not exist"):
        http.client.models.retrieve("fifth")


def test_concurrent_clients(served: Served, http: Site) -> None:
    """Whole answers and streams, texts and chats, of all tasks at a time: each is its task's, and counts its tokens."""
    client, lengths = http.client, []

    def ask(i: int) -> str:
        task, prompt = ALL[i % 5], PROMPTS[i % 12]
        arguments: Any = {"model": "tiny" if task == "__base__" else task, "max_tokens": 32, "temperature": 0}
        chat: Any = [{"role": "user", "content": prompt}]
        if i % 4 == 0:
            text = client.completions.create(prompt=prompt, **arguments)
            assert text.usage.prompt_tokens == len(served.tokenizer(prompt)["input_ids"])
            assert text.usage.total_tokens - text.usage.prompt_tokens == text.usage.completion_tokens > 0
            return text.choices[0].text
        if i % 4 == 1:
            return client.chat.completions.create(messages=chat, **arguments).choices[0].message.content
        arguments |= {"stream": True, "stream_options": {"include_usage": True}}
        if i % 4 == 2:
            parts = list(client.completions.create(prompt=prompt, **arguments))
            pieces = [part.choices[0].text for part in parts[:-1]]
        else:
            parts = list(client.chat.completions.create(messages=chat, **arguments))
            assert parts[0].choices[0].delta.role == "assistant"
            pieces = [part.choices[0].delta.content or "" for part in parts[:-1]]
        assert parts[-2].choices[0].finish_reason in ("stop", "length")
        assert parts[-1].choices == []
        lengths.append(len(pieces))
        assert len({part.id for part in parts}) == 1
        return "".join(pieces)

    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(ask, range(60)))
    assert answers == [served.answers[ALL[i % 5]][i % 12] for i in range(60)]
    assert max(lengths) > 10, "streams that come at once"


def test_options_of_a_request(served: Served, http: Site) -> None:
    create: Any = http.client.completions.create
    drawn = [create(model="first", prompt=PROMPTS[0], max_tokens=32, seed=seed).choices[0].text for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    cut = create(model="tiny", prompt=PROMPTS[0], temperature=0, stop="return", max_tokens=32).choices[0]
    assert (cut.text, cut.finish_reason) == (served.answers["__base__"][0].partition("return")[0], "stop")
    ids = served.tokenizer(PROMPTS[0])["input_ids"]
    assert create(model="tiny", prompt=ids, temperature=0, max_tokens=2).choices[0].finish_reason == "length"
    assert create(model="tiny", prompt=ids, temperature=0).usage.completion_tokens <= 16
    parts: Any = [{"type": "text", "text": PROMPTS[0][:4]}, {"type": "text", "text": PROMPTS[0][4:]}]
    chat = http.client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": parts}], temperature=0, max_completion_tokens=32
    )
    assert chat.choices[0].message.content == served.answers["__base__"][0]


def test_errors_have_the_form_of_openai(http: Site) -> None:
    create: Any = http.client.completions.create
    with pytest.raises(openai.NotFoundError) as caught:
        create(model="fifth", prompt="def")
    assert caught.value.body["code"] == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="together 516; a row has at most 512") as caught:
        create(model="first", prompt=[5] * 500)
    assert caught.value.body["code"] == "context_length_exceeded"
    chat = "/v1/chat/completions"
    good: dict[str, Any] = {"model": "first", "prompt": "def", "max_tokens": 2}
    for path, body, parameter, message in [
        ("/v1/completions", {**good, "n": 2}, "n", "Input should be 1"),
        ("/v1/completions", {**good, "logit_bias": {}}, "logit_bias", "Extra inputs are not permitted"),
        ("/v1/completions", {**good, "max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ("/v1/completions", {**good, "temperature": "hot"}, "temperature", "valid number"),
        ("/v1/completions", {"model": "first"}, "prompt", "Field required"),
        ("/v1/completions", {**good, "prompt": []}, None, "The prompt has no token"),
        ("/v1/completions", {**good, "stop": ""}, None, "A stop text is empty"),
        ("/v1/completions", b"{", "1", "JSON decode error"),
        ("/v1/completions", {**good, "prompt": "a\ud83d"}, None, "surrogates not allowed"),
        (chat, {"model": "first", "messages": [{"role": "user", "content": "\ud83d"}]}, None, "surrogates not allowed"),
        (chat, {"model": "first", "messages": [{"role": "developer", "content": "a"}]}, None, "Unexpected role"),
        (chat, {"model": "first", "messages": []}, "messages", "at least 1 item"),
        (chat, {"model": "first", "messages": [{"role": "tool", "content": ""}]}, "messages.0.role", "Input should be"),
    ]:
        status, answer = http.send(path, body)
        assert (status, answer["error"]["param"]) == (400, parameter)
        assert message in answer["error"]["message"]
        assert answer["error"]["type"] == "invalid_request_error"
    status, answer = http.send("/v1/completions", {**good, "user": "u" * 2_000_000})
    assert (status, answer["error"]["code"]) == (413, "too_large")
    for path, code, message in [
        ("/v1/embeddings", 404, "POST /v1/embeddings: Not Found"),
        ("/v1/models", 405, "POST /v1/models: Method Not Allowed"),
    ]:
        status, answer = http.send(path, good)
        assert (status, answer["error"]["code"], answer["error"]["message"]) == (code, "unknown_url", message)
    with pytest.raises(openai.NotFoundError, match="Not Found"):
        http.client.embeddings.create(model="first", input="def")
    assert http.send("/v1/completions", {**good, "n": 1, "user": "me"})[0] == 200


def test_chats_without_a_template(served: Served) -> None:
    with site(served.engine()) as plain:
        status, answer = plain.send(
            "/v1/chat/completions", {"model": "first", "messages": [{"role": "user", "content": "def"}]}
        )
        assert (status, answer["error"]["message"][:35]) == (400, "The tokenizer has no chat template;")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away(served: Served, stream: bool) -> None:
    """Its row is free for others; what it would have had is not computed."""
    with site(served.engine(rows=1, max_length=100_000)) as small:
        small.engine._ends = set()
        small.send("/v1/completions", {"model": "first", "prompt": "def", "max_tokens": 90_000, "stream": stream}, True)
        answer = small.send("/v1/completions", {"model": "second", "prompt": "def", "max_tokens": 3})
        assert (answer[0], answer[1]["usage"]["completion_tokens"]) == (200, 3)
        until(lambda: small.engine.load == {"running": 0, "waiting": 0})


def test_a_server_that_is_stopped(served: Served) -> None:
    """What it has no time left to answer ends as where the engine was closed: clients may ask again."""
    body = {"model": "first", "prompt": "def", "max_tokens": 90_000}
    with ThreadPoolExecutor(1) as pool:
        with site(served.engine(rows=1, max_length=100_000), timeout_graceful_shutdown=1) as small:
            small.engine._ends = set()
            asked = pool.submit(small.send, "/v1/completions", body)
            until(lambda: small.engine.load["running"] == 1)
        status, answer = asked.result()
    assert (status, answer["error"]["code"]) == (503, "closed")


def health(site: Site) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(f"{site.url}/health") as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def test_a_full_queue_and_health(served: Served) -> None:
    with site(served.engine(rows=1, queue=1)) as small:
        engine, body = small.engine, {"model": "first", "prompt": PROMPTS[0], "max_tokens": 32, "temperature": 0}
        with ThreadPoolExecutor(2) as pool:
            with halted(engine.bank):
                first = pool.submit(small.send, "/v1/completions", body)
                until(lambda: engine._thread.is_alive() and engine.load["waiting"] == 0)
                time.sleep(0.2)
                second = pool.submit(small.send, "/v1/completions", body)
                until(lambda: engine.load["waiting"] == 1)
                status, answer = small.send("/v1/completions", body)
                assert (status, answer["error"]["code"]) == (503, "overloaded")
            for future in (first, second):
                assert future.result(timeout=60)[1]["choices"][0]["text"] == served.answers["first"][0]
        # An answer is sent before its row is gone.
        until(lambda: health(small) == (200, {"status": "ok", "running": 0, "waiting": 0}))
        engine.close()
        assert health(small) == (503, {"status": "closed", "running": 0, "waiting": 0})
        status, answer = small.send("/v1/completions", body)
        assert (status, answer["error"]["code"]) == (503, "closed")


@pytest.mark.parametrize("stream", [False, True])
def test_a_broken_task_is_the_servers_fault(
    served: Served, http: Site, stream: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(served.folder / "first", tmp_path / "copy")
    http.engine.bank.add("copy", tmp_path / "copy")
    shutil.copy(served.folder / "second" / "adapter_model.safetensors", tmp_path / "copy")
    status, answer = http.send("/v1/completions", {"model": "copy", "prompt": "def", "stream": stream})
    http.engine.bank.remove("copy")
    assert (status, answer["error"]["type"]) == (500, "server_error")
    assert "tmp" not in answer["error"]["message"]
    assert "The file was changed since it was added" in caplog.text


def test_a_task_that_is_removed_while_its_request_waits(served: Served) -> None:
    with site(served.engine(rows=1)) as small, ThreadPoolExecutor(2) as pool:
        engine = small.engine
        with halted(engine.bank):
            first = engine.submit(served.request(max_tokens=4))
            until(lambda: engine.load["waiting"] == 0)
            answers = [
                pool.submit(small.send, "/v1/completions", {"model": "second", "prompt": "def", "stream": stream})
                for stream in (False, True)
            ]
            until(lambda: engine.load["waiting"] == 2)
            engine.bank.remove("second")
        for answer in answers:
            status, body = answer.result(timeout=60)
            assert (status, body["error"]["code"]) == (404, "model_not_found")
        assert first.result(timeout=60)


def test_a_task_with_the_models_name(served: Served, engine: Engine) -> None:
    with pytest.raises(ValueError, match="cannot be called 'first', as a task is"):
        create_app(engine, "first")


def test_the_code_of_serving_http_md(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As it stands there, but for the model, which is the tiny one."""
    ask, program, pipe = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "serving-http.md").read_text(), re.DOTALL)
    bank = StateBank(get_peft_model(load_base(), S0Config()).eval(), 2)
    bank.add("sql", served.folder / "first")
    bank.add("chat", served.folder / "second")
    with site(Engine(bank, served.tokenizer)) as running:
        exec(ask.replace("http://127.0.0.1:8000", running.url), {})
    alone = PeftModel.from_pretrained(load_base(), served.folder / "first").eval()
    expected = [complete(model, served.tokenizer, ["def f(x):"], batch_size=1)[0] for model in (alone, load_base())]
    assert capsys.readouterr().out.startswith(f"{expected[0]}\n")
    (tmp_path / "my-tasks").mkdir()
    (tmp_path / "my-tasks" / "sql").symlink_to(served.folder / "first")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(program.replace("Qwen/Qwen3.5-4B", str(FOLDER)).replace('"bfloat16"', '"float32"'), names)
    assert ast.literal_eval(capsys.readouterr().out) == expected
    exec(pipe, names)
    assert names["answers"][0][0]["generated_text"] == f"def f(x):{expected[0]}"
    assert len(names["answers"]) == 2


def test_the_example(served: Served, tmp_path: Path) -> None:
    for task, folder in zip(("right", "one-line"), TASKS, strict=False):
        (tmp_path / task).symlink_to(served.folder / folder)
    command = [sys.executable, str(ROOT / "examples" / "serve.py"), "--output", str(tmp_path), "--prompts", "3"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("3 of 3 answers are those of transformers.") == 3


def test_the_command(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it makes of its options; the example runs it whole."""
    seen: list[Any] = []

    def run(app: Any, host: str, port: int, timeout_graceful_shutdown: int) -> None:
        seen.append((app.title, host, port))
        with TestClient(app) as client:
            seen.append({model["id"] for model in client.get("/v1/models").json()["data"]})
            for name, task in (("own", "first"), ("third", "third"), ("tiny-qwen3.5", "__base__")):
                body = {"model": name, "prompt": PROMPTS[3], "temperature": 0, "max_tokens": 32}
                answer = client.post("/v1/completions", json=body).json()
                seen.append(answer["choices"][0]["text"] == served.answers[task][3])
            seen.append(client.post("/v1/completions", json={**body, "max_tokens": 200}).json()["error"]["code"])

    monkeypatch.setattr(uvicorn, "run", run)
    command = ["serve", str(FOLDER), "--port", "0", "--tasks", str(served.folder), "--max-length", "200"]
    command += ["--task", f"own={served.folder / 'first'}", "--dtype", "float32"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert seen == [
        ("peft-s0", "127.0.0.1", 0),
        {"tiny-qwen3.5", "own", *TASKS},
        *[True] * 3,
        "context_length_exceeded",
    ]
