"""Another program, started in this process with S0 registered."""

from __future__ import annotations

import importlib.util
import os
import runpy
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path


class Program(BaseException):
    """A request to start a program.

    It is raised, and caught where the command line ends. So the program has the process to itself: its exit code, its
    errors and an interrupt are the interpreter's to deal with.

    Args:
        name: a script or a module.
        arguments: what it finds behind its name in `sys.argv`.
        is_module: whether it is a module, as behind `python -m`.
    """

    def __init__(self, name: str, arguments: Sequence[str], is_module: bool) -> None:
        super().__init__(name)
        self.name, self.arguments, self.is_module = name, list(arguments), is_module

    def run(self) -> None:
        """Run it as the interpreter would: `sys.argv`, `sys.path[0]`, `__name__` and `__file__` are its own."""
        folder = os.getcwd() if self.is_module else str(Path(self.name).resolve().parent)  # noqa: PTH109 - as python -m
        if not getattr(sys.flags, "safe_path", False):
            sys.path[0] = folder
        sys.argv = [self.name, *self.arguments]
        if self.is_module and not _is_there(self.name):
            sys.exit(f"peft-s0: error: There is no module '{self.name}'. A script is started by its path, without -m.")
        import peft_s0  # noqa: F401 - registers S0

        if self.is_module:
            runpy.run_module(self.name, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(self.name, run_name="__main__")


def find_script(name: str) -> str:
    """A script by its path, or by its name if it is a command that is written in Python.

    Raises:
        ValueError: if it is neither; the message says what to do.
    """
    if Path(name).exists():
        return name
    command = shutil.which(name)
    if command is None:
        raise ValueError(f"There is no script '{name}' and no command of that name. A module is started by -m {name}.")
    # What pip writes for a command: a script, if need be behind some lines for the shell.
    with Path(command).open("rb") as file:
        beginning = file.read(2000)
    if not beginning.startswith(b"#!") or b"python" not in beginning:
        raise ValueError(f"The command '{command}' is no script in Python, so it cannot be started with S0 registered.")
    return command


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False  # nor is the package that it would be in
