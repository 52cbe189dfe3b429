"""Reading a state: how large it is, how long a layer remembers it, how far it reaches, and where it turns an answer.

Each function returns a result whose arrays are all there is to know, which prints as a table and draws itself with
`plot`. Models are left as they were: adapters, modes, what is trained.

    >>> from peft_s0 import analysis
    >>> print(analysis.norms("my-task"))
    >>> analysis.influence(model, tokenizer, texts).plot()
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from .config import check_readable, find_states, load_config
from .injection import CHILD, has_layer, layer_of
from .layer import S0Layer
from .probing import base_of, final_states, in_eval_mode, token_rows, without_adapters
from .storage import decode

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

# Tokens whose distributions are compared at a time: in float64 they are large.
_PIECE = 64
_COLOUR = "#2a6f97"
_NAME = re.compile(rf"^(?:base_model\.model\.)?(.*)\.{CHILD}\.s0_(state|offset)\.weight$")


@dataclass(frozen=True)
class Influence:
    """How far a state moves the distribution of the next token, at each position of some texts.

    Attributes:
        kl: KL(base || with the state) in nats behind each token, [texts, longest], NaN behind a text's end.
    """

    kl: Floats

    @property
    def mean(self) -> Floats:
        """Mean over the texts that reach a position, [longest]."""
        mean: Floats = np.nanmean(self.kl, axis=0)
        return mean

    def quantile(self, q: float) -> Floats:
        """A quantile over the texts that reach a position, [longest]."""
        quantile: Floats = np.nanquantile(self.kl, q, axis=0)
        return quantile

    def __str__(self) -> str:
        """Positions 1, 2, 4, 8, ... and the last."""
        places = _places(self.kl.shape[1])
        columns = (self.mean, self.quantile(0.5), self.quantile(0.9))
        count = (~np.isnan(self.kl)).sum(axis=0)
        return _table(
            ["token", "texts", "mean KL", "median", "90 %"],
            [[place, count[place - 1], *(f"{column[place - 1]:.3g}" for column in columns)] for place in places],
        )

    def plot(self, ax: Any = None) -> Any:
        """Mean, median and the middle 80 % of the texts along the positions, on a logarithmic scale.

        Args:
            ax: matplotlib axes; None: new ones.

        Returns:
            The axes.

        Raises:
            ImportError: without matplotlib.
        """
        ax = _axes(ax)
        places = np.arange(1, self.kl.shape[1] + 1)
        ax.fill_between(places, self.quantile(0.1), self.quantile(0.9), color=_COLOUR, alpha=0.2, linewidth=0)
        ax.plot(places, self.mean, color=_COLOUR, label="mean")
        ax.plot(places, self.quantile(0.5), color=_COLOUR, linestyle=":", label="median; band: 10 % to 90 %")
        ax.set(xlabel="token of the text", ylabel="KL(base || S0), nats", yscale="log")
        ax.legend(frameon=False)
        return ax


def influence(model: nn.Module, tokenizer: Any, texts: Any, *, batch_size: int = 4) -> Influence:
    """Measure how far the active adapters move the next token's distribution, along given texts.

    Args:
        model: a model with S0 adapters and a language-modelling head.
        tokenizer: its tokenizer; None for token ids.
        texts: a text, chat messages or token ids, or a list of such; see `peft_s0.probing.token_rows`.
        batch_size: texts in one call, padded on the right.

    Raises:
        ValueError: for a model without S0 adapters or without logits, for bad texts, and a `batch_size` below 1.
        RuntimeError: while a `StateBank` is used.
    """
    _check_measurable(model)
    _check_size("influence", batch_size)
    rows = token_rows(base_of(model), tokenizer, texts)
    kl = np.full((len(rows), max(map(len, rows))), np.nan)
    with in_eval_mode(model):
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            inputs = _padded(batch, "right")
            with without_adapters(model):
                base = _logits(model, inputs)
            tuned = _logits(model, inputs)
            for i, row in enumerate(batch):
                kl[start + i, : len(row)] = _kl(base[i, : len(row)], tuned[i, : len(row)])
    return Influence(kl)


@dataclass(frozen=True)
class Divergence:
    """Where greedy answers with a state first differ from the base model's.

    Attributes:
        first: the first new token that differs, counted from 0, [prompts]; -1 where the answers are the same.
        base: the base model's new tokens, for each prompt.
        tuned: those with the state.
    """

    first: Integers
    base: list[list[int]]
    tuned: list[list[int]]

    def share(self, token: int) -> float:
        """Share of the prompts whose answers differ at this new token, counted from 0, or before it."""
        return float(((self.first >= 0) & (self.first <= token)).mean())

    def __str__(self) -> str:
        """New tokens 1, 2, 4, 8, ... and the last."""
        rows = [[place, f"{self.share(place - 1):.1%}"] for place in _places(max(map(len, self.tuned + self.base)))]
        return _table(["new token", "answers that differ by then"], rows)

    def plot(self, ax: Any = None) -> Any:
        """How many answers first differ at each new token, and how many never.

        Args:
            ax: matplotlib axes; None: new ones.

        Returns:
            The axes.

        Raises:
            ImportError: without matplotlib.
        """
        ax = _axes(ax)
        longest = max(int(self.first.max()), 0)
        counts = np.bincount(self.first[self.first >= 0], minlength=longest + 1)
        ax.bar(np.arange(1, longest + 2), counts, color=_COLOUR)
        never = int((self.first < 0).sum())
        if never:
            ax.bar([longest + 3], [never], color="#9aa5b1")
        step = max(1, (longest + 1) // 8)
        ticks = list(range(1, longest + 2, step))
        ax.set_xticks([*ticks, *([longest + 3] if never else [])], [*map(str, ticks), *(["never"] if never else [])])
        ax.set(xlabel="first new token that differs", ylabel="answers")
        return ax


def divergence(
    model: nn.Module, tokenizer: Any, prompts: Any, *, max_new_tokens: int = 64, batch_size: int = 8
) -> Divergence:
    """Find where the greedy answers of the active adapters leave those of the base model.

    Args:
        model: a model with S0 adapters that generates.
        tokenizer: its tokenizer; None for token ids.
        prompts: a text, chat messages or token ids, or a list of such. Behind chat messages the template opens the
            answer.
        max_new_tokens: how long the answers are.
        batch_size: prompts in one call, padded on the left.

    Raises:
        ValueError: for a model without S0 adapters, for bad prompts, and a `batch_size` below 1.
        RuntimeError: while a `StateBank` is used.
    """
    _check_measurable(model)
    _check_size("divergence", batch_size)
    rows = token_rows(base_of(model), tokenizer, prompts, opens_answer=True)
    answers: dict[str, list[list[int]]] = {"base": [], "tuned": []}
    with in_eval_mode(model):
        for start in range(0, len(rows), batch_size):
            inputs = _padded(rows[start : start + batch_size], "left")
            with without_adapters(model):
                answers["base"] += _answers(model, inputs, max_new_tokens)
            answers["tuned"] += _answers(model, inputs, max_new_tokens)
    first = [_first_difference(*pair) for pair in zip(answers["base"], answers["tuned"], strict=True)]
    return Divergence(np.array(first, dtype=np.int64), **answers)


@dataclass(frozen=True)
class Memory:
    """How much of an initial state is left in each layer, behind some tokens of a text.

    Attributes:
        layers: names of the mixers.
        positions: after how many tokens, [positions].
        survival: ||S_t(S0) - S_t(0)|| / ||S0||, [texts, layers, positions]. The norm is Frobenius's.
        heads: the same for each head of a layer by itself, [texts, heads, positions] for each layer; NaN where a head's
            state is zero.
    """

    layers: list[str]
    positions: Integers
    survival: Floats
    heads: list[Floats]

    def __str__(self) -> str:
        """Mean over texts."""
        mean = self.survival.mean(axis=0)
        rows = [[name, *(f"{value:.1%}" for value in line)] for name, line in zip(self.layers, mean, strict=True)]
        return _table(["left after token", *self.positions], rows)

    def plot(self, ax: Any = None) -> Any:
        """A line for each layer, mean over texts.

        Args:
            ax: matplotlib axes; None: new ones.

        Returns:
            The axes.

        Raises:
            ImportError: without matplotlib.
        """
        ax = _axes(ax)
        for i, (name, line) in enumerate(zip(self.layers, self.survival.mean(axis=0), strict=True)):
            # The first layer dark, the last one light.
            shade = 1 - 0.75 * i / max(len(self.layers) - 1, 1)
            ax.plot([0, *self.positions], [1.0, *line], color=_COLOUR, alpha=shade, marker=".", label=_short(name))
        ax.set(xlabel="token of the text", ylabel="share of the state that is left", ylim=(0, None))
        if len(self.layers) <= 8:
            ax.legend(frameon=False)
        return ax


def memory(model: nn.Module, tokenizer: Any, texts: Any, *, positions: Sequence[int] | None = None) -> Memory:
    """Measure how much of the initial state each layer still holds along given texts.

    The state enters one layer at a time, with zero in all others, so that the layer's inputs are the base model's and
    what is compared is the same recurrence from two starts. Recurrences are linear in their state: the difference is
    exactly what is left of it. Each text is run once for each layer and position, without padding.

    Args:
        model: a model with S0 adapters, of which the active ones count.
        tokenizer: its tokenizer; None for token ids.
        texts: a text, chat messages or token ids, or a list of such.
        positions: after how many tokens to look; no text may be shorter. None: 1, 2, 4, 8, ... and the length of the
            shortest text.

    Raises:
        ValueError: for a model without S0 adapters or whose active state is zero, for positions that a text does not
            reach, and for recurrences whose end is not known (see `peft_s0.state_from_prompt`).
        RuntimeError: while a `StateBank` is used.
    """
    layers = {name: mixer for name, mixer in _check_measurable(model).items() if _starts(layer_of(mixer))}
    if not layers:
        raise ValueError("memory: no S0 adapter of this model is active with an initial state; call set_adapter first.")
    base = base_of(model)
    rows = token_rows(base, tokenizer, texts)
    shortest = min(map(len, rows))
    places = _places(shortest) if positions is None else [int(place) for place in positions]
    if not places or not 1 <= min(places) <= max(places) <= shortest:
        raise ValueError(
            f"memory: positions must be from 1 to the length of the shortest text, {shortest}, got {places}."
        )
    left: dict[str, Floats] = {}
    with in_eval_mode(model):
        starts = {name: layer_of(mixer).start_states(1, torch.device("cpu"))[0] for name, mixer in layers.items()}
        empty = [name for name, state in starts.items() if not bool(state.any())]
        if empty:
            raise ValueError(f"memory: the active state of '{empty[0]}' is zero, so there is nothing to be remembered.")
        for i, row in enumerate(rows):
            for j, place in enumerate(places):
                with without_adapters(model):
                    zero = final_states(base, row[:place])
                for name, mixer in layers.items():
                    with without_adapters(model, kept=[layer_of(mixer)]):
                        end = final_states(base, row[:place])[mixer]
                    of_heads = _head_norms(end - zero[mixer])
                    left.setdefault(name, np.empty((len(rows), len(of_heads), len(places))))[i, :, j] = of_heads
    norms = {name: _head_norms(state)[:, None] for name, state in starts.items()}
    whole = [np.sqrt((left[name] ** 2).sum(1) / (norms[name] ** 2).sum()) for name in layers]
    with np.errstate(invalid="ignore", divide="ignore"):
        heads = [np.where(norms[name] > 0, left[name] / norms[name], np.nan) for name in layers]
    return Memory(list(layers), np.array(places, dtype=np.int64), np.stack(whole, axis=1), heads)


@dataclass(frozen=True)
class Norms:
    """Sizes of the states of an adapter, unscaled, as they are in its file.

    Attributes:
        layers: names of the mixers; an offset's says so.
        heads: Frobenius norm of each head's state, [heads] for each layer. A vector state counts as one head.
        alpha: scale of the states where they are used; None: layers have alphas of their own.
    """

    layers: list[str]
    heads: list[Floats]
    alpha: float | None

    @property
    def norms(self) -> Floats:
        """Frobenius norm of each layer's state, [layers]."""
        return np.array([float(np.sqrt((heads**2).sum())) for heads in self.heads])

    def __str__(self) -> str:
        """Each layer's norm, and its largest head's."""
        rows = [
            [name, f"{norm:.4g}", int(heads.argmax()), f"{heads.max():.4g}", f"{np.median(heads):.4g}"]
            for name, norm, heads in zip(self.layers, self.norms, self.heads, strict=True)
        ]
        return _table(["layer", "norm", "largest head", "its norm", "median head"], rows)

    def plot(self, ax: Any = None) -> Any:
        """A heat map of layers and heads.

        Args:
            ax: matplotlib axes; None: new ones.

        Returns:
            The axes.

        Raises:
            ImportError: without matplotlib.
        """
        ax = _axes(ax)
        grid = np.full((len(self.heads), max(map(len, self.heads))), np.nan)
        for line, heads in zip(grid, self.heads, strict=True):
            line[: len(heads)] = heads
        image = ax.imshow(grid, aspect="auto", cmap="Blues", vmin=0, interpolation="nearest")
        ax.figure.colorbar(image, ax=ax, label="norm of the state")
        ax.set_yticks(range(len(self.layers)), list(map(_short, self.layers)))
        ax.set(xlabel="head")
        ax.xaxis.get_major_locator().set_params(integer=True)
        return ax


