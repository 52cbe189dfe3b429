"""State files of others to PEFT adapters and back: the s0-tuning library's folders, RWKV's `time_state` files.

A file's layers are found in the base model, of which the config alone is needed. Everything is checked before anything
is written, and what is written is there whole or not at all. docs/importing.md describes the formats.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any
from warnings import warn

import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from .card import CARD_NAME
from .config import S0Config, check_readable, find_states, load_config
from .files import check_place, find_file, new_file, new_folder
from .fit import check_fit
from .injection import CHILD
from .layer import S0Layer
from .mixers import Family, gated_delta_rule, mamba2
from .model import recurrent_mixers
from .naming import shared_name
from .skeleton import check_states_alone, load_without_weights, without_weights

Base = PreTrainedModel | str | Path

ADAPTER_FILES = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, CARD_NAME)
"""The files of an adapter's folder; one that holds no others may be replaced."""

STATES, CONFIG, META = "states.safetensors", "config.json", "meta.json"


@dataclass(frozen=True)
class _Architecture:
    """What the s0-tuning library calls a recurrence, and where in a decoder layer it looks for the mixer.

    It takes a mixer's state as transformers' kernels do: [heads, key dimension, value dimension] for the gated delta
    rule, [heads, head dimension, state dimension] for Mamba-2. So do transformers' mixers, and nothing is transposed.
    Layers of other packages that are laid out in another way are not at these names.
    """

    name: str
    mixer: str
    family: Family


_ARCHITECTURES = (
    _Architecture("gated_delta_net", "linear_attn", gated_delta_rule.FAMILY),
    _Architecture("mamba2", "mamba", mamba2.FAMILY),
)
# Fields of its config, with their types; those of the training are kept in the states file's metadata.
_TRAINING: dict[str, tuple[type, ...]] = {"n_steps": (int,), "lr": (int, float), "grad_clip": (int, float)}
_TRAINING["max_length"] = (int,)
_FIELDS = {**_TRAINING, "l2_lambda": (int, float), "alpha": (int, float, type(None)), "normalize": (bool,)}
_ORDER = ("n_steps", "lr", "l2_lambda", "alpha", "normalize", "grad_clip", "max_length")
_RECORD = "s0_tuning"

_RWKV = ("RWKV-6", "RWKV-7")
_TIME_STATE = re.compile(r"blocks\.(\d+)\.att\.time_state")


def import_s0_tuning(
    source: str | Path,
    output: str | Path,
    base_model: Base,
    *,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    **options: Any,
) -> None:
    """Make a PEFT adapter of a folder that the paper's authors' library `s0-tuning` (0.1.2) has saved.

    `alpha`, `normalize` and `l2_lambda` are those of the file, and `train_alpha` is 1.0, since that library trains the
    bare state and scales it afterwards. Where its config gives no `alpha`, it is that library's default, which is also
    this one's. Which layers have a state is said by the states' own keys; layers without one start from zero.

    Args:
        source: folder or Hub id with `states.safetensors`, `config.json` and `meta.json`. Of the latter two either may
            be missing: that library's defaults hold then, or there is less to check.
        output: folder to write the adapter to.
        base_model: the model the states were trained on, or its folder or Hub id; see `without_weights`.
        overwrite: replace an adapter that is there.
        trust_remote_code: whether code of the base model's repository may be run.
        options: `subfolder`, `revision`, `token` and the like, for the source on the Hub.

    Raises:
        ValueError: if the files are not of that format, or do not fit the base model: architecture, layers, shapes,
            dtypes, values that are not finite. The message names the thing, the expected and the found.
        FileExistsError: if `output` exists and may not be replaced.

    Warns:
        UserWarning: if only some of the model's layers have a state, or `meta.json` says other layers or another shape
            than the states, which count.
    """
    check_place(output, overwrite, ADAPTER_FILES)
    states = _read_states(source, options)
    config = _check_fields(source, _read_json(source, CONFIG, options))
    meta = _read_json(source, META, options)
    base = without_weights(base_model, trust_remote_code)
    architecture, layers = _layers_of(base)
    if meta.get("arch", architecture.name) != architecture.name:
        raise ValueError(
            f"'{source}' has states of the architecture {meta['arch']!r}, but {type(base).__name__} is "
            f"{architecture.name!r}. Name the base model that they were trained on."
        )
    unknown = sorted(states.keys() - layers.keys())
    if unknown:
        raise ValueError(
            f"'{source}' has states for layers {_listed(states)}, but {type(base).__name__} has no recurrent layer "
            f"{_listed(unknown)}; its recurrent layers are {_listed(layers)}. Name the base model that they were "
            "trained on."
        )
    check_fit({f"{i}": layers[i].shape for i in states}, {f"{i}": state for i, state in states.items()})
    _warn_of_meta(source, meta, states, layers)
    _write_adapter(
        output,
        overwrite,
        base,
        {layers[index].name: state for index, state in states.items()},
        S0Config(
            task_type=_task_of(base),
            alpha=config.get("alpha"),
            train_alpha=1.0,
            normalize=config.get("normalize", False),
            l2_lambda=config.get("l2_lambda", 5e-4),
            layers_to_transform=None if states.keys() == layers.keys() else sorted(states),
        ),
        {_RECORD: json.dumps({name: config[name] for name in _TRAINING if name in config})},
    )


