"""What the frozen model itself writes, sorted into right and wrong by running it: the data of every example."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import TypeVar

from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from miniature.evaluate import solve
from miniature.task import Problem

_PROBLEMS_AT_ONCE = 64
_TRIES = 8

T = TypeVar("T")


def collect(candidates: Iterator[T], number: int, description: str) -> list[T]:
    """The first `number` of an endless stream, under a progress bar."""
    return list(tqdm(islice(candidates, number), desc=description, total=number, unit="problem"))


def attempts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stream: Iterator[Problem], only_failed: bool = True
) -> Iterator[tuple[Problem, list[str], list[str]]]:
    """Problems with the right and the wrong ones of eight samples; `only_failed`: that the greedy answer gets wrong."""
    while True:
        batch = list(islice(stream, _PROBLEMS_AT_ONCE))
        solved = solve(model, tokenizer, batch)[1] if only_failed else [False] * len(batch)
        unsolved = [problem for problem, right in zip(batch, solved, strict=True) if not right]
        tries = [problem for problem in unsolved for _ in range(_TRIES)]
        bodies, verdicts = solve(model, tokenizer, tries, temperature=1.0)
        for number, problem in enumerate(unsolved):
            own = slice(number * _TRIES, (number + 1) * _TRIES)
            sorted_bodies: dict[bool, list[str]] = {True: [], False: []}
            for body, verdict in zip(bodies[own], verdicts[own], strict=True):
                sorted_bodies[verdict].append(body)
            yield problem, sorted_bodies[True], sorted_bodies[False]


def own_solutions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    stream: Iterator[Problem],
    wanted: Callable[[str], bool] = lambda program: True,
    only_failed: bool = True,
) -> Iterator[tuple[Problem, str]]:
    """The problems of `attempts` with a program that is right when run and `wanted`: the first such."""
    for problem, right, _ in attempts(model, tokenizer, stream, only_failed):
        for body in right:
            if wanted(problem.prompt + body):
                yield problem, body
                break


def own_pairs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stream: Iterator[Problem]
) -> Iterator[tuple[Problem, str, str]]:
    """The problems of `attempts` with both a program that passes and one that fails: the first such."""
    for problem, right, wrong in attempts(model, tokenizer, stream):
        if right and wrong:
            yield problem, right[0], wrong[0]