def norms(source: Any, adapter_name: str | None = None, **kwargs: Any) -> Norms:
    """Measure the states of an adapter, in a model or in a file.

    Args:
        source: a model with S0 adapters; or folder or Hub id of a saved one.
        adapter_name: which adapter of a model; None: the active one.
        kwargs: `revision`, `token` and the like, for the Hub.

    Raises:
        ValueError: for an unknown adapter, a model without one, several active ones and no name, files that are refused
            as they would be in loading, and files of states of low rank, whose parts a file does not tell apart.
    """
    saved = isinstance(source, (str, Path))
    states, alpha = _of_file(str(source), kwargs) if saved else _of_model(source, adapter_name)
    return Norms(list(states), [_head_norms(state) for state in states.values()], alpha)


def _of_model(model: nn.Module, adapter_name: str | None) -> tuple[dict[str, Tensor], float | None]:
    layers = _layers(model)
    if adapter_name is None:
        active = sorted({name for mixer in layers.values() for name in layer_of(mixer).active_adapters})
        if len(active) != 1:
            raise ValueError(f"norms: the active adapters are {active}; pass adapter_name.")
        (adapter_name,) = active
    states, alphas = {}, set()
    for name, mixer in layers.items():
        layer = layer_of(mixer)
        for kind, learnt in layer.states(adapter_name).items():
            states[_named(name, kind.removeprefix("s0_"))] = learnt.compose(learnt.weight.detach())
            alphas.add(layer.alpha(adapter_name))
    if not states:
        known = sorted({name for mixer in layers.values() for name in layer_of(mixer).configs})
        raise ValueError(f"norms: unknown adapter '{adapter_name}'; this model has {known}.")
    return states, alphas.pop() if len(alphas) == 1 else None


