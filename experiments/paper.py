"""The paper's tables as lists of runs, each beside the figure that was published (arXiv 2604.01168)."""

from __future__ import annotations

from dataclasses import dataclass, field

from methods import LAYER_GROUPS, Training

BASE = Training("base")


@dataclass(frozen=True)
class Published:
    """A figure of the paper, in per cent or, for a gain over the base model, percentage points.

    Args:
        quantity: "pass@1", "pass@5", "pass@10" or "gain".
        value: The figure.
        spread: The standard deviation over seeds, where it is given.
    """

    quantity: str
    value: float
    spread: float | None = None


@dataclass(frozen=True)
class Setting:
    """One row of a table.

    Args:
        label: What it is called there.
        training: What is trained.
        model, task: On what.
        seeds: As many as in the paper, where it says.
        alpha_in_use: For S0, if not that of the training.
        samples: Of each problem, for pass@k.
        published: The paper's figures; nothing where it gives none.
    """

    label: str
    training: Training
    model: str = "qwen3.5-4b"
    task: str = "humaneval"
    seeds: int = 10
    alpha_in_use: float | None = None
    samples: int = 0
    published: tuple[Published, ...] = ()


@dataclass(frozen=True)
class Table:
    """A table, and the figure drawn from it.

    Args:
        title: Its heading.
        settings: Its rows.
        note: What a reader must know of it.
        reference: The label of the row that others are compared with in Welch's t-test; None for no test.
    """

    title: str
    settings: tuple[Setting, ...]
    note: str = ""
    reference: str | None = None
    quantities: tuple[str, ...] = field(default=("pass@1",))


def _s0(**changes: object) -> Training:
    return Training("s0", **changes)


def _gain(value: float, spread: float | None = None) -> tuple[Published, ...]:
    return (Published("gain", value, spread),)


def _pass1(value: float, spread: float | None = None) -> tuple[Published, ...]:
    return (Published("pass@1", value, spread),)


def _sampled(*values: float) -> tuple[Published, ...]:
    return tuple(Published(f"pass@{k}", value) for k, value in zip((1, 5, 10), values, strict=True))


_LAYERS = {"first": 23.8, "middle": 19.0, "last": 13.1}
_QWEN_ALPHAS = (0.01, 0.03, 0.05, 0.07, 0.1, 0.15, 0.3)
_FALCON_ALPHAS = (0.07, 0.3, 0.6, 0.65, 0.7, 1.0, 2.0)
_SPIDER_ALPHAS = (0.03, 0.05, 0.07, 0.1, 0.15)
_AS_CODE = _s0(train_alpha=1.0)
"""As in the authors' code: trained at scale 1, used at alpha. One training serves all alphas."""

