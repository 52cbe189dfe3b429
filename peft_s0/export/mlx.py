"""Tuned states for mlx-lm, as a prompt cache of no tokens.

mlx-lm keeps what a model has seen of a prompt in a list of caches, one for each layer that has any, and writes and
reads such a list as a safetensors file. A file made here is the list of a sequence that has no token yet: keys and
values are empty, convolutions have seen zeros, and recurrent states are the tuned ones. It is written without mlx.

The format has been read in mlx-lm's source and is tested with the version below. It may change with any other.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn

from ..files import check_place, new_file
from .states import Start, read_start

MLX_LM = "0.32.2"
"""The version of mlx-lm that the tests pass with; versions before it cannot read empty caches of keys and values."""

# By the beginnings of the names of transformers' classes.
_GATED_DELTA_NET = ("Qwen3Next", "Qwen3_5", "Qwen3_5Moe")
_MAMBA2 = ("FalconH1", "GraniteMoeHybrid", "Mamba2", "NemotronH")
_BOTH_IN_A_LAYER = ("FalconH1",)
SUPPORTED = (*_GATED_DELTA_NET, *_MAMBA2)
"""The models, as transformers' classes are called."""
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def write_cache(
    adapter: PeftModel | str | Path,
    file: str | Path,
    *,
    adapter_name: str | None = None,
    dtype: str = "bfloat16",
    model: str = "",
    overwrite: bool = False,
    **options: Any,
) -> Path:
    """Write a prompt cache that starts from a tuned state, as mlx-lm's `load_prompt_cache` reads it.

    Generating changes the cache that it is given: load the file anew for each prompt, or copy what was loaded.

    Args:
        adapter: a live model with S0 adapters in eval mode, or folder or Hub id of a saved adapter, for which the base
            model's config is read.
        file: what to write, in one step: whenever the process ends, the old file is there or the new one.
        adapter_name: which adapter of a live model; None: the active one.
        dtype: what mlx-lm computes in, "float32", "float16" or "bfloat16", also where weights are quantised. The
            convolutions' zeros are of it, and would turn all that follows into theirs. States are float32.
        model: what `mlx_lm.generate --prompt-cache-file` is given as `--model`, which it compares.
        overwrite: replace a file that is there.
        options: for a saved adapter, `base_model` (the model, its folder or Hub id; else the one that the adapter
            names), `trust_remote_code`, and `subfolder`, `revision`, `token` and the like, for the Hub.

    Returns:
        The file.

    Raises:
        FileExistsError: if the file exists and may not be replaced.
        TypeError: if the adapter is none.
        ValueError: for another model than those supported, an adapter that is more than initial states or has values
            that are not finite, and an unknown dtype.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"write_cache: dtype must be one of {sorted(_DTYPES)}, got {dtype!r}.")
    check_place(file, overwrite)
    start = read_start(adapter, adapter_name, **options)
    layers = _layers(start, _DTYPES[dtype])
    arrays: dict[str, Tensor] = {}
    metadata = {"0.model": model, "0.tokenizer_config": "{}", "2.0": ""}
    for place, (kind, state) in enumerate(layers):
        metadata[f"1.{place}"] = kind
        _flatten(state, str(place), arrays, metadata)
    with new_file(file, overwrite) as temporary:
        save_file(arrays, temporary, metadata)
    return Path(file)


def _layers(start: Start, dtype: torch.dtype) -> list[tuple[str, Any]]:
    """The caches of the layers that have any: what mlx-lm's class is called, and its state."""
    name = re.match(r"([A-Z]\w*?)(ForCausalLM|ForConditionalGeneration|Model|TextModel)$", start.model_class)
    family = name[1] if name else start.model_class
    if family not in SUPPORTED:
        raise ValueError(
            f"{start.source} is for a {start.model_class}. States can be exported to mlx-lm for {', '.join(SUPPORTED)}."
        )
    _check_groups(start, family)
    caches: list[tuple[str, Any]] = []
    for layer, kind in enumerate(start.config.layer_types):
        empty = ("KVCache", [None, None, 0])
        if layer in start.mixers:
            recurrent = ("ArraysCache", _arrays(start, layer, family, dtype))
            if family in _BOTH_IN_A_LAYER:
                # Within a list, a cache's state comes before its name.
                caches.append(("CacheList", [[state, name] for name, state in (recurrent, empty)]))
            else:
                caches.append(recurrent)
        elif "attention" in kind:
            caches.append(empty)
    return caches


def _check_groups(start: Start, family: str) -> None:
    """Refuse models that mlx-lm runs otherwise than transformers: with groups, it normalises over all of them."""
    normalises = family in ("Mamba2", "GraniteMoeHybrid") or getattr(start.config, "mamba_rms_norm", False)
    groups = max((int(getattr(mixer, "n_groups", 1)) for mixer in start.mixers.values()), default=1)
    if family in _MAMBA2 and family != "NemotronH" and normalises and groups > 1:
        raise ValueError(
            f"{start.source} is for a {start.model_class} whose heads share keys in {groups} groups. mlx-lm {MLX_LM} "
            "normalises over all groups together, so that the model answers otherwise there, also without a state."
        )


def _arrays(start: Start, layer: int, family: str, dtype: torch.dtype) -> list[Any]:
    """What a recurrent layer keeps: the last inputs of its convolution, its state, and no paddings nor lengths."""
    mixer: nn.Module = start.mixers[layer]
    weight: Any = mixer.conv1d.weight  # type: ignore[union-attr]
    convolution = torch.zeros(1, weight.shape[-1] - 1, weight.shape[0], dtype=dtype)
    state = start.states.get(layer)
    if state is None:
        state = torch.zeros(start.shapes[layer])
    if family in _GATED_DELTA_NET:
        state = state.transpose(1, 2)
    return [[convolution, state[None].contiguous()], None, None]


def _flatten(value: Any, name: str, arrays: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a nested list as mlx does: arrays by the path to them, and what was none as one that metadata tells of."""
    if isinstance(value, list):
        for place, part in enumerate(value):
            _flatten(part, f"{name}.{place}", arrays, metadata)
        return
    if isinstance(value, Tensor):
        arrays[name] = value
        return
    if value is None:
        kind, array = "none", torch.zeros(0)
    elif isinstance(value, str):
        kind, array = "string", torch.tensor([ord(letter) for letter in value], dtype=torch.int32)
    else:
        kind, array = "scalar", torch.tensor(value, dtype=torch.int32)
    arrays[name] = array
    # The first of the list that they are in is empty, lest it be left out.
    place = 1 + sum(key.startswith("2.") and key.endswith(".0") for key in metadata if key != "2.0")
    metadata[f"2.{place}.0"], metadata[f"2.{place}.1"] = name, kind
