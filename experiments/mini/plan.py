"""What is compared: the methods, what each is tuned over, and the tables. All of it is data."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

QWEN, FALCON = "tiny-qwen3.5", "tiny-falcon-h1"
LARGE = "qwen3.5-100m"  # needs a GPU
OTHER_SEED = "tiny-qwen3.5-seed-1"
NO_AUTHOR = "tiny-qwen3.5-no-author"
NO_MEMORY = "tiny-qwen3.5-no-memory"
WEAK_ATTENTION = "tiny-falcon-h1-weak-attention"

RECURRENT_LAYERS = (0, 1, 2)
"""Of all these models. Qwen3.5's fourth layer is attention; each of FalconH1's is both."""

SOLUTIONS = 50
"""How many are trained on."""

Rates = dict[str, tuple[float, ...]]
"""Learning rates by the beginning of a model's name, of which the last that fits counts. Equally many everywhere."""

STATE_RATES: Rates = {
    "": (1e-3, 3e-3, 1e-2, 3e-2),
    FALCON: (1e-2, 3e-2, 1e-1, 3e-1),  # its states are larger
    WEAK_ATTENTION: (1e-3, 3e-3, 1e-2, 3e-2),
    LARGE: (3e-4, 1e-3, 3e-3, 1e-2),
}
OFFSET_RATES: Rates = {**STATE_RATES, "": (3e-4, 1e-3, 3e-3, 1e-2)}  # it is added at every token
PAPER_ALPHA_RATES: Rates = {
    "": (1e-2, 3e-2, 1e-1, 3e-1),  # a state that enters scaled by 0.07 must grow that much larger
    FALCON: STATE_RATES[FALCON],
    LARGE: (1e-3, 1e-2, 3e-2, 1e-1),  # from the paper's up
}
WEIGHT_RATES: Rates = {"": (2e-4, 6e-4, 2e-3, 6e-3), LARGE: (1e-4, 3e-4, 1e-3, 3e-3)}
MIXER_RATES: Rates = {**WEIGHT_RATES, "": (6e-4, 2e-3, 6e-3, 2e-2)}


@dataclass(frozen=True)
class Method:
    """How an adapter is made and trained.

    Args:
        label: What it is called in tables.
        configs: The fields of its PEFT configs; several are put on one model. "target_modules" may name a field of
            `methods.Family`.
        rates: The learning rates that it is tuned over.
        steps: Each over all solutions. As in the paper: 20 for states, 50 for LoRA.
    """

    label: str
    configs: tuple[dict[str, Any], ...] = ()
    rates: Rates = field(default_factory=dict)
    steps: int = 20


def _state(label: str, rates: Rates = STATE_RATES, **fields: Any) -> Method:
    return Method(label, ({"peft_type": "S0", "alpha": 1.0, **fields},), rates)


def _lora_config(rank: int, targets: str = "attention") -> dict[str, Any]:
    return {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets}


def _lora(rank: int) -> Method:
    return Method(f"LoRA r{rank}", (_lora_config(rank),), WEIGHT_RATES, 50)


METHODS = {
    "base": Method("base"),
    "prompt": Method("2 solutions in the prompt"),
    "prompt-state": Method("state that 2 solutions leave"),
    "s0": _state("S0"),
    # Without "alpha" it is the paper's: 0.07 for the gated delta rule, 0.65 for Mamba-2.
    "s0-paper": Method("S0, the paper's alpha", ({"peft_type": "S0"},), PAPER_ALPHA_RATES),
    "offset": _state("state-offset", OFFSET_RATES, variant="offset"),
    "both": _state("S0 and offset", OFFSET_RATES, variant="both"),
    **{f"lora-r{rank}": _lora(rank) for rank in (4, 12, 24, 48)},
    "lora-mixers": Method("LoRA r4 on the mixers", (_lora_config(4, "mixers"),), MIXER_RATES, 50),
    "s0+lora": Method("S0 and LoRA r12", ({"peft_type": "S0", "alpha": 1.0}, _lora_config(12)), WEIGHT_RATES, 50),
    **{
        f"s0-layer-{layer}": _state(f"S0, layer {layer} alone", layers_to_transform=[layer])
        for layer in RECURRENT_LAYERS
    },
    **{f"s0-rank-{rank}": _state(f"S0, rank {rank}", rank=rank) for rank in (1, 4)},
}