def export_s0_tuning(
    adapter: str | Path,
    output: str | Path,
    base_model: Base | None = None,
    *,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    **options: Any,
) -> None:
    """Make a folder that the paper's authors' library `s0-tuning` (0.1.2) loads of a saved adapter.

    States of low rank are written in full. What that format has no place for is left out: `train_alpha`, and all that
    says how an adapter's training starts. Of an adapter that `import_s0_tuning` made, the folder is the one it was made
    from, byte for byte, but that an `alpha` is always a number.

    Args:
        adapter: folder or Hub id of the adapter.
        output: folder to write to.
        base_model: the model the adapter is for, or its folder or Hub id. None: the one that the adapter names.
        overwrite: replace such a folder that is there.
        trust_remote_code: whether code of the base model's repository may be run.
        options: `subfolder`, `revision`, `token` and the like, for the adapter on the Hub.

    Raises:
        ValueError: if the format has no place for the adapter: layers of a kind that the library does not know, a
            variant other than "initial", weights beside the states; or if the adapter does not fit the base model.
        FileExistsError: if `output` exists and may not be replaced.
    """
    check_place(output, overwrite, (STATES, CONFIG, META))
    model = _load(adapter, base_model, trust_remote_code, options)
    architecture, layers = _layers_of(model.get_base_model())
    names = {layer.name: index for index, layer in layers.items()}
    tuned = _tuned_layers(model)
    strange = sorted(tuned.keys() - names.keys())
    if strange:
        raise ValueError(
            f"'{adapter}' has a state for '{strange[0]}', where the s0-tuning library does not look for one: it knows "
            f"the mixers called '{architecture.mixer}' of this model's decoder layers."
        )
    config: Any = model.peft_config["default"]
    with torch.no_grad():
        states = {names[name]: layer.state("default")().contiguous() for name, layer in tuned.items()}
        for name, layer in tuned.items():
            _check_scale(adapter, name, config, states[names[name]], layer.effective_state("default"))
    values = {
        **_read_record(adapter, options),
        "l2_lambda": config.l2_lambda,
        "alpha": config.alpha,
        "normalize": config.normalize,
    }
    first = next(iter(layers.values()))
    meta = {"arch": architecture.name, "recurrent_layers": sorted(layers), "state_shape": list(first.shape)}
    with new_folder(output, overwrite, (STATES, CONFIG, META)) as folder:
        save_file({str(index): state for index, state in states.items()}, folder / STATES)
        ordered = {name: values[name] for name in _ORDER if name in values}
        (folder / CONFIG).write_text(json.dumps(ordered, indent=2))
        (folder / META).write_text(json.dumps(meta, indent=2))


