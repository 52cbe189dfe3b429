"""Blocks of code in the answers of chat models."""

import re

_BLOCK = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n`]*\n(.*?)^[ \t]*```[ \t]*$", re.DOTALL | re.MULTILINE)


def last_block(answer: str, language: str, holding: str = "") -> str:
    """The last block of a language in an answer.

    If no block is said to be in it, the last that is in none; if there is none either, the answer itself.

    Args:
        answer: What the model wrote.
        language: The beginning of its names in small letters: "py" for py, python, Python, python3.
        holding: Blocks that hold this text go before others: a function goes before examples of its use.
    """
    blocks = _BLOCK.findall(answer)
    named = [code for name, code in blocks if name.lower().startswith(language)]
    codes = named or [code for name, code in blocks if not name] or [answer]
    return ([code for code in codes if holding in code] or codes)[-1]
