"""Says which generated programs are right, by running them. See `sandbox` for what is kept from them."""

import ast
import json

import sandbox


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
        expected.append(json.dumps(values, sort_keys=True))
    return [report == values for report, values in zip(sandbox.run(tasks), expected, strict=True)]


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
                json.dumps(value, sort_keys=True)
                return ast.unparse(call), value
            case _:
                raise ValueError("not a single comparison")
    except (SyntaxError, TypeError, ValueError) as error:
        raise ValueError(
            f"A test must read 'assert call == value' with a literal that JSON can write, got {test!r} ({error})."
        ) from error
