"""A model's answers to problems: batched generation, and grading by running what was written."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

import sandbox
from fences import last_block
from tasks import Row, Task, database, pose


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: greedily at temperature 0."""

    temperature: float = 0.0
    top_p: float = 1.0

    @property
    def arguments(self) -> dict[str, Any]:
        """For `generate`; all that a model's own generation config may say otherwise is said."""
        if self.temperature == 0.0:
            return {"do_sample": False, "repetition_penalty": 1.0}
        return {
            "do_sample": True,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": 0,
            "repetition_penalty": 1.0,
        }


GREEDY = Sampling()
PAPER = Sampling(temperature=0.7, top_p=0.95)
"""The paper's sampling, in collecting solutions."""


@dataclass(frozen=True)
class Answer:
    """What a model wrote, and whether it is right."""

    problem: int
    completion: str
    passed: bool


@dataclass
class Student:
    """A model, tuned or not, and how it is asked.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        batch_size: How many prompts are answered at a time.
        new_tokens: The longest answer; None for the task's.
    """

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    batch_size: int = 16
    new_tokens: int | None = None

    @property
    def chat(self) -> bool:
        """Whether it is asked in messages."""
        return self.tokenizer.chat_template is not None

    def prompt(self, task: Task, row: Row) -> str:
        """The whole text that it goes on from. Templates that know of thinking have it off."""
        text = pose(task, row, self.chat)
        if not self.chat:
            return text
        return self.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )

    def prompt_ids(self, prompt: str) -> list[int]:
        """The tokens of a prompt. A chat template writes all special tokens by itself."""
        return self.tokenizer(prompt, add_special_tokens=not self.chat)["input_ids"]


def load_student(name: str, dtype: torch.dtype, device: str, batch_size: int, new_tokens: int | None) -> Student:
    """The frozen model of a folder or of the Hub."""
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device).eval()
    return Student(model, AutoTokenizer.from_pretrained(name), batch_size, new_tokens)


@torch.inference_mode()
def generate(
    student: Student, prompts: Sequence[str], new_tokens: int, sampling: Sampling, seed: int, description: str
) -> list[str]:
    """One completion for each prompt, in the order of the prompts.

    Prompts of like length share a batch and are padded on the left, with a mask that hides the pads; so a greedy answer
    is what the prompt would get by itself.
    """
    model, tokenizer = student.model.eval(), student.tokenizer
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    config = GenerationConfig(
        max_new_tokens=student.new_tokens or new_tokens,
        pad_token_id=pad,
        bos_token_id=model.generation_config.bos_token_id,
        eos_token_id=model.generation_config.eos_token_id or tokenizer.eos_token_id,
        **sampling.arguments,
    )
    torch.manual_seed(seed)
    ids = [student.prompt_ids(prompt) for prompt in prompts]
    longest_first = sorted(range(len(ids)), key=lambda place: -len(ids[place]))
    completions = [""] * len(ids)
    batches = range(0, len(ids), student.batch_size)
    for start in tqdm(batches, desc=description, unit="batch", leave=False, disable=None):
        places = longest_first[start : start + student.batch_size]
        width = len(ids[places[0]])
        rows = [[pad] * (width - len(ids[place])) + ids[place] for place in places]
        mask = [[0] * (width - len(ids[place])) + [1] * len(ids[place]) for place in places]
        inputs = {
            "input_ids": torch.tensor(rows, device=model.device),
            "attention_mask": torch.tensor(mask, device=model.device),
        }
        sequences = model.generate(**inputs, generation_config=config)
        texts = tokenizer.batch_decode(sequences[:, width:], skip_special_tokens=True)
        for place, text in zip(places, texts, strict=True):
            completions[place] = text
    return completions


def program_of(row: Row, completion: str, chat: bool) -> str:
    """The program that a completion gives.

    A chat model's block follows the prompt, whose imports and helpers it may need and whose function it defines anew.
    Without a chat template the completion goes on with the prompt.
    """
    if not chat:
        return row["prompt"] + completion
    block = last_block(completion, "py", holding=f"def {row['entry_point']}(")
    return f"{row['prompt']}\n{block}"


