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

import json
import os
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path

from miniature.task import INPUTS, Problem

_RUNNER = Path(__file__).with_name("runner.py")
_CPU_SECONDS = 1
_WALL_SECONDS = 3
_BYTES = 256 << 20
_PROGRAMS_PER_CHILD = 256 if hasattr(os, "fork") else 1


def passes(problems: list[Problem], programs: list[str]) -> list[bool]:
    """Whether each program solves its problem: defines the function and returns the right integer for every input.

    Args:
        problems: The problems.
        programs: One complete program for each, prompt included.
    """
    tasks = [(problem.name, program) for problem, program in zip(problems, programs, strict=True)]
    reports = _run_all(tasks)
    return [
        reports[task] == json.dumps([problem.answer(x) for x in INPUTS])
        for problem, task in zip(problems, tasks, strict=True)
    ]


def _run_all(tasks: list[tuple[str, str]]) -> dict[tuple[str, str], str | None]:
    """The report on each task, a function's name and a program; repeated ones are run once."""
    reports: dict[tuple[str, str], str | None] = {}
    pending = list(dict.fromkeys(tasks))
    while pending:
        batch = pending[:_PROGRAMS_PER_CHILD]
        answers: list[str | None] = [*_run_batch(batch)]
        if len(answers) < len(batch):
            answers.append(None)  # the child was brought down by the program it was running; the rest go to another
        reports.update(zip(batch, answers, strict=False))
        pending = pending[len(answers) :]
    return reports


def _run_batch(batch: list[tuple[str, str]]) -> list[str]:
    """What one child reports on its programs, in order; fewer reports than programs if the child did not survive."""
    token = secrets.token_hex(16)
    order = {
        "token": token,
        "inputs": INPUTS,
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