def _of_file(source: str, options: dict[str, Any]) -> tuple[dict[str, Tensor], float | None]:
    config = load_config(source, **options)
    if config.rank is not None:
        raise ValueError(
            f"norms: '{source}' has states of rank {config.rank}, kept as two matrices that a file does not tell "
            "apart. Load it on its model and pass that."
        )
    file = find_states(source, **options)
    if file is None:
        raise ValueError(f"norms: '{source}' has no states.")
    check_readable(file)
    found = {_NAME.match(name): state for name, state in decode(load_file(file)).items()}
    own = config.learn_alpha or config.alpha_pattern
    states = {_named(match[1], match[2]): state for match, state in found.items() if match is not None}
    return states, None if own else config.alpha


def _named(mixer: str, kind: str) -> str:
    return mixer if kind == "state" else f"{mixer} ({kind})"


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """The mixers of a model that have a tuner layer, by their names in the base model."""
    layers = {name: module for name, module in base_of(model).named_modules() if has_layer(module)}
    if not layers:
        raise ValueError(f"This {type(model).__name__} has no S0 adapter; load one, or make one with get_peft_model.")
    return layers


def _check_measurable(model: nn.Module) -> dict[str, nn.Module]:
    """See `_layers`; refused where a bank's tasks would run in place of the active adapters."""
    layers = _layers(model)
    if any(layer_of(mixer).row_slots is not None for mixer in layers.values()):
        raise RuntimeError(
            "A StateBank is used, whose tasks would be measured in place of the active adapters. Leave bank.use() "
            "first; to measure a task, load it with load_adapter."
        )
    return layers