def import_rwkv(
    source: str | Path,
    output: str | Path,
    base_model: Base,
    *,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Make a PEFT adapter of a `.pth` file of tuned RWKV states, for flash-linear-attention's RWKV-6 and RWKV-7 models.

    Such a file has a tensor `blocks.{i}.att.time_state` [heads, value dimension, key dimension] for each layer, in
    bfloat16 or float32, and no scale. fla's layers keep their state as [heads, key dimension, value dimension].

    Args:
        source: the file. It is read without running any code that it may hold.
        output: folder to write the adapter to.
        base_model: the fla model the states are for, or its folder or Hub id; see `without_weights`.
        overwrite: replace an adapter that is there.
        trust_remote_code: whether code of the base model's repository may be run.

    Raises:
        ValueError: if the file is not of that format, or does not fit the base model; the message names the thing, the
            expected and the found.
        FileExistsError: if `output` exists and may not be replaced.
        FileNotFoundError: if there is no such file.
        ImportError: if the base model is given by name and flash-linear-attention is not installed.
    """
    check_place(output, overwrite, ADAPTER_FILES)
    states = _read_rwkv(Path(source))
    base = _rwkv_without_weights(base_model, trust_remote_code)
    layers = _rwkv_layers_of(base)
    check_fit(
        {_time_state(i): (layer.shape[0], layer.shape[2], layer.shape[1]) for i, layer in layers.items()},
        {_time_state(i): state for i, state in states.items()},
    )
    _write_adapter(
        output,
        overwrite,
        base,
        {layers[index].name: state.float().transpose(1, 2).contiguous() for index, state in states.items()},
        S0Config(task_type=_task_of(base), alpha=1.0, l2_lambda=0.0),
        {},
    )


def export_rwkv(
    adapter: str | Path,
    output: str | Path,
    base_model: Base | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    **options: Any,
) -> None:
    """Make a `.pth` file of RWKV states of a saved adapter for one of flash-linear-attention's RWKV models.

    The file has no scale: its states are those that sequences start from. RWKV's programs want a state for every layer;
    layers that the adapter leaves alone get zeros.

    Args:
        adapter: folder or Hub id of the adapter.
        output: file to write.
        base_model: the fla model the adapter is for, or its folder or Hub id. None: the one that the adapter names.
        dtype: dtype of the states, float32 or bfloat16, which rounds them.
        overwrite: replace a file that is there.
        trust_remote_code: whether code of the base model's repository may be run.
        options: `subfolder`, `revision`, `token` and the like, for the adapter on the Hub.

    Raises:
        ValueError: if the base model is no RWKV model, the format has no place for the adapter, the adapter does not
            fit, or for another dtype.
        FileExistsError: if `output` exists and may not be replaced.
        ImportError: see `import_rwkv`.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"RWKV's states are in float32 or bfloat16, got dtype={dtype}.")
    check_place(output, overwrite)
    _require_fla(base_model)
    model = _load(adapter, base_model, trust_remote_code, options)
    tuned = _tuned_layers(model)
    states = {}
    with torch.no_grad():
        for index, layer in _rwkv_layers_of(model.get_base_model()).items():
            state = tuned[layer.name].effective_state("default") if layer.name in tuned else torch.zeros(layer.shape)
            states[_time_state(index)] = state.transpose(1, 2).to(dtype).contiguous()
    # By way of memory: on a full disk, torch's own error tells of positions in a file.
    content = BytesIO()
    torch.save(states, content)
    with new_file(output, overwrite) as file:
        file.write_bytes(content.getvalue())


@dataclass(frozen=True)
class _Layer:
    """A recurrent layer of a base model: its mixer's name there, and the shape of its state."""

    name: str
    shape: tuple[int, ...]


def _layers_of(base: nn.Module) -> tuple[_Architecture, dict[int, _Layer]]:
    """The layers in which the s0-tuning library finds a recurrent mixer, by their index.

    Raises:
        NoMatchingPeftModuleError: if there is no recurrent layer at all.
        ValueError: if there is none that the library knows.
    """
    mixers = recurrent_mixers(base)
    for architecture in _ARCHITECTURES:
        layers = {}
        for name, declaration in mixers.items():
            place = re.fullmatch(rf"[^.]+\.(\d+)\.{architecture.mixer}", shared_name(name))
            if place and declaration.family == architecture.family:
                layers[int(place[1])] = _Layer(name, declaration.state_shape(base.get_submodule(name)))
        if layers:
            return architecture, layers
    name, declaration = next(iter(mixers.items()))
    known = " and ".join(f"{known.family.name} mixers called '{known.mixer}'" for known in _ARCHITECTURES)
    raise ValueError(
        f"The s0-tuning library knows {known}. {type(base).__name__} has '{name}' of the family "
        f"{declaration.family.name}: that format has no place for its states."
    )


