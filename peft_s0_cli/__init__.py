"""The command line, `peft-s0`.

A package of its own, because importing peft_s0 imports torch, transformers and PEFT, and neither `--help` nor a shell's
completions must wait for them. The commands import peft_s0 when they run.
"""

from .app import app
from .program import Program


def main() -> None:
    """Run the command line, and the program that it was asked to start, if any, when nothing of itself is left."""
    program = None
    try:
        app(prog_name="peft-s0")
    except Program as request:
        program = request
    if program is not None:
        program.run()


__all__ = ["app", "main"]
