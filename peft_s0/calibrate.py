"""Choosing alpha on held-out data: no gradient, no training, one evaluation for each alpha that is tried."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mode
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from .alpha import check_alpha
from .config import S0Config, listed
from .model import S0Model

if TYPE_CHECKING:
    from matplotlib.axes import Axes

AROUND = (0.25, 0.5, 0.7, 1.0, 1.4, 2.0, 4.0)
"""The grid by default, in units of the alpha that the adapter has."""

IN_LAYERS = (0.0, 0.5, 1.0, 2.0)
"""What is tried for one layer, in units of the alpha that it has. The one that it has is known already."""

IGNORED = -100
_TOKENS = ("input_ids", "labels", "attention_mask", "completion_mask", "assistant_masks")


@dataclass(frozen=True)
class Trial:
    """One evaluation.

    Args:
        alpha: of all layers, or of the one layer that is named; None: the adapter's own alphas, layer by layer.
        value: loss or score; NaN or infinite where the model broke down.
        layer: name of the mixer whose alpha was changed alone, all others being as they were chosen so far.
        chosen: whether it was taken.
    """

    alpha: float | None
    value: float
    layer: str | None = None
    chosen: bool = False


@dataclass(frozen=True)
class Calibration:
    """What `calibrate_alpha` found. Printing it shows the table.

    Args:
        adapter: name of the adapter.
        metric: "loss", the lower the better, or "score", the higher the better.
        table: all evaluations: first alpha 0, which is the model without the states, then the grid, then layers.
        best: the alpha that was chosen and is set; that of each mixer by its name, where they differ.
        value: loss or score at `best`.
    """

    adapter: str
    metric: Literal["loss", "score"]
    table: tuple[Trial, ...]
    best: float | dict[str, float]
    value: float

    @property
    def baseline(self) -> float:
        """Loss or score at alpha 0: of the base model, if the adapter has nothing but states."""
        return self.table[0].value

    def __str__(self) -> str:
        layers = any(trial.layer for trial in self.table)
        head = ["alpha", self.metric, "", *(["layer"] if layers else [])]
        lines = [head, *(self._line(index, trial, layers) for index, trial in enumerate(self.table))]
        widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
        text = ["  ".join([line[0].rjust(widths[0]), line[1].rjust(widths[1])]) for line in lines]
        for column in range(2, len(head)):
            text = [f"{row}  {line[column].ljust(widths[column])}" for row, line in zip(text, lines, strict=True)]
        return "\n".join(row.rstrip() for row in text)

    def _line(self, index: int, trial: Trial, layers: bool) -> list[str]:
        alpha = "by layer" if trial.alpha is None else f"{trial.alpha:.3g}"
        notes = ["without states"] if index == 0 else []
        notes += [] if math.isfinite(trial.value) else ["not finite"]
        notes += ["chosen"] if trial.chosen else []
        return [alpha, f"{trial.value:.4f}", ", ".join(notes), *([trial.layer or "all"] if layers else [])]

    def to_json(self) -> str:
        """All of it as JSON, for what keeps records; values that are not finite are null."""
        content = asdict(self) | {"baseline": self.baseline}
        for entry in (content, *content["table"]):
            for name in ("value", "baseline"):
                if name in entry and not math.isfinite(entry[name]):
                    entry[name] = None
        return json.dumps(content, indent=2)

    def save(self, path: str | Path) -> None:
        """Write `to_json` to a file."""
        Path(path).write_text(self.to_json() + "\n", encoding="utf-8")

    def plot(self, target: str | Path | Axes | None = None) -> Axes:
        """Draw loss or score over alpha; needs matplotlib.

        Args:
            target: a file to write, in the format that its name says; axes to draw on; None: axes of a new figure.

        Returns:
            The axes.

        Raises:
            ImportError: without matplotlib, saying what to install.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("Calibration.plot needs matplotlib: pip install matplotlib") from error
        # A figure of its own, which no window or backend knows of.
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots() if target is None or isinstance(target, (str, Path)) else target
        curve = [(t.alpha, t.value) for t in self.table[1:] if t.layer is None and t.alpha]
        finite = [point for point in curve if math.isfinite(point[1])]
        alphas, values = [alpha for alpha, _ in finite], [value for _, value in finite]
        axes.plot(alphas, values, marker="o", color="#2a6f97", label="one alpha for all layers")
        broken = [alpha for alpha, value in curve if not math.isfinite(value)]
        if broken:
            bottom = axes.get_xaxis_transform()
            axes.plot(broken, [0.03] * len(broken), "x", transform=bottom, color="#c1121f", label="not finite")
        if math.isfinite(self.baseline):
            axes.axhline(self.baseline, linestyle="--", color="#9aa5b1", label="alpha 0")
        if isinstance(self.best, dict):
            axes.axhline(self.value, linestyle=":", color="#e09f3e", label="chosen, layer by layer")
        elif self.best > 0:
            axes.plot(self.best, self.value, "o", markersize=11, fillstyle="none", color="#e09f3e", label="chosen")
        if curve:  # a logarithmic axis without a point cannot be drawn
            axes.set_xscale("log")
        axes.set_xlabel("alpha")
        axes.set_ylabel(self.metric)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
        if isinstance(target, (str, Path)):
            figure.savefig(target, dpi=160)
        return axes