def _rwkv_layers_of(base: nn.Module) -> dict[int, _Layer]:
    """The layers of an RWKV model, by their index.

    Raises:
        NoMatchingPeftModuleError: if there is no recurrent layer at all.
        ValueError: if there is a recurrent layer of another kind.
    """
    layers = {}
    for name, declaration in recurrent_mixers(base).items():
        if declaration.family.name not in _RWKV:
            raise ValueError(
                f"time_state files are for RWKV-6 and RWKV-7 models of flash-linear-attention, but "
                f"{type(base).__name__} has '{name}' of the family {declaration.family.name}."
            )
        layers[int(shared_name(name).split(".")[1])] = _Layer(name, declaration.state_shape(base.get_submodule(name)))
    return layers


def _time_state(index: int) -> str:
    return f"blocks.{index}.att.time_state"


def _listed(indices: Any) -> str:
    return ", ".join(map(str, sorted(indices)))


def _read_states(source: str | Path, options: dict[str, Any]) -> dict[int, Tensor]:
    file = find_file(source, STATES, **options)
    if file is None:
        pickled = find_file(source, "states.pt", **options)
        raise ValueError(
            f"'{source}' has no {STATES}, which the s0-tuning library saves."
            + (
                " Its states.pt is a pickle file, which can run code when it is read. One that you trust is converted "
                "by safetensors.torch.save_file({str(i): s for i, s in torch.load('states.pt', weights_only=True)"
                f".items()}}, '{STATES}')."
                if pickled
                else ""
            )
        )
    check_readable(file)
    states = load_file(file)
    strange = sorted(key for key in states if not re.fullmatch(r"0|[1-9]\d*", key))
    if strange or not states:
        raise ValueError(
            f"'{file}' has no states of the s0-tuning library: expected tensors named by the index of their decoder "
            f"layer, such as '0', found {repr(strange[0]) if strange else 'none'}."
        )
    for key, state in states.items():
        if state.dtype != torch.float32:
            raise ValueError(f"'{file}': the state of layer {key} has dtype {state.dtype}, expected torch.float32.")
    return {int(key): state for key, state in states.items()}


def _read_json(source: str | Path, name: str, options: dict[str, Any]) -> dict[str, Any]:
    """A JSON object of the s0-tuning library; an empty one if the file is not there."""
    file = find_file(source, name, **options)
    if file is None:
        return {}
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"'{file}' is not JSON ({error}).") from error
    if not isinstance(values, dict):
        raise ValueError(f"'{file}' must hold a JSON object, found a {type(values).__name__}.")
    return values


def _check_fields(source: str | Path, config: dict[str, Any]) -> dict[str, Any]:
    for name, value in config.items():
        if name not in _FIELDS:
            raise ValueError(
                f"'{source}' has a field '{name}' in its {CONFIG}, which s0-tuning 0.1.2 does not have: how its states "
                "are meant is not known."
            )
        if not isinstance(value, _FIELDS[name]) or (isinstance(value, bool) and name != "normalize"):
            expected = " or ".join(kind.__name__ for kind in _FIELDS[name])
            raise ValueError(f"'{source}': {name} in {CONFIG} must be {expected}, found {value!r}.")
    return config


def _warn_of_meta(
    source: str | Path, meta: dict[str, Any], states: Mapping[int, Tensor], layers: Mapping[int, _Layer]
) -> None:
    """Say where states, `meta.json` and the model's layers are not the same; none of it makes the states others."""
    missing = layers.keys() - states.keys()
    if missing:
        warn(
            f"'{source}' has states for {len(states)} of the {len(layers)} recurrent layers; layers {_listed(missing)} "
            "start from zero.",
            stacklevel=3,
        )
    listed = meta.get("recurrent_layers")
    if listed is not None and listed not in (sorted(layers), sorted(states)):
        warn(
            f"'{source}': recurrent_layers in {META} is {listed}, but the states are those of layers "
            f"{_listed(states)}. The states count.",
            stacklevel=3,
        )
    shape = list(next(iter(states.values())).shape)
    if meta.get("state_shape", shape) != shape:
        warn(
            f"'{source}': state_shape in {META} is {meta['state_shape']}, but the states are {shape}, as the model "
            "has them. The states count.",
            stacklevel=3,
        )


