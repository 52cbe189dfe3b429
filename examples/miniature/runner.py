"""The child process of `execute`: runs programs, each in a process of its own, and reports what they return.

Started as `python -I runner.py`. It reads one JSON object from standard input,

    {"token": ..., "cpu_seconds": ..., "wall_seconds": ..., "bytes": ..., "programs": [[source, calls], ...]}

and writes one JSON line for each program, in order, to standard output: `[token, report]`. The report is the JSON text
of the list of values of the program's `calls`, expressions such as `total(3)`, or something else if the program failed.
Which values are right is never known here.

This withstands the clumsy mistakes of a small model. It is NOT a sandbox: see `execute`.
"""

import contextlib
import json
import os
import select
import signal
import sys
import time

try:
    import resource
except ImportError:  # Windows: the parent still limits the time
    resource = None

_LONGEST_REPORT = 1 << 16
_NOBODY = 65534


def _report(source: str, calls: list[str]) -> str:
    """Runs a program in this very process."""
    namespace: dict = {"__name__": "program"}
    try:
        exec(compile(source, "program", "exec"), namespace)
        return json.dumps([eval(call, namespace) for call in calls])
    except BaseException as error:  # SystemExit and KeyboardInterrupt too: whatever a program raises is its own failure
        return type(error).__name__


def _limit(name: str, value: int) -> None:
    """Sets a resource limit where the platform has it; macOS refuses some."""
    with contextlib.suppress(AttributeError, ValueError, OSError):
        resource.setrlimit(getattr(resource, name), (value, value))


def _confine(pipe: int, order: dict) -> None:
    """Takes from this process what a program has no use for; of the descriptors only the pipe is left, as number 3."""
    os.setsid()
    os.dup2(pipe, 3)
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    os.closerange(4, 64)
    if os.geteuid() == 0:  # the limit on processes does not bind root
        with contextlib.suppress(OSError):  # containers may not know the user
            os.setgroups([])
            os.setgid(_NOBODY)
            os.setuid(_NOBODY)
    _limit("RLIMIT_CPU", order["cpu_seconds"])
    _limit("RLIMIT_AS", order["bytes"])
    _limit("RLIMIT_DATA", order["bytes"])
    _limit("RLIMIT_FSIZE", 0)
    _limit("RLIMIT_CORE", 0)
    _limit("RLIMIT_NPROC", 0)


def _report_of_fork(source: str, calls: list[str], order: dict) -> str:
    """Runs a program in a fork of this process and kills whatever is left of it when it has reported or is late."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            _confine(writer, order)
            order["token"] = None
            os.write(3, _report(source, calls).encode())
        finally:  # a program may have closed the pipe; in no case may its process go on as if it were the runner
            os._exit(0)
    os.close(writer)
    report = b""
    deadline = time.monotonic() + order["wall_seconds"]
    while len(report) < _LONGEST_REPORT:
        ready, _, _ = select.select([reader], [], [], max(0.0, deadline - time.monotonic()))
        part = os.read(reader, _LONGEST_REPORT) if ready else b""
        if not part:
            break
        report += part
    os.close(reader)
    for kill in (os.kill, os.killpg):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return report.decode(errors="replace")


def main() -> None:
    """Reads the order, runs the programs, writes the reports."""
    order = json.load(sys.stdin)
    for source, calls in order["programs"]:
        forks = hasattr(os, "fork")
        report = _report_of_fork(source, calls, order) if forks else _report(source, calls)
        # The line break first: where there is no fork, a program's own output may stand before it.
        sys.__stdout__.write("\n" + json.dumps([order["token"], report]) + "\n")
        sys.__stdout__.flush()


if __name__ == "__main__":
    main()