def calibrate_alpha(
    model: PeftModel,
    data: Iterable[Mapping[str, Any]] | Callable[[PeftModel], float],
    grid: Sequence[float] | None = None,
    *,
    adapter_name: str | None = None,
    per_layer: int = 0,
    batch_size: int = 8,
    progress: bool = True,
) -> Calibration:
    """Choose the scale of an adapter's states by what it reaches on held-out data.

    The alpha that is found is set as by `set_alpha`, so that it is saved with the adapter. It is the scale in use, in
    evaluation mode, whatever `train_alpha` says. Each evaluation starts from the same random numbers, so that scores by
    sampling can be compared. If the call fails or is interrupted, the model is as it was; its mode, its active adapters
    and torch's random numbers are so in any case.

    Of equal alphas the middle one is taken, of two in the middle the lower: the ends of a plateau are next to where it
    falls off. An alpha whose value is not finite is never taken.

    With `per_layer`, alphas of single layers are changed afterwards: pass by pass, layer by layer in the model's order,
    none, half and twice what it has is tried, and the best is kept if it is better than before. This is greedy. It
    finds a better value on `data` at small cost, not the best one, and depends on the order; with many layers and few
    data it fits noise, so look at other data before you use it.

    There are `1 + len(grid)` evaluations, and with `per_layer` at most `3 * per_layer * layers` more.

    Args:
        model: a PEFT model with S0 adapters; `torch.compile(model)` is one, too.
        data: what alpha is chosen by. A function `score(model) -> float`, higher being better, such as pass@1 by
            `generate`. Or data for the loss, the mean over all tokens with a label, however they fall into batches:
            batches with `input_ids` and `labels` [rows, tokens] and whatever else the model takes, as a DataLoader
            gives them, of which a label behind a pad does not count; or tokenised rows, each with `input_ids` and
            `labels`, as a `datasets.Dataset` or a list of dicts. Rows without labels may have TRL's `completion_mask`
            or `assistant_masks`; without these, every token counts. An iterator is read once and kept.
        grid: the alphas to try. None: a quarter to four times the adapter's own, which is the default of the
            recurrence family unless it was set, and that default itself; for an adapter with `alpha_pattern` or
            `learn_alpha`, its own alphas as well.
        adapter_name: None for the active adapter. An adapter that is not active is while this runs.
        per_layer: number of passes over the layers.
        batch_size: rows to a batch, if `data` has rows.
        progress: show a progress bar.

    Raises:
        TypeError: if the model is no PEFT model with S0 adapters, or data or score are of no use.
        ValueError: for an unknown adapter, a grid that is empty or not of finite numbers >= 0, data without labels, and
            if no alpha has a finite value.
        RuntimeError: if the adapters are disabled or a `StateBank` is in use.

    Warns:
        UserWarning: if what was chosen is no better than alpha 0.

    Example:
        >>> result = calibrate_alpha(model, held_out)
        >>> print(result)
        >>> result.plot("alpha.png")
        >>> model.save_pretrained("my-task")
    """
    tuner = getattr(model, "base_model", None)
    if not isinstance(tuner, S0Model):
        raise TypeError(
            f"calibrate_alpha needs a PEFT model with S0 adapters, got {type(model).__name__}. Make one with "
            "peft.get_peft_model(model, S0Config()) or PeftModel.from_pretrained(model, folder)."
        )
    name = tuner._one_adapter(adapter_name)
    layers = tuner._layers_of(name)
    if tuner._bank_rows is not None or any(layer.disable_adapters for layer in layers.values()):
        raise RuntimeError(
            "calibrate_alpha: no alpha has an effect while adapters are disabled or a StateBank is used."
        )
    if isinstance(per_layer, bool) or not isinstance(per_layer, int) or per_layer < 0:
        raise ValueError(f"calibrate_alpha: per_layer must be a number of passes >= 0, got {per_layer!r}.")
    config = cast(S0Config, tuner.peft_config[name])
    candidates = _grid(config, grid, next(iter(layers.values())).declaration.family.alpha)
    with torch.random.fork_rng(_cuda_devices(tuner)), _restoring(model, tuner, name) as done:
        loss = None if callable(data) else _loss(data, batch_size)
        score = cast("Callable[[PeftModel], float]", data) if loss is None else loss
        search = _Search(model, tuner, name, list(layers), score, loss is not None)
        total = len({0.0, *candidates}) + per_layer * len(layers) * (len(IN_LAYERS) - 1)
        with tqdm(total=total, desc=f"alpha of '{name}'", unit="evaluation", disable=not progress) as bar:
            result = search.run(candidates, per_layer, bar)
        done()
    if not search.better(result.value, result.baseline):
        warnings.warn(
            f"calibrate_alpha: no alpha is better than 0, whose {result.metric} is {result.baseline:.4g}; that of the "
            f"best is {result.value:.4g}. On these data the states do nothing good.",
            stacklevel=2,
        )
    return result


