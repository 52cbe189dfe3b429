"""The four tasks of the paper: where their problems come from, how they are posed, and how they are loaded.

A data set comes from the Hub, or from JSON-lines files in the same schema: `DATA/humaneval/test.jsonl` for the split
"test" of HumanEval. Each row is checked against the schema before anything is generated.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import load_dataset
from jinja2 import Environment, StrictUndefined

Row = dict[str, Any]
_TEMPLATES = Environment(undefined=StrictUndefined, keep_trailing_newline=True)


@dataclass(frozen=True)
class Part:
    """Some of the problems of a split, from `start` to before `stop`; all that there are if `stop` is None."""

    split: str
    start: int = 0
    stop: int | None = None

    def indices(self, size: int) -> list[int]:
        """Their places in a split of so many rows."""
        return list(range(size))[self.start : self.stop]


@dataclass(frozen=True)
class Task:
    """A task.

    Args:
        name: What it is called here, and its folder of local files.
        hub: The data set on the Hub.
        config: Its configuration there.
        fields: The columns that are used, and their types.
        train: The problems that the model's own solutions are collected from.
        held_out: The problems that are evaluated on.
        prompt: A Jinja template of a row: what a chat model is asked.
        text: The same for a model without a chat template, which goes on from there.
        stop: Where such a model has gone on to something else: its answer ends before. A regular expression, of the
            harness's tasks plain text.
        new_tokens: The longest answer.
        harness: For tasks that lm-evaluation-harness scores: its own file for the task.
        metric: The score there that counts.
        seconds: For tasks whose answers are run: how long one may take.
    """

    name: str
    hub: str
    config: str | None
    fields: dict[str, type]
    train: Part
    held_out: Part
    prompt: str
    text: str
    stop: str
    new_tokens: int
    harness: str | None = None
    metric: str | None = None
    seconds: float = 10

    @property
    def runs_answers(self) -> bool:
        """Whether what the model writes is run, rather than read."""
        return self.harness is None


TASKS = {
    task.name: task
    for task in (
        # The paper's split: 0 to 79 to collect from, the other 84 to evaluate on.
        Task(
            name="humaneval",
            hub="openai/openai_humaneval",
            config=None,
            fields={"task_id": str, "prompt": str, "test": str, "entry_point": str},
            train=Part("test", 0, 80),
            held_out=Part("test", 80),
            prompt="Complete this Python function. Answer with one block of code that holds the whole function.\n\n"
            "```python\n{{prompt}}\n```",
            text="{{prompt}}",
            stop=r"\n(?=[^\s#])",  # the first line after the function
            new_tokens=768,
        ),
        # Of the other tasks the paper does not say which problems it collects from: as many as of HumanEval.
        Task(
            name="gsm8k",
            hub="openai/gsm8k",
            config="main",
            fields={"question": str, "answer": str},
            train=Part("train", 0, 80),
            held_out=Part("test"),
            prompt="{{question}}\n\nThink step by step, and end with a sentence that says: The answer is",
            text="Question: {{question}}\nAnswer:",
            stop="\nQuestion:",
            new_tokens=768,
            harness="gsm8k/gsm8k-cot-zeroshot.yaml",
            metric="exact_match,flexible-extract",
        ),
        Task(
            name="math500",
            hub="HuggingFaceH4/MATH-500",
            config=None,
            fields={"problem": str, "solution": str, "answer": str},
            train=Part("test", 0, 80),
            held_out=Part("test", 80),
            prompt="{{problem}}\n\nThink step by step, and put the final answer in \\boxed{}.",
            text="Problem: {{problem}}\nSolution:",
            stop="\nProblem:",
            new_tokens=1536,
            harness="minerva_math/minerva_math500.yaml",
            metric="math_verify,none",
        ),
        Task(
            name="spider",
            hub="xlangai/spider",
            config=None,
            fields={"db_id": str, "question": str, "query": str},
            train=Part("train", 0, 80),
            held_out=Part("validation"),
            prompt="{{schema}}\n\nWrite a SQLite query for this question: {{question}}\nAnswer with one block of SQL.",
            text="{{schema}}\n-- {{question}}\n",
            stop=r";|\n\n|\n--",
            new_tokens=256,
            seconds=30,
        ),
    )
}


def pose(task: Task, row: Row, chat: bool) -> str:
    """What a model is asked: the text of the user's message, or of the whole prompt where there is no chat template."""
    return _TEMPLATES.from_string(task.prompt if chat else task.text).render(**row)


def local_file(task: Task, split: str, data: Path) -> Path:
    """The JSON-lines file of a split in a folder of local data."""
    return data / task.name / f"{split}.jsonl"


def load(task: Task, split: str, data: Path | None = None, databases: Path | None = None) -> list[Row]:
    """The rows of a split.

    Args:
        task: The task.
        split: Its split.
        data: A folder of local files, or None for the Hub.
        databases: For Spider: the folder `database` of its archive, `DATABASES/{db_id}/{db_id}.sqlite`.

    Raises:
        FileNotFoundError: If there is no such local file or database.
        ValueError: If a column is missing or of another type.
    """
    if data is None:
        source = f"{task.hub} on the Hub, split {split!r}"
        rows = load_dataset(task.hub, task.config, split=split)
    else:
        file = local_file(task, split, data)
        source = str(file)
        if not file.exists():
            raise FileNotFoundError(
                f"{task.name}: no file {file}, which should hold the split {split!r} of {task.hub}."
            )
        rows = load_dataset("json", data_files=str(file), split="train")
    if absent := sorted(task.fields.keys() - {*rows.column_names}):
        raise ValueError(f"{task.name}: {source} must have the columns {sorted(task.fields)}; {absent} not found.")
    kept = []
    for number, row in enumerate(rows):
        for name, kind in task.fields.items():
            if not isinstance(row[name], kind):
                raise ValueError(
                    f"{task.name}: row {number} of {source} must have a {kind.__name__} in {name!r}, got {row[name]!r}."
                )
        kept.append(dict(row))
    if task.name == "spider":
        _add_schemas(kept, databases)
    return kept


def database(db_id: str, databases: Path) -> Path:
    """The file of one of Spider's databases."""
    return databases / db_id / f"{db_id}.sqlite"


def _add_schemas(rows: list[Row], databases: Path | None) -> None:
    """Adds the statements that made its tables to each row."""
    if databases is None:
        raise ValueError(
            "spider: its databases are not on the Hub. Name the folder 'database' of Spider's archive with --databases."
        )
    schemas: dict[str, str] = {}
    for row in rows:
        if row["db_id"] not in schemas:
            file = database(row["db_id"], databases)
            if not file.exists():
                raise FileNotFoundError(
                    f"spider: no database {file}; --databases should hold DB/DB.sqlite for each DB."
                )
            with closing(sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro&immutable=1", uri=True)) as connection:
                tables = connection.execute("SELECT sql FROM sqlite_master WHERE type = 'table' AND sql IS NOT NULL")
                schemas[row["db_id"]] = "\n".join(f"{sql};" for (sql,) in tables)
        row["schema"] = schemas[row["db_id"]]