def grade_programs(task: Task, rows: Sequence[Row], completions: Sequence[str], chat: bool) -> list[bool]:
    """Whether each program passes its problem's `check`."""
    programs = [
        (f"{program_of(row, completion, chat)}\n\n{row['test']}", (f"check({row['entry_point']})",))
        for row, completion in zip(rows, completions, strict=True)
    ]
    limits = sandbox.Limits(seconds=task.seconds, cpu_seconds=int(task.seconds), memory=1 << 30)
    return sandbox.run_checks(programs, limits)


_QUERY = """
import sqlite3

def rows(path, query):
    connection = sqlite3.connect("file:" + path + "?mode=ro&immutable=1", uri=True)
    connection.execute("PRAGMA temp_store = MEMORY")  # what is sorted, for there is no place to write
    connection.text_factory = lambda text: text.decode(errors="replace")
    return [[value.hex() if isinstance(value, bytes) else value for value in row] for row in connection.execute(query)]
"""


def grade_queries(
    task: Task, rows: Sequence[Row], completions: Sequence[str], chat: bool, databases: Path
) -> list[bool]:
    """Whether each query gives the rows of the problem's own, on its database, which is only read.

    The order of rows counts if the problem's own query asks for one, the order of columns never does.
    """

    def program(row: Row, query: str) -> sandbox.Program:
        path = database(row["db_id"], databases).resolve().as_uri().removeprefix("file://")
        return _QUERY, (f"rows({path!r}, {query!r})",)

    queries = [last_block(completion, "sql") if chat else completion for completion in completions]
    asked = [program(row, query) for row, query in zip(rows, queries, strict=True)]
    expected = [program(row, row["query"]) for row in rows]
    limits = sandbox.Limits(seconds=task.seconds, cpu_seconds=int(task.seconds), memory=1 << 30, report=16 << 20)
    reports = sandbox.run([*expected, *asked], limits, readable=[databases])
    own, given = reports[: len(rows)], reports[len(rows) :]
    return [
        same_rows(_table(right, row), _table(answer), ordered="order by" in row["query"].lower())
        for row, right, answer in zip(rows, own, given, strict=True)
    ]


def _table(report: str | None, row: Row | None = None) -> list[list[Any]] | None:
    """The rows that a query gave; None if it failed, which a problem's own query (of `row`) must not."""
    if report is not None and report.startswith("["):
        return json.loads(report)[0]
    if row is not None:
        raise ValueError(f"spider: the query {row['query']!r} of {row['db_id']!r} fails on its database ({report}).")
    return None


def same_rows(right: list[list[Any]] | None, given: list[list[Any]] | None, ordered: bool) -> bool:
    """Whether two tables hold the same rows, as often, with columns in whatever order; rows in order if `ordered`."""
    if right is None or given is None or len(right) != len(given):
        return False
    columns, others = list(zip(*right, strict=True)), list(zip(*given, strict=True))
    if len(columns) != len(others):
        return False
    if ordered:
        return Counter(columns) == Counter(others)

    def agree(taken: list[int]) -> bool:
        # Column by column, and only on while the rows so far agree: few orders of columns are ever tried.
        number = len(taken)
        given_so_far = zip(*(others[place] for place in taken), strict=True)
        if Counter(zip(*columns[:number], strict=True)) != Counter(given_so_far):
            return False
        free = [place for place in range(len(others)) if place not in taken]
        return not free or any(agree([*taken, place]) for place in free)

    return agree([])


def answer(
    student: Student,
    task: Task,
    rows: Sequence[Row],
    problems: Sequence[int],
    sampling: Sampling,
    seed: int,
    databases: Path | None = None,
) -> list[Answer]:
    """One graded answer to each of the `problems`, which are places in `rows`; for tasks whose answers are run."""
    chosen = [rows[problem] for problem in problems]
    prompts = [student.prompt(task, row) for row in chosen]
    completions = generate(student, prompts, task.new_tokens, sampling, seed, f"{task.name}, {len(prompts)} problems")
    if not student.chat:
        completions = [re.split(task.stop, completion, maxsplit=1)[0] for completion in completions]
    if task.name == "spider":
        assert databases is not None, "the rows were loaded with it"
        passed = grade_queries(task, chosen, completions, student.chat, databases)
    else:
        passed = grade_programs(task, chosen, completions, student.chat)
    return [Answer(*values) for values in zip(problems, completions, passed, strict=True)]