TABLES = {
    "main": Table(
        "HumanEval, Qwen3.5-4B",
        (
            Setting("base", BASE, seeds=1, published=_pass1(48.8)),
            Setting("S0", _s0(), published=_pass1(72.2, 1.7)),
            Setting("LoRA r24", Training("lora-r24"), published=_pass1(61.5, 5.1)),
            Setting("state-offset", Training("offset"), published=_pass1(74.8, 3.6)),
        ),
        "In the paper's paired run the state-offset gains 27.1 points against 23.5 of S0. How many seeds LoRA and the "
        "state-offset had is not given.",
        reference="S0",
    ),
    "falcon": Table(
        "HumanEval, FalconH1-7B",
        (
            Setting("base", BASE, "falcon-h1-7b", seeds=1, published=_pass1(40.5)),
            Setting("S0", _s0(), "falcon-h1-7b", seeds=3, published=_pass1(71.8, 1.3)),
            Setting("LoRA r24", Training("lora-r24"), "falcon-h1-7b", seeds=3, published=_pass1(71.4, 2.4)),
            Setting("state-offset", Training("offset"), "falcon-h1-7b", seeds=3),
        ),
        reference="S0",
    ),
    "lora": Table(
        "LoRA's rank and targets, HumanEval, Qwen3.5-4B",
        (
            Setting("base", BASE, seeds=1, published=_pass1(48.8)),
            Setting("S0", _s0(), published=_pass1(72.2, 1.7)),
            Setting("LoRA r24", Training("lora-r24"), published=_pass1(61.5, 5.1)),
            Setting("LoRA r48", Training("lora-r48"), published=_gain(2.1, 17.0)),
            Setting("LoRA r64", Training("lora-r64"), published=_gain(-15.5, 18.9)),
            Setting("LoRA r24 on the recurrent layers", Training("lora-mixers")),
        ),
        "r64 has as many parameters as S0. LoRA on the recurrent layers is not in the paper.",
        reference="S0",
    ),
    "sizes": Table(
        "Model sizes, HumanEval, Qwen3.5",
        tuple(
            setting
            for size, gain in (("0.8b", 2.6), ("2b", 19.0), ("9b", 44.0))
            for setting in (
                Setting(f"{size.upper()} base", BASE, f"qwen3.5-{size}", seeds=1),
                Setting(f"{size.upper()} S0", _s0(), f"qwen3.5-{size}", seeds=3, published=_gain(gain)),
            )
        ),
        "How many seeds the paper had is not given.",
    ),
    "transfer": Table(
        "Other tasks, Qwen3.5-4B",
        (
            Setting("MATH-500 base", BASE, task="math500", seeds=1),
            Setting("MATH-500 S0", _s0(), task="math500", seeds=8, published=_gain(4.8)),
            Setting("GSM8K base", BASE, task="gsm8k", seeds=1),
            Setting("GSM8K S0", _s0(), task="gsm8k", published=_gain(2.8)),
            Setting("Spider base", BASE, task="spider", seeds=1),
            *(
                Setting(
                    f"Spider S0, alpha {alpha}",
                    _AS_CODE,
                    task="spider",
                    seeds=1,
                    alpha_in_use=alpha,
                    published=_gain(0.0),
                )
                for alpha in _SPIDER_ALPHAS
            ),
        ),
        "Which five alphas the paper tried on Spider is not given, nor which problems it collected from.",
    ),
    "prefix": Table(
        "Prefix tuning on a pure Transformer, HumanEval, Qwen2.5-3B",
        (
            Setting("base", BASE, "qwen2.5-3b", seeds=1),
            *(
                Setting(
                    f"prefix of {tokens}, rate {rate}",
                    Training("prefix", learning_rate=rate, virtual_tokens=tokens),
                    "qwen2.5-3b",
                    seeds=1,
                    published=_gain(-13.9),
                )
                for tokens in (4, 16, 64)
                for rate in (1e-4, 1e-3, 1e-2)
            ),
        ),
        "Which nine configurations the paper tried is not given.",
    ),
    "sampled": Table(
        "Sampled answers, HumanEval, Qwen3.5-4B",
        (
            Setting("base", BASE, seeds=1, samples=20, published=_sampled(41.9, 64.2, 69.4)),
            Setting("LoRA r24", Training("lora-r24"), seeds=1, samples=20, published=_sampled(56.3, 64.1, 66.7)),
            Setting("S0", _s0(), seeds=1, samples=20, published=_sampled(70.3, 84.5, 88.5)),
        ),
        "20 samples of each problem, at temperature 0.7 and top-p 0.95; how many the paper took is not given.",
        quantities=("pass@1", "pass@5", "pass@10"),
    ),
    "layers": Table(
        "Which recurrent layers, HumanEval, Qwen3.5-4B",
        (
            Setting("base", BASE, seeds=1, published=_pass1(48.8)),
            *(
                Setting(f"{group} third", _s0(layers=group), seeds=1, published=_gain(_LAYERS[group]))
                for group in LAYER_GROUPS
            ),
            Setting("all", _s0(), seeds=1, published=_gain(22.6)),
        ),
    ),
    "data": Table(
        "How many solutions, HumanEval, Qwen3.5-4B",
        (
            Setting("base", BASE, seeds=1, published=_pass1(48.8)),
            Setting("10", _s0(solutions=10), seeds=3, published=_gain(25.4, 6.8)),
            Setting("25", _s0(solutions=25), seeds=3, published=_gain(22.6, 3.2)),
            Setting("all, some 50", _s0(), seeds=3, published=_gain(22.6)),
        ),
        "How many seeds the paper had is not given.",
    ),
    "alpha": Table(
        "Alpha in use, HumanEval, Qwen3.5-4B",
        (
            Setting("base", BASE, seeds=1, published=_pass1(48.8)),
            *(Setting(f"{alpha}", _AS_CODE, seeds=1, alpha_in_use=alpha) for alpha in _QWEN_ALPHAS),
        ),
        "One training at scale 1, as in the authors' code. The paper: flat from 0.03 to 0.15.",
    ),
    "alpha-trained": Table(
        "Alpha in training and in use, HumanEval, Qwen3.5-4B",
        (
            Setting("base", BASE, seeds=1, published=_pass1(48.8)),
            *(Setting(f"{alpha}", _s0(alpha=alpha), seeds=1) for alpha in _QWEN_ALPHAS),
        ),
        "One training for each alpha, as in the paper's algorithm.",
    ),
    "alpha-falcon": Table(
        "Alpha in use, HumanEval, FalconH1-7B",
        (
            Setting("base", BASE, "falcon-h1-7b", seeds=1, published=_pass1(40.5)),
            *(
                Setting(
                    f"{alpha}",
                    _AS_CODE,
                    "falcon-h1-7b",
                    seeds=1,
                    alpha_in_use=alpha,
                    published=_gain(8.3) if alpha == 0.07 else (),
                )
                for alpha in _FALCON_ALPHAS
            ),
        ),
        "One training at scale 1. The paper: best from 0.60 to 0.70, and 2.0 collapses.",
    ),
}
