"""What is in saved adapters, as data and as text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import Tensor

from peft_s0 import S0Config, S0Layer
from peft_s0.analysis import Norms
from peft_s0.config import check_readable, find_states, load_config
from peft_s0.fit import check_fit
from peft_s0.naming import match_names, shared_name
from peft_s0.skeleton import load_without_weights
from peft_s0.storage import contents, decode, is_state

# What a state is called in a file: learnt at the start of a sequence, or added where it is read.
_STATE = re.compile(r"(?:base_model\.model\.)?(.*)\.s0\.s0_(state|offset)\.weight")
_ALPHA = re.compile(r"(?:base_model\.model\.)?(.*)\.s0\.s0_alpha\.weight")
# Offsets are listed beside states, by their mixers' names with this behind.
_OFFSET = " (offset)"
_UNRECORDED = {"peft_version", "auto_mapping", "inference_mode", "base_model_name_or_path", "revision"}
# Lists whose order says something.
_ORDERED = {"init_prompt"}


@dataclass(frozen=True)
class Saved:
    """A saved adapter.

    Args:
        name: what it was called on the command line.
        config: its config.
        states: float32 [heads, ...] by the mixers' names, unscaled, in full; an offset's says so.
        others: all else that is in the file, by its names there.
        storage: how the states are stored, as `S0Config.storage` says it.
        parameters: number of parameters in the file.
        file: its states file.
    """

    name: str
    config: S0Config
    states: dict[str, Tensor]
    others: dict[str, Tensor]
    storage: list[str]
    parameters: int
    file: Path


def read(name: str, base_model: str | None, trust_remote_code: bool, **options: Any) -> Saved:
    """Read a saved adapter; the base model's config is needed if its states are of low rank.

    Raises:
        ValueError: if it is refused as it would be in loading.
        OSError: if it is not there.
    """
    config = load_config(name, **options)
    file = find_states(name, **options)
    if file is None:
        raise ValueError(f"'{name}' has no {SAFETENSORS_WEIGHTS_NAME}; save the adapter with save_pretrained.")
    check_readable(file)
    tensors = decode(load_file(file))
    stored = {key: tensor for key, tensor in tensors.items() if _STATE.fullmatch(key)}
    check_fit({key: tuple(state.shape) for key, state in stored.items()}, stored)
    others = {key: tensor for key, tensor in tensors.items() if key not in stored}
    states = {_named(key): state for key, state in stored.items()}
    if config.rank is not None:
        states = _multiplied_out(name, base_model, trust_remote_code, options)
    held = contents(file)
    storage = sorted({how for key, (how, _) in held.items() if is_state(key)})
    parameters = sum(number for _, number in held.values())
    return Saved(name, config, dict(sorted(states.items(), key=_order)), others, storage, parameters, file)


def _named(key: str) -> str:
    mixer, kind = _STATE.sub(r"\1 \2", key).rsplit(" ", 1)
    return mixer if kind == "state" else f"{mixer}{_OFFSET}"


def _mixers(layers: list[dict[str, Any]]) -> set[str]:
    """The mixers that have a state, an offset or both."""
    return {layer["name"].removesuffix(_OFFSET) for layer in layers}


def _multiplied_out(
    name: str, base_model: str | None, trust_remote_code: bool, options: dict[str, Any]
) -> dict[str, Tensor]:
    model = load_without_weights(name, base_model, trust_remote_code, **options)
    with torch.no_grad():
        return {
            _named(f"{key}.{kind}.weight"): module.compose(module.weight)
            for key, layer in model.get_base_model().named_modules()
            if isinstance(layer, S0Layer)
            for kind, module in layer.states("default").items()
        }


def _order(item: tuple[str, Tensor]) -> tuple[Any, ...]:
    return tuple(int(part) if part.isdigit() else part for part in shared_name(item[0]).split("."))


def head_norms(state: Tensor) -> Tensor:
    """Frobenius norm of each head's state; of a state without heads, of each row's or value's."""
    return state.flatten(1).norm(dim=1) if state.ndim > 1 else state.abs()


def inspection(saved: Saved) -> dict[str, Any]:
    """What `peft-s0 inspect` shows, as JSON has it."""
    config = saved.config
    layers = []
    for name, state in saved.states.items():
        norms = head_norms(state)
        layers.append(
            {
                "name": name,
                "shape": list(state.shape),
                "mean_norm": float(norms.mean()),
                "max_norm": float(norms.max()),
                "head_norms": norms.tolist(),
            }
        )
    return {
        "adapter": saved.name,
        "base_model": config.base_model_name_or_path,
        "variant": config.variant,
        "alpha": config.alpha,
        "alpha_pattern": config.alpha_pattern,
        "learnt_alphas": {
            match[1]: float(tensor)
            for key, tensor in saved.others.items()
            if (match := _ALPHA.fullmatch(key)) is not None
        },
        "train_alpha": config.train_alpha,
        "normalize": config.normalize,
        "rank": config.rank,
        "storage": saved.storage,
        "parameters": saved.parameters,
        "file": str(saved.file),
        "bytes": saved.file.stat().st_size,
        "layers": layers,
        "others": {name: list(tensor.shape) for name, tensor in saved.others.items()},
    }