class _Search:
    """The evaluations, one after another."""

    def __init__(
        self,
        model: PeftModel,
        tuner: S0Model,
        adapter: str,
        layers: list[str],
        score: Callable[[PeftModel], float],
        is_loss: bool,
    ) -> None:
        self.model, self.tuner, self.adapter, self.layers = model, tuner, adapter, layers
        self.score = score
        self.metric: Literal["loss", "score"] = "loss" if is_loss else "score"
        self.own = {name: layer.alpha(adapter) for name, layer in tuner._layers_of(adapter).items()}
        self.table: list[Trial] = []

    def better(self, value: float, other: float) -> bool:
        """Whether a value is better than another; one that is finite is better than one that is not."""
        if not (math.isfinite(value) and math.isfinite(other)):
            return math.isfinite(value)
        return value < other if self.metric == "loss" else value > other

    def run(self, candidates: list[float | None], passes: int, bar: Any) -> Calibration:
        """Everything; the model has the best alpha then."""
        # Layer by layer all along, so that a compiled model sees all their alphas change before one does alone.
        tried = [0.0, *(alpha for alpha in candidates if alpha != 0)]
        trials = [self._try(alpha, bar, by_layer=passes > 0) for alpha in tried]
        best = self._best([trial for trial in trials if trial.alpha in candidates])
        self.table = [replace(trial, chosen=trial is best) for trial in trials]
        alphas, value = self._alphas(best.alpha), best.value
        start = dict(alphas)
        for _ in range(passes):
            before = value
            for layer in self.layers:
                value = self._try_layer(layer, alphas, start[layer], value, bar)
            if value == before:
                break
        common = mode(alphas.values())
        others = {layer: alpha for layer, alpha in alphas.items() if alpha != common}
        self.tuner._put_alpha(common, self.adapter)
        self.tuner._put_alpha(others, self.adapter)
        return Calibration(self.adapter, self.metric, tuple(self.table), alphas if others else common, value)

    def _alphas(self, alpha: float | None) -> dict[str, float]:
        return dict(self.own) if alpha is None else dict.fromkeys(self.layers, alpha)

    def _try(self, alpha: float | None, bar: Any, by_layer: bool) -> Trial:
        self.tuner._put_alpha(alpha if alpha is not None and not by_layer else self._alphas(alpha), self.adapter)
        return Trial(alpha, self._measure(bar))

    def _try_layer(self, layer: str, alphas: dict[str, float], start: float, value: float, bar: Any) -> float:
        """Keep the best alpha of one layer in `alphas`; returns the value with it."""
        unit = alphas[layer] or start
        trials = []
        for alpha in sorted({factor * unit for factor in IN_LAYERS} - {alphas[layer]}):
            self.tuner._put_alpha({**alphas, layer: alpha}, self.adapter)
            trials.append(Trial(alpha, self._measure(bar), layer))
        for trial in trials:
            if self.better(trial.value, value):
                alphas[layer], value = cast(float, trial.alpha), trial.value
        self.table += [replace(trial, chosen=trial.alpha == alphas[layer]) for trial in trials]
        return value

    def _measure(self, bar: Any) -> float:
        self.model.eval()
        with torch.random.fork_rng(_cuda_devices(self.tuner)), torch.no_grad():
            value: Any = self.score(self.model)
        try:
            value = float(value)
        except (TypeError, ValueError):
            raise TypeError(f"calibrate_alpha: the score must be a number, got {type(value).__name__}.") from None
        bar.set_postfix({self.metric: f"{value:.4g}"}, refresh=False)
        bar.update()
        return value

    def _best(self, trials: list[Trial]) -> Trial:
        best = trials[0]
        for trial in trials[1:]:
            best = trial if self.better(trial.value, best.value) else best
        if not math.isfinite(best.value):
            raise ValueError(
                f"calibrate_alpha: the {self.metric} is not finite for any alpha ("
                + ", ".join(f"{'by layer' if t.alpha is None else t.alpha}: {t.value}" for t in trials)
                + "). Try smaller ones, and see whether the states are those of a training run that diverged."
            )
        equal = [trial for trial in trials if trial.value == best.value]
        equal = [trial for trial in equal if trial.alpha is not None] or equal
        return equal[(len(equal) - 1) // 2]


def _grid(config: S0Config, grid: Sequence[float] | None, default: float) -> list[float | None]:
    """The candidates in ascending order; None stands for the adapter's own alphas, layer by layer."""
    if grid is not None:
        alphas = listed(list(grid))
        if not alphas:
            raise ValueError("calibrate_alpha: the grid is empty; pass the alphas to try, or None for the default.")
        for alpha in alphas:
            check_alpha("calibrate_alpha: an alpha of the grid", alpha)
        return [*sorted({float(alpha) for alpha in alphas})]
    unit = config.alpha or default
    # To three digits, so that it is not the rounding that tells two alphas apart.
    around = {float(f"{factor * unit:.3g}") for factor in AROUND if factor != 1}
    return [*sorted({*around, unit, default}), *([None] if config.alpha_pattern or config.learn_alpha else [])]


def _cuda_devices(model: nn.Module) -> list[int]:
    """The devices whose random numbers an evaluation may draw."""
    devices = {parameter.device for parameter in model.parameters()}
    return sorted(device.index or 0 for device in devices if device.type == "cuda")


@contextmanager
def _restoring(model: nn.Module, tuner: S0Model, adapter: str) -> Iterator[Callable[[], None]]:
    """Activate an adapter for a while. Afterwards the model is as it was, but for alphas if `done` was called."""
    modes = {module: module.training for module in model.modules()}
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    active, config = tuner.active_adapter, cast(S0Config, tuner.peft_config[adapter])
    changes = {"alpha": config.alpha, "alpha_pattern": dict(config.alpha_pattern)}
    alphas = {name: layer.alpha(adapter) for name, layer in tuner._layers_of(adapter).items()}

    def done() -> None:
        changes.clear()

    try:
        if adapter not in tuner.active_adapters:
            tuner.set_adapter(adapter)
        yield done
    finally:
        if tuner.active_adapter != active:
            tuner.set_adapter(active)
        for parameter, requires_grad in trained.items():
            parameter.requires_grad_(requires_grad)
        for module, training in modes.items():
            module.training = training
        if changes:
            tuner._change_config(adapter, changes)
            if config.learn_alpha:
                tuner._put_alpha(alphas, adapter)


def _loss(data: Any, batch_size: int) -> Callable[[PeftModel], float]:
    """The mean loss over all tokens with a label, as a function of the model."""
    if isinstance(data, Mapping) or not isinstance(data, Iterable):
        raise TypeError(
            "calibrate_alpha: data must be a function score(model) -> float, or an iterable of batches or rows, got "
            f"{type(data).__name__}."
        )
    source: Iterable[Any] = list(data) if isinstance(data, Iterator) else data
    first = next(iter(source), None)
    if not isinstance(first, Mapping) or "input_ids" not in first:
        found = "nothing" if first is None else sorted(first) if isinstance(first, Mapping) else type(first).__name__
        raise TypeError(
            f"calibrate_alpha: data must give batches or rows, dicts with input_ids and labels, but it gives {found}."
        )
    ids = first["input_ids"]
    if not isinstance(ids, Tensor) and any(isinstance(row, (list, tuple)) for row in ids):
        raise TypeError(
            f"calibrate_alpha: a batch's input_ids must be a tensor [rows, tokens], got a {type(ids).__name__} of "
            "rows. Use a collator that makes tensors, or pass the rows one by one."
        )
    batches = _collate(list(source), batch_size) if torch.as_tensor(ids).ndim == 1 else source

    def loss(model: PeftModel) -> float:
        device = next(parameter.device for parameter in model.parameters() if not parameter.is_meta)
        total, count = 0.0, 0
        for batch in batches:
            found, tokens = _summed_loss(model, batch, device)
            total, count = total + found, count + tokens
        if count == 0:
            raise ValueError(f"calibrate_alpha: no token has a label: all are {IGNORED}, or first in their row.")
        return total / count

    return loss


def _summed_loss(model: PeftModel, batch: Mapping[str, Any], device: torch.device) -> tuple[float, int]:
    """The summed cross-entropy of a batch's labelled tokens, in float64, and how many they are.

    Not the model's own loss, which some classes add other terms to and none tells what it is the mean of.
    """
    if "labels" not in batch:
        raise ValueError(
            f"calibrate_alpha: a batch has no labels, only {sorted(batch)}. Use a collator that makes them."
        )
    inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    labels: Tensor = inputs.pop("labels")
    output = model(**{"use_cache": False, **inputs})
    logits = getattr(output, "logits", None)
    if logits is None or logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"calibrate_alpha: labels have the shape {list(labels.shape)}, the logits "
            f"{None if logits is None else list(logits.shape)}; expected one label for each token of the logits. For a "
            "model without a language-modelling head pass a function score(model) -> float."
        )
    mask = inputs.get("attention_mask")
    if mask is not None and mask.shape == labels.shape:
        # A row's first token is predicted by nothing, also where pads stand before it.
        labels = labels.masked_fill(mask.roll(1, dims=1) == 0, IGNORED)
    targets = labels[:, 1:].flatten().to(logits.device)
    losses = cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), targets, ignore_index=IGNORED, reduction="none"
    ).double()
    return float(losses.sum()), int((targets != IGNORED).sum())


