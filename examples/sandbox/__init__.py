"""Runs generated programs apart from everything else, and hands back what they return.

The measures: a child process in Python's isolated mode, with an empty environment, an empty temporary folder to work in
and no descriptors but its pipes; in it a fork for each program, with limits on processor time, wall-clock time and
memory, without a right to start processes or threads or to write to files. On Linux, where the system allows namespaces
(to root, and mostly to others; in containers mostly not), programs also see no network, no process but their own, and
no files but those of Python and of the system's libraries, which they can only read. A program that breaks a limit
fails alone.

Root's processes are spared the limit on processes, so root's programs run as the user nobody.

The child reports what programs return and does not know what they should return; the comparison happens in this
process. Its reports carry a token, fresh for each child, that programs are not given, so that no output of a program is
taken for a report.

What this is not: a virtual machine. A program that knows a hole in the kernel gets out. And where a program must be
judged inside its own process, as `run_checks` does, one that is out to deceive its judge can.

`missing` says, by trying, which of the measures do not hold here. Windows has neither fork nor limits: there each
program has a child to itself and only its time is limited.
"""

import json
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_RUNNER = Path(__file__).with_name("runner.py")
_PROGRAMS_PER_CHILD = 256 if hasattr(os, "fork") else 1

Program = tuple[str, tuple[str, ...]]
"""A program and the calls whose values are asked for, expressions such as `total(3)`."""


@dataclass(frozen=True)
class Limits:
    """What one program may use.

    Args:
        seconds: Of the clock.
        cpu_seconds: Of the processor, whole ones.
        memory: Bytes of address space, the interpreter's included.
        report: Bytes of the JSON text of what its calls return.
    """

    seconds: float = 3
    cpu_seconds: int = 1
    memory: int = 256 << 20
    report: int = 1 << 16


def run(programs: Sequence[Program], limits: Limits | None = None, readable: Sequence[Path] = ()) -> list[str | None]:
    """Runs programs, and gives for each the JSON text, with sorted keys, of the list of its calls' values.

    Of a program that failed it gives another text, or None if the program brought down its surroundings. Programs
    that are alike are run once.

    Args:
        programs: Sources and calls.
        limits: What each may use.
        readable: Files and folders that programs may read beside Python's own, where the system keeps files from them.
    """
    limits = limits or Limits()
    reports: dict[Program, str | None] = {}
    pending = list(dict.fromkeys(programs))
    while pending:
        batch = pending[:_PROGRAMS_PER_CHILD]
        answers: list[str | None] = [*_run_batch(batch, limits, [str(path.resolve()) for path in readable])]
        if len(answers) < len(batch):
            answers.append(None)  # the child was brought down by the program it was running; the rest go to another
        reports.update(zip(batch, answers, strict=False))
        pending = pending[len(answers) :]
    return [reports[program] for program in programs]


def run_checks(programs: Sequence[Program], limits: Limits | None = None) -> list[bool]:
    """Whether each program gets through to its end and all its calls, such as `check(total)`, come back without error.

    The calls are its last lines, so that nothing that a program puts in the place of `eval` makes them. A token that is
    asked for afterwards tells this from a program that ends its process, or writes a report of its own, before.
    """
    token = secrets.token_hex(8)
    # Behind an empty line, which a last line that goes on, such as `if False: \`, cannot take in.
    reports = run([("\n".join([source, "", *calls]), (repr(token),)) for source, calls in programs], limits)
    return [report == f'["{token}"]' for report in reports]


def _run_batch(batch: Sequence[Program], limits: Limits, readable: list[str]) -> list[str]:
    """What one child reports on its programs, in order; fewer reports than programs if the child did not survive."""
    token = secrets.token_hex(16)
    order = {"token": token, **vars(limits), "readable": readable, "programs": batch}
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
                timeout=10 + limits.seconds * len(batch),
            ).stdout
        except subprocess.TimeoutExpired as expired:
            output = expired.stdout or b""
    marker = json.dumps([token])[:-1].encode()
    return [json.loads(line)[1] for line in output.splitlines() if line.startswith(marker)]


_PROBE = """
import os

def succeeds(action):
    try:
        action()
    except (OSError, MemoryError, RuntimeError):
        return False
    return True

def fork():
    if os.fork() == 0:
        os._exit(0)

def interfaces():
    import socket
    if any(name != "lo" for _, name in socket.if_nameindex()):
        return
    raise OSError

def imports():
    import ctypes, decimal, hashlib, sqlite3, typing
"""

MEASURES = {
    "processes": "programs can start processes, without number",
    "memory": "programs can use as much memory as they like",
    "network": "programs can reach the network",
    "files": "programs can read and remove files of this machine",
    "library": "programs cannot import Python's own modules, so that right ones fail",
}
"""What a user is told if a measure does not hold."""


@cache
def missing() -> tuple[str, ...]:
    """The measures that do not hold here, by their names in `MEASURES`: a program is let loose on each."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "file")
        file.write_text("a file of the user")
        file.parent.chmod(0o777)
        attempts = {
            "processes": "succeeds(fork)",
            "memory": f"succeeds(lambda: bytearray({2 * Limits().memory}))",
            "network": "succeeds(interfaces)",
            "files": f"succeeds(lambda: os.remove({str(file)!r}))",
            "library": "not succeeds(imports)",
        }
        # Each to itself, for the probe of one may end in another's failure.
        reports = run([(_PROBE, (attempt,)) for attempt in attempts.values()])
    return tuple(name for name, report in zip(attempts, reports, strict=True) if report != "[false]")


def allow(allowed: bool, unconfined: bool) -> None:
    """Lets a script run generated programs, if its user said so and what keeps them apart holds.

    Args:
        allowed: Whether the user passed --allow-code-execution.
        unconfined: Whether the user passed --unconfined.

    Raises:
        PermissionError: If not.
    """
    if not allowed:
        raise PermissionError(
            "This runs programs that a model writes, on this machine. Pass --allow-code-execution if you want that."
        )
    complaints = [MEASURES[name] for name in missing()]
    if complaints and not unconfined:
        raise PermissionError(
            f"Generated programs cannot be kept apart here: {'; '.join(complaints)}. Run this where Linux namespaces "
            "are allowed, or in a container or virtual machine made for the purpose and with --unconfined as well."
        )
    _warn_once(tuple(complaints))


@cache
def _warn_once(complaints: tuple[str, ...]) -> None:
    line = "!" * 100
    held = (
        f"NOT ALL IS KEPT FROM THEM: {'; '.join(complaints)}."
        if complaints
        else ("They have no network, no files, no processes and little memory; a hole in the kernel lets them out.")
    )
    print(f"{line}\nWARNING: programs that a model writes are run on this machine.\n{held}\n{line}", file=sys.stderr)
