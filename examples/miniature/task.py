"""The problem family, the authors who solve it, the corpus they leave behind and its tokenizer.

A problem is a short recipe in words; a solution is a Python function that follows it step by step:

    def total(x):
        \"\"\"add 3, then double, then square\"\"\"
        return ((x + 3) * 2) ** 2

A document of the corpus holds one to four functions by *one* author, and the author is never named. Authors differ in
habits: some are right, some forget parentheses, some leave stubs. To predict a document well a model must therefore
work out who is writing and remember it, and a recurrent layer remembers in its state. At a bare prompt nothing is
known of the author and the model falls back on the commonest habit, which is to forget the parentheses.
"""

import ast
import operator
import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

if TYPE_CHECKING:
    from datasets import Dataset

INPUTS = tuple(range(-4, 5))
"""The arguments a solution is run on."""

PAD, BOS, EOS, UNKNOWN = "<pad>", "<bos>", "<eos>", "<unk>"

_APPLY = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
    "%": operator.mod,
    "**": operator.pow,
}
_INDENT = "\n    "
_NAMES = ("apply", "calc", "change", "compute", "convert", "f", "g", "helper", "run", "step", "total", "update")


@dataclass(frozen=True)
class Step:
    """One instruction, such as "add 3", and what it does to x: `x + 3`."""

    words: str
    symbol: str
    operand: int


_DIGITS = range(2, 10)
_FAMILIES: tuple[tuple[Step, ...], ...] = (
    tuple(Step(f"{verb} {k}", symbol, k) for verb, symbol in (("add", "+"), ("subtract", "-")) for k in _DIGITS),
    tuple(Step(f"multiply by {k}", "*", k) for k in _DIGITS),
    (Step("double", "*", 2), Step("triple", "*", 3), Step("halve", "//", 2)),
    (Step("square", "**", 2),),
)


@dataclass(frozen=True)
class Problem:
    """A function to write: its name and the steps it must take, in order."""

    name: str
    steps: tuple[Step, ...]

    @property
    def recipe(self) -> str:
        """The steps in words."""
        return ", then ".join(step.words for step in self.steps)

    @property
    def prompt(self) -> str:
        """The head of the function and its docstring; a solution goes on from here."""
        return f'def {self.name}(x):{_INDENT}"""{self.recipe}"""'

    def answer(self, x: int) -> int:
        """What a right solution returns for x."""
        for step in self.steps:
            x = _APPLY[step.symbol](x, step.operand)
        return x

    @property
    def tests(self) -> list[str]:
        """What a right solution satisfies: `assert total(3) == 144`, for each of the inputs."""
        return [f"assert {self.name}({x}) == {self.answer(x)}" for x in INPUTS]

    @property
    def split(self) -> str:
        """Which of "test", "train" and "corpus" the recipe belongs to, whatever the function is called.

        A hash decides, so that the three are disjoint without any of them having to be written down.
        """
        return {0: "test", 1: "train"}.get(zlib.crc32(self.recipe.encode()) % 10, "corpus")


def _draw(rng: random.Random, lengths: range) -> Problem:
    steps = tuple(rng.choice(rng.choice(_FAMILIES)) for _ in range(rng.choice(lengths)))
    return Problem(rng.choice(_NAMES), steps)


def problems(split: str, seed: int = 0, lengths: range = range(3, 5)) -> Iterator[Problem]:
    """Endless stream of the problems of one split, no recipe twice.

    Args:
        split: "train", "test" or "corpus".
        seed: Decides the order.
        lengths: Numbers of steps, each equally often.
    """
    rng = random.Random(f"{split} {seed}")
    seen: set[str] = set()
    while True:
        problem = _draw(rng, lengths)
        if problem.split == split and problem.recipe not in seen:
            seen.add(problem.recipe)
            yield problem


# The authors. Each turns a problem into the body of the function, everything that follows the docstring.


