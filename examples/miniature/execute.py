"""Runs generated programs and says which are right.

WARNING. This is not a sandbox. Programs run as ordinary processes on this machine, and a program written to do harm can
do harm: it can read what the user can read and talk to the network. The measures here are against the accidents of a
small model whose vocabulary holds no more than arithmetic, such as endless loops and numbers that fill the memory. To
run what a capable model writes, use a container or a virtual machine made for the purpose.

The measures: a child process in Python's isolated mode, with an empty environment, an empty temporary folder to work in
and no descriptors but its pipes; in it a fork for each program, with limits on processor time, wall-clock time, memory,
processes and the size of files. A program that breaks a limit fails alone. The child reports what programs return and
does not know what they should return, the comparison happens here; and its reports carry a token, fresh for each child,
that programs are not given. On Windows, which has neither fork nor limits, each program has a child to itself and only
its time is limited.
"""

import ast
import json
import os
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path

_RUNNER = Path(__file__).with_name("runner.py")
_CPU_SECONDS = 1
_WALL_SECONDS = 3
_BYTES = 256 << 20
_PROGRAMS_PER_CHILD = 256 if hasattr(os, "fork") else 1


_Task = tuple[str, tuple[str, ...]]
"""A program and the calls whose values are asked for."""


def passes(programs: list[str], tests: list[list[str]]) -> list[bool]:
    """Whether each program passes its tests: every call returns the right value, of the right type.

    Args:
        programs: Complete programs, prompt included.
        tests: For each program its tests, as `calls_and_values` reads them. Values are compared as JSON.

    Raises:
        ValueError: If the tests of a program cannot be read.
    """
    tasks, expected = [], []
    for program, asserts in zip(programs, tests, strict=True):
        calls, values = calls_and_values(asserts)
        tasks.append((program, calls))
        expected.append(json.dumps(values))
    reports = _run_all(tasks)
    return [reports[task] == values for task, values in zip(tasks, expected, strict=True)]


def calls_and_values(tests: list[str]) -> tuple[tuple[str, ...], tuple[object, ...]]:
    """What tests such as `assert total(3) == 12` call, which a program's process is told, and what must come back.

    Args:
        tests: At least one test. The value is a literal that JSON can write.

    Raises:
        ValueError: If there is no test, which every program would pass, or one does not read like that; it is quoted.
    """
    if not tests:
        raise ValueError("A program needs at least one test, such as 'assert total(3) == 12'; found none.")
    calls, values = zip(*map(_call_and_value, tests), strict=True)
    return calls, values


def _call_and_value(test: str) -> tuple[str, object]:
    try:
        match ast.parse(test).body:
            case [ast.Assert(test=ast.Compare(left=call, ops=[ast.Eq()], comparators=[literal]))]:
                value = ast.literal_eval(literal)
                json.dumps(value)
                return ast.unparse(call), value
            case _:
                raise ValueError("not a single comparison")
    except (SyntaxError, TypeError, ValueError) as error:
        raise ValueError(
            f"A test must read 'assert call == value' with a literal that JSON can write, got {test!r} ({error})."
        ) from error


def _run_all(tasks: list[_Task]) -> dict[_Task, str | None]:
    """The report on each task; repeated ones are run once."""
    reports: dict[_Task, str | None] = {}
    pending = list(dict.fromkeys(tasks))
    while pending:
        batch = pending[:_PROGRAMS_PER_CHILD]
        answers: list[str | None] = [*_run_batch(batch)]
        if len(answers) < len(batch):
            answers.append(None)  # the child was brought down by the program it was running; the rest go to another
        reports.update(zip(batch, answers, strict=False))
        pending = pending[len(answers) :]
    return reports


def _run_batch(batch: list[_Task]) -> list[str]:
    """What one child reports on its programs, in order; fewer reports than programs if the child did not survive."""
    token = secrets.token_hex(16)
    order = {
        "token": token,
        "cpu_seconds": _CPU_SECONDS,
        "wall_seconds": _WALL_SECONDS,
        "bytes": _BYTES,
        "programs": batch,
    }
    # Windows starts no process without this one.
    environment = {name: os.environ[name] for name in ("SYSTEMROOT",) if name in os.environ}
    with tempfile.TemporaryDirectory() as folder:
        try:
            output = subprocess.run(
                [sys.executable, "-I", "-S", str(_RUNNER)],
                input=json.dumps(order).encode(),
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                env=environment,
                timeout=10 + _WALL_SECONDS * len(batch),
            ).stdout
        except subprocess.TimeoutExpired as expired:
            output = expired.stdout or b""
    marker = json.dumps([token])[:-1].encode()
    return [json.loads(line)[1] for line in output.splitlines() if line.startswith(marker)]