def _collate(rows: list[Mapping[str, Any]], batch_size: int) -> list[dict[str, Tensor]]:
    """Rows of about the same length together, padded on the right; the longest, which need most memory, first."""
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"calibrate_alpha: batch_size must be an integer >= 1, got {batch_size!r}.")
    known = sorted((_tokens_and_labels(row) for row in rows), key=lambda row: -len(row[0]))
    batches = []
    for start in range(0, len(known), batch_size):
        part = known[start : start + batch_size]
        shape = (len(part), len(part[0][0]))
        ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        labels = torch.full(shape, IGNORED)
        for i, (tokens, targets) in enumerate(part):
            ids[i, : len(tokens)], mask[i, : len(tokens)], labels[i, : len(tokens)] = tokens, 1, targets
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return batches


def _tokens_and_labels(row: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The tokens of a row that are no pads, and a label for each."""
    other = [
        name
        for name, value in row.items()
        if name not in _TOKENS and (isinstance(value, Tensor) or _is_list_of_numbers(value))
    ]
    if other:
        raise ValueError(
            f"calibrate_alpha: rows have {sorted(other)}, which is not known what to do with. Pass batches, as your "
            "collator makes them."
        )
    tokens = torch.as_tensor(row["input_ids"], dtype=torch.long)
    labels = torch.as_tensor(row["labels"], dtype=torch.long) if row.get("labels") is not None else tokens
    if labels is tokens:
        for name in ("completion_mask", "assistant_masks"):
            if row.get(name) is not None:
                labels = torch.where(torch.as_tensor(row[name]).bool(), labels, IGNORED)
    if labels.shape != tokens.shape:
        raise ValueError(f"calibrate_alpha: a row has {len(tokens)} tokens and {len(labels)} labels.")
    if row.get("attention_mask") is None:
        return tokens, labels
    real = torch.as_tensor(row["attention_mask"]).bool()
    return tokens[real], labels[real]


def _is_list_of_numbers(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and isinstance(value[0], (int, float))