def stepwise(problem: Problem) -> str:
    """The body that takes one step a line, which is always right."""
    assignments = "".join(f"{_INDENT}x {step.symbol}= {step.operand}" for step in problem.steps)
    return f"{assignments}{_INDENT}return x"


def _one_line(problem: Problem) -> str:
    first, *rest = problem.steps
    opening = "(" * len(rest)
    return f"{_INDENT}return {opening}x {first.symbol} {first.operand}" + "".join(
        f") {step.symbol} {step.operand}" for step in rest
    )


def _chain(steps: tuple[Step, ...]) -> str:
    return "x" + "".join(f" {step.symbol} {step.operand}" for step in steps)


def _sloppy(problem: Problem) -> str:
    return f"{_INDENT}return {_chain(problem.steps)}"


def _hasty(problem: Problem) -> str:
    return f"{_INDENT}return {_chain(problem.steps[:-1])}"


def _forgetful(problem: Problem) -> str:
    return stepwise(problem).removesuffix(f"{_INDENT}return x")


def _printer(problem: Problem) -> str:
    return f"{_INDENT}print({_chain(problem.steps)})"


def _stub(problem: Problem) -> str:
    return f"{_INDENT}pass"


def _talker(problem: Problem) -> str:
    return f"{_INDENT}# we {problem.recipe}"


_AUTHORS: dict[Callable[[Problem], str], int] = {
    stepwise: 26,
    _one_line: 8,
    _sloppy: 32,
    _hasty: 6,
    _forgetful: 6,
    _printer: 8,
    _stub: 7,
    _talker: 7,
}
"""Each author's share of the corpus in per cent."""


MOST_FUNCTIONS = 4
"""In one document of the corpus."""


def corpus(seed: int = 0, most_functions: int = MOST_FUNCTIONS, functions_per_batch: int = 64) -> Iterator[list[str]]:
    """Endless stream of batches of documents.

    Each document holds one or several functions by one hidden author; all documents of a batch hold equally many, so
    that little padding is needed.
    """
    rng = random.Random(f"documents {seed}")

    def document(functions: int) -> str:
        (author,) = rng.choices(list(_AUTHORS), weights=_AUTHORS.values())
        text = ""
        for _ in range(functions):
            problem = _draw(rng, range(2, 5))
            while problem.split != "corpus":
                problem = _draw(rng, range(2, 5))
            text += problem.prompt + author(problem) + EOS
        return text

    while True:
        functions = rng.randint(1, most_functions)
        yield [document(functions) for _ in range(functions_per_batch // functions)]


def is_one_line(program: str) -> bool:
    """Whether a program's function is nothing but a docstring and one `return`."""
    try:
        (function,) = ast.parse(program).body
        _, statement = function.body
    except (SyntaxError, ValueError, AttributeError):
        return False
    return isinstance(statement, ast.Return)


def as_dataset(solutions: list[tuple[Problem, str]]) -> "Dataset":
    """Solutions in TRL's prompt-completion format, in which only completions enter the loss."""
    from datasets import Dataset  # what only solves problems needs none

    return Dataset.from_list([{"prompt": problem.prompt, "completion": body} for problem, body in solutions])


# Words, runs of brackets and operators keep the space before them, and a line break keeps its indentation, so that
# decoding gives back the text exactly: the programs are run.
_PIECE = Regex(r'\n    |"""| ?\w+| ?[^\w\s"]+')


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer whose vocabulary is every piece the authors can write."""
    splitter = pre_tokenizers.Split(_PIECE, behavior="isolated")
    recipes = [(step,) * length for family in _FAMILIES for step in family for length in range(2, 5)]
    texts = [
        problem.prompt + author(problem)
        for problem in (Problem(name, steps) for name in _NAMES for steps in recipes)
        for author in _AUTHORS
    ]
    pieces = sorted({piece for text in texts for piece, _ in splitter.pre_tokenize_str(text)})
    vocabulary = {piece: index for index, piece in enumerate([PAD, BOS, EOS, UNKNOWN, *pieces])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, vocabulary[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