def _check_size(function: str, batch_size: int) -> None:
    """Refuse a number of rows with which nothing would be measured."""
    if batch_size < 1:
        raise ValueError(f"{function}: batch_size must be an integer >= 1, got {batch_size}.")


def _starts(layer: S0Layer) -> bool:
    """Whether an active adapter has an initial state in this layer."""
    return layer.participates and any(name in layer.s0_state for name in layer.active_adapters)


def _padded(rows: Sequence[Tensor], side: str) -> dict[str, Tensor]:
    """Rows [tokens] as a batch."""
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long, device=rows[0].device)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[i, place], mask[i, place] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def _logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    logits: Tensor | None = getattr(model(**inputs, use_cache=False), "logits", None)
    if logits is None or logits.shape[:2] != inputs["input_ids"].shape:
        raise ValueError(
            f"{type(base_of(model)).__name__} gives no logits for each token, so the influence of a state on them "
            "cannot be measured. Use the class with a language-modelling head."
        )
    return logits


def _kl(base: Tensor, tuned: Tensor) -> Floats:
    """KL(base || tuned) of each token, from logits [tokens, vocabulary]."""
    pieces = []
    for these, those in zip(base.split(_PIECE), tuned.split(_PIECE), strict=True):
        log_base, log_tuned = (logits.double().log_softmax(-1) for logits in (these, those))
        terms = log_base.exp() * (log_base - log_tuned)
        # A token that the base model rules out counts for nothing.
        pieces.append(terms.masked_fill(log_base == -torch.inf, 0.0).sum(-1).clamp_min(0.0))
    return torch.cat(pieces).cpu().numpy()