DATA = {
    "verified": "problems of the training split, the first of 8 samples that passes",
    "redefined": 'right programs, but "double" means to multiply by 4',
}
"""What methods are trained on, and judged by: the last has its own held-out problems."""


@dataclass(frozen=True)
class Training:
    """A method on a model and on solutions.

    Args:
        model: A name in `miniature.pretrain.MODELS`.
        method: A name in `METHODS`.
        data: A name in `DATA`.
        solutions: How many. Rates are tuned with 50, whatever the number.
    """

    model: str
    method: str
    data: str = "verified"
    solutions: int = SOLUTIONS

    @property
    def name(self) -> str:
        """Tells this training from any other, in the names of files."""
        return f"{self.model}/{self.method}-{self.data}-{self.solutions}"

    @property
    def tuning(self) -> Training:
        """The training whose best rate this one has."""
        return replace(self, solutions=SOLUTIONS)

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rates that it is tuned over."""
        fitting = [rates for start, rates in METHODS[self.method].rates.items() if self.model.startswith(start)]
        return fitting[-1]

    @property
    def is_trained(self) -> bool:
        """Whether there is a rate to tune."""
        return bool(METHODS[self.method].configs)


@dataclass(frozen=True)
class Use:
    """One measurement of a trained model.

    Args:
        what: "held-out": greedy pass@1. "long": the same on programs of 5 to 7 steps. "corpus": the loss on documents
            of the pretraining's kind. "memory": how much of each layer's state is left at the end of a prompt.
        alpha: For S0: in place of the one of the training.
    """

    what: str = "held-out"
    alpha: float | None = None

    @property
    def name(self) -> str:
        """In records."""
        return self.what if self.alpha is None else f"{self.what} at alpha {self.alpha:g}"


HELD_OUT, LONG, CORPUS, MEMORY = Use(), Use("long"), Use("corpus"), Use("memory")
ALPHAS = (0.07, 0.3, 0.5, 0.7, 1.4, 3.0)
"""In use, of states trained at 1."""


@dataclass(frozen=True)
class Row:
    """A line of a table.

    Args:
        training: What is trained.
        use: What is shown, as a rate.
        label: In place of the method's.
        also: Further measurements that the table shows.
    """

    training: Training
    use: Use = HELD_OUT
    label: str = ""
    also: tuple[Use, ...] = (CORPUS,)

    @property
    def title(self) -> str:
        """What the line begins with."""
        return self.label or METHODS[self.training.method].label


@dataclass(frozen=True)
class Table:
    """A table.

    Args:
        title: Its heading.
        rows: Its lines.
        reference: The number of the row that others are tested against; None for no test.
        columns: Of the report's, which ones.
        seeds: How many each figure has, at most. With half as many, rates are chosen on half as many seeds, too.
    """

    title: str
    rows: tuple[Row, ...]
    reference: int | None = None
    columns: tuple[str, ...] = ("parameters", "rate", "pass@1", "p", "corpus")
    seeds: int = 10


_MAIN = (
    "base", "prompt", "prompt-state", "s0", "s0-paper", "offset", "both",
    "lora-r4", "lora-r12", "lora-r24", "lora-r48", "lora-mixers", "s0+lora",
)  # fmt: skip
# The paper's targets of LoRA on FalconH1 have a projection of its mixers among them already.
_MAIN_FALCON = ("base", "prompt", "prompt-state", "s0", "s0-paper", "offset", "lora-r12", "lora-r24", "s0+lora")
_MAIN_LARGE = tuple(method for method in _MAIN if method != "lora-r48")
_CONTROL = ("base", "s0", "offset", "lora-r12")


def _rows(model: str, methods: tuple[str, ...], data: str = "verified") -> tuple[Row, ...]:
    return tuple(Row(Training(model, method, data)) for method in methods)


def _main(model: str, title: str, methods: tuple[str, ...]) -> Table:
    return Table(f"{title}: pass@1 on held-out problems", _rows(model, methods), methods.index("s0"))


def _alphas(model: str, default: float) -> tuple[Row, ...]:
    s0 = Training(model, "s0")
    return (
        Row(s0, label="trained and used at 1"),
        Row(Training(model, "s0-paper"), label=f"trained and used at {default}, as in the paper"),
        Row(s0, Use(alpha=default), f"trained at 1, used at {default}, as the authors' code does", ()),
    )


def _curve(model: str) -> tuple[Row, ...]:
    s0 = Training(model, "s0")
    points = {1.0: Use(), **{alpha: Use(alpha=alpha) for alpha in ALPHAS}}
    return tuple(Row(s0, points[alpha], f"{alpha:g}", ()) for alpha in sorted(points))


def _layers(model: str) -> tuple[Row, ...]:
    methods = ("s0", *(f"s0-layer-{layer}" for layer in RECURRENT_LAYERS))
    return tuple(Row(Training(model, method), also=(CORPUS, MEMORY)) for method in methods)


def _control(title: str, model: str, data: str = "verified", methods: tuple[str, ...] = _CONTROL) -> Table:
    rows = tuple(
        Row(Training(model, method, data), also=(CORPUS, MEMORY) if method == "s0" else (CORPUS,)) for method in methods
    )
    return Table(title, rows, methods.index("s0"), ("rate", "memory", "pass@1", "p", "corpus"), seeds=5)


def _with_row(table: Table, row: Row) -> Table:
    return replace(table, rows=(*table.rows, row))


TABLES = {
    "main-large": _main(LARGE, "Qwen3.5 of 100 M parameters", _MAIN_LARGE),
    "alpha-large": Table("Conventions for alpha, 100 M parameters", _alphas(LARGE, 0.07), 0, ("rate", "pass@1", "p")),
    "curve-large": Table("Alpha in use, of states trained at 1, 100 M parameters", _curve(LARGE), None, ("pass@1",)),
    "main": _main(QWEN, "Tiny Qwen3.5", _MAIN),
    "main-falcon": _main(FALCON, "Tiny FalconH1", _MAIN_FALCON),
    "alpha": Table("Conventions for alpha, tiny Qwen3.5", _alphas(QWEN, 0.07), 0, ("rate", "pass@1", "p")),
    "alpha-falcon": Table("Conventions for alpha, tiny FalconH1", _alphas(FALCON, 0.65), 0, ("rate", "pass@1", "p")),
    "curve": Table("Alpha in use, of states trained at 1, tiny Qwen3.5", _curve(QWEN), None, ("pass@1",)),
    "data": Table(
        "How many solutions, tiny Qwen3.5",
        tuple(
            Row(Training(QWEN, method, solutions=number), label=f"{METHODS[method].label}, {number} solutions")
            for method in ("s0", "offset", "lora-r24")
            for number in (10, 25, SOLUTIONS)
        ),
        None,
        ("rate", "pass@1", "corpus"),
    ),
    "layers": Table(
        "Which layer, tiny Qwen3.5", _layers(QWEN), 0, ("rate", "memory", "pass@1", "p", "corpus"), seeds=5
    ),
    "rank": Table(
        "Rank of each head's state, tiny Qwen3.5",
        _rows(QWEN, ("s0-rank-1", "s0-rank-4", "s0")),
        2,
        seeds=5,
    ),
    "other-seed": _control("Another pretraining of the tiny Qwen3.5", OTHER_SEED, methods=("base", "s0", "lora-r12")),
    "no-author": _control("Control: no hidden author, tiny Qwen3.5", NO_AUTHOR),
    "no-memory": _control("Control: no memory in the gates, tiny Qwen3.5", NO_MEMORY),
    "weak-attention": _with_row(
        _control(
            "The tiny FalconH1, pretrained with weak attention",
            WEAK_ATTENTION,
            methods=("base", "prompt", "prompt-state", "s0", "offset", "lora-r12"),
        ),
        Row(Training(FALCON, "s0"), label="S0, attention of the usual strength", also=(CORPUS, MEMORY)),
    ),
    "redefined": _control('Control: new knowledge, "double" means to multiply by 4, tiny Qwen3.5', QWEN, "redefined"),
    "long": Table(
        "Control: new ability, programs of 5 to 7 steps, tiny Qwen3.5",
        tuple(Row(Training(QWEN, method), LONG, also=()) for method in ("base", "s0", "offset", "lora-r12")),
        1,
        ("pass@1", "p"),
    ),
}