def show_inspection(found: dict[str, Any]) -> str:
    """`inspection` as text."""
    lines = [found["adapter"]]
    own = found["alpha_pattern"] | found["learnt_alphas"]
    shown = {
        "base model": found["base_model"] or "not said",
        "variant": found["variant"],
        "alpha": _number(found["alpha"]) + ("" if not found["normalize"] else ", of the normalised state"),
        **{f"alpha of {name}": _number(alpha) for name, alpha in own.items()},
        "train_alpha": "as alpha" if found["train_alpha"] is None else _number(found["train_alpha"]),
        "rank": "full" if found["rank"] is None else str(found["rank"]),
        "layers": str(len(_mixers(found["layers"]))),
        "parameters": f"{found['parameters']:,}",
        "file": f"{found['bytes']:,} bytes, states in {' and '.join(found['storage'])}",
    }
    beside = [name for name in found["others"] if _ALPHA.fullmatch(name) is None]
    if beside:
        shown["beside the states"] = ", ".join(beside)
    width = max(map(len, shown))
    lines += [f"  {name:{width}}  {value}" for name, value in shown.items()]
    rows = [("layer", "shape", "mean norm", "max norm")]
    for layer in found["layers"]:
        shape = " x ".join(map(str, layer["shape"]))
        rows.append((layer["name"], shape, _number(layer["mean_norm"]), _number(layer["max_norm"])))
    return "\n".join([*lines, "", *_table(rows)])


def draw_norms(found: dict[str, Any], file: Path) -> None:
    """Draw the norms of an `inspection` as a heat map of layers and heads.

    Raises:
        ImportError: without matplotlib.
        ValueError: for a format that matplotlib does not write.
    """
    heads = [np.array(layer["head_norms"]) for layer in found["layers"]]
    axes = Norms([layer["name"] for layer in found["layers"]], heads, found["alpha"]).plot()
    axes.set_title(found["adapter"])
    axes.figure.savefig(file, dpi=160)


def compare(first: Saved, second: Saved) -> dict[str, Any]:
    """What `peft-s0 diff` shows, as JSON has it."""
    configs = [_fields(saved.config) for saved in (first, second)]
    changed = {
        name: [config[name] for config in configs] for name in configs[0] if configs[0][name] != configs[1][name]
    }
    others = _by_names_of(first.states, second.states)
    layers = [_distance(name, state, others[name]) for name, state in first.states.items() if name in others]
    only = [sorted(first.states.keys() - others.keys()), sorted(others.keys() - first.states.keys())]
    rest = _by_names_of(first.others, second.others)
    beside = sorted(name for name in {*first.others, *rest} if not _same(first.others.get(name), rest.get(name)))
    return {
        "same": not changed and not any(only) and not beside and all(layer["same"] for layer in layers),
        "adapters": [first.name, second.name],
        "config": changed,
        "layers": layers,
        "only_in": only,
        "others": beside,
    }


def _by_names_of(first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, Tensor]:
    """The second's tensors by the first's names, which may be those of another class of the model."""
    own = match_names(second, first)
    return {own[name]: tensor for name, tensor in second.items()}


def _fields(config: S0Config) -> dict[str, Any]:
    """The fields of a config that say what the adapter is; sets, which files have as lists, in an order."""
    fields = {name: value for name, value in config.to_dict().items() if name not in _UNRECORDED}
    return {
        name: sorted(value) if isinstance(value, (set, list)) and name not in _ORDERED else value
        for name, value in fields.items()
    }


def _distance(name: str, first: Tensor, second: Tensor) -> dict[str, Any]:
    if first.shape != second.shape:
        shapes = [list(first.shape), list(second.shape)]
        return {"name": name, "same": False, "shapes": shapes, "distance": None, "cosine": None}
    a, b = first.double().flatten(), second.double().flatten()
    norms = a.norm() * b.norm()
    return {
        "name": name,
        "same": torch.equal(first, second),
        "distance": float((a - b).norm() / a.norm()) if a.any() else None,
        "cosine": float(a @ b / norms) if norms > 0 else None,
    }


def _same(first: Tensor | None, second: Tensor | None) -> bool:
    return first is not None and second is not None and torch.equal(first, second)


def show_comparison(found: dict[str, Any]) -> str:
    """`compare` as text."""
    first, second = found["adapters"]
    lines = [f"A: {first}", f"B: {second}"]
    if found["same"]:
        return "\n".join([*lines, f"The same, in all of {len(_mixers(found['layers']))} layers."])
    lines += [f"{name}: {a!r} in A, {b!r} in B" for name, (a, b) in found["config"].items()]
    lines += [f"{name}: only in {'AB'[i]}" for i, names in enumerate(found["only_in"]) for name in names]
    lines += [f"{name}: differs" for name in found["others"]]
    rows = [("layer", "|A - B| / |A|", "cosine")]
    for layer in found["layers"]:
        if "shapes" in layer:
            lines.append("{}: {} in A, {} in B".format(layer["name"], *layer["shapes"]))
        else:
            cosine = "-" if layer["cosine"] is None else f"{layer['cosine']:.6f}"
            rows.append((layer["name"], _number(layer["distance"]), cosine))
    return "\n".join([*lines, *(["", *_table(rows)] if len(rows) > 1 else [])])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows with their columns aligned, the first to the left and all others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return lines