def _answers(model: Any, inputs: dict[str, Tensor], max_new_tokens: int) -> list[list[int]]:
    """Greedy new tokens of each row, up to and with the first end of sequence."""
    config: Any = base_of(model).generation_config
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    pad = config.pad_token_id if config.pad_token_id is not None else (ends[0] or 0)
    sequences = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=None,
        top_k=None,
        top_p=None,
        pad_token_id=pad,
    )
    answers = []
    for new in sequences[:, inputs["input_ids"].shape[1] :].tolist():
        end = next((place for place, token in enumerate(new) if token in ends), len(new))
        answers.append(new[: end + 1])
    return answers


def _first_difference(one: list[int], other: list[int]) -> int:
    for place in range(max(len(one), len(other))):
        if one[place : place + 1] != other[place : place + 1]:
            return place
    return -1


def _head_norms(state: Tensor) -> Floats:
    """Frobenius norm of each head of a state [heads, ...]; a vector is one head."""
    heads = state.detach().double().cpu()
    return (heads.unsqueeze(0) if heads.ndim == 1 else heads).flatten(1).norm(dim=1).numpy()


def _places(longest: int) -> list[int]:
    """1, 2, 4, 8, ... and the last."""
    doubled = [2**i for i in range(longest.bit_length()) if 2**i < longest]
    return [*doubled, longest]


def _short(name: str) -> str:
    """A mixer's name from its list of layers on."""
    found = re.search(r"[^.]+\.\d+\..*", name)
    return found.group() if found else name


def _table(header: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    """Columns under their names, the first one on the left."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(_aligned(row, widths)).rstrip() for row in cells)


def _aligned(row: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
    yield row[0].ljust(widths[0])
    for cell, width in zip(row[1:], widths[1:], strict=True):
        yield cell.rjust(width)


def _axes(ax: Any) -> Any:
    if ax is not None:
        return ax
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(
            "plot() needs matplotlib: pip install 'peft-s0[plots]'. Without it, print the result, or read its arrays."
        ) from error
    _, ax = pyplot.subplots(layout="constrained")
    return ax