def _read_rwkv(file: Path) -> dict[int, Tensor]:
    if not file.is_file():
        raise FileNotFoundError(f"There is no file '{file}'.")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # of any kind, where it is no pickle file at all
        raise ValueError(
            f"'{file}' is no file of tensors that torch.load reads with weights_only=True: it is damaged, or holds "
            "objects that could run code."
        ) from error
    if not isinstance(content, dict) or not content:
        raise ValueError(f"'{file}' must hold tensors by their names, found {type(content).__name__}.")
    states = {}
    for name, state in content.items():
        found = _TIME_STATE.fullmatch(str(name))
        if found is None or not isinstance(state, Tensor):
            raise ValueError(
                f"'{file}' holds '{name}', expected states only, named {_time_state(0)} and so on. Of a whole model's "
                "weights, save those alone."
            )
        if state.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"'{file}': '{name}' has dtype {state.dtype}, expected float32 or bfloat16.")
        states[int(found[1])] = state.detach()
    return states


def _rwkv_without_weights(base_model: Base, trust_remote_code: bool) -> PreTrainedModel:
    _require_fla(base_model)
    return without_weights(base_model, trust_remote_code)


def _require_fla(base_model: Base | None) -> None:
    """Let transformers know fla's models, by whose names it finds them."""
    if isinstance(base_model, PreTrainedModel):
        return
    try:
        importlib.import_module("fla.models")
    except ImportError as error:
        raise ImportError(
            "RWKV models by name need flash-linear-attention: pip install 'peft-s0[fla]', or pass the model itself."
        ) from error


def _load(adapter: str | Path, base_model: Base | None, trust_remote_code: bool, options: dict[str, Any]) -> PeftModel:
    """An adapter on its base model without weights, if it is one whose states are all there is to it."""
    config: Any = load_config(adapter, **options)
    if config.variant != "initial":
        raise ValueError(f"'{adapter}' has variant={config.variant!r}; this format has a place for 'initial' alone.")
    if config.modules_to_save or config.trainable_token_indices:
        raise ValueError(
            f"'{adapter}' has modules_to_save or trainable_token_indices, for which this format has no place: its "
            "states alone would be another adapter."
        )
    check_states_alone(adapter, **options)
    return load_without_weights(adapter, base_model, trust_remote_code, **options)


def _task_of(base: PreTrainedModel) -> str | None:
    """The task that PEFT is told of: its class for language models takes only those that generate."""
    return "CAUSAL_LM" if base.can_generate() else None


def _tuned_layers(model: PeftModel) -> dict[str, S0Layer]:
    """The layers with a state, by their mixers' names in the base model."""
    return {
        name.removesuffix(f".{CHILD}"): module
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, S0Layer)
    }


def _check_scale(adapter: str | Path, name: str, config: S0Config, state: Tensor, effective: Tensor) -> None:
    """Refuse a state that is not used as the s0-tuning library would use it, by `alpha` and `normalize` alone."""
    assert config.alpha is not None, "the adapter has met a model"
    scale = config.alpha / state.norm() if config.normalize and state.any() else config.alpha
    if not torch.allclose(effective, scale * state, rtol=1e-4, atol=0):
        raise ValueError(
            f"'{adapter}' scales the state of '{name}' by something else than alpha={config.alpha}; that format has "
            "one alpha for all layers. Give the adapter one alpha and save it again."
        )


def _read_record(adapter: str | Path, options: dict[str, Any]) -> dict[str, Any]:
    """What `import_s0_tuning` has kept of the training; empty for states that come from elsewhere."""
    file = find_states(str(adapter), **options)
    assert file is not None, "its states were loaded"
    with safe_open(file, framework="pt") as states:
        record: dict[str, Any] = json.loads((states.metadata() or {}).get(_RECORD, "{}"))
    return record


def _write_adapter(
    output: str | Path,
    overwrite: bool,
    base: PreTrainedModel,
    states: Mapping[str, Tensor],
    config: S0Config,
    record: dict[str, str],
) -> None:
    """Write an adapter as PEFT does, from states by their mixers' names."""
    model = get_peft_model(base, config)
    set_peft_model_state_dict(
        model, {f"base_model.model.{name}.{CHILD}.s0_state.weight": state for name, state in states.items()}
    )
    with new_folder(output, overwrite, ADAPTER_FILES) as folder:
        model.save_pretrained(str(folder), save_embedding_layers=False)
        file = folder / SAFETENSORS_WEIGHTS_NAME
        save_file(load_file(file), file, {"format": "pt", **record})
