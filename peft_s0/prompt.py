"""States without training: what a prompt leaves behind in the recurrent layers, as an S0 adapter.

A prompt that has run through the base model leaves each recurrent layer in a state. A sequence that starts from that
state starts, for the recurrent layers, as if the prompt stood in front of it: a system prompt of no tokens.

Three things of the prompt are no part of that state, and are lost: what attention layers keep of it (keys and values),
the last inputs of the short convolutions in front of a recurrence, and its length, since positions begin at 0 again.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from .config import S0Config, check_holds_prompt
from .injection import has_layer, layer_of
from .layer import check_finite
from .probing import base_of, final_states, in_eval_mode, token_rows, without_adapters

CHUNK = 4096
"""How many tokens of a prompt run in one call."""


def state_from_prompt(
    model: nn.Module,
    tokenizer: Any,
    prompt: Any,
    *,
    adapter_name: str = "default",
    config: S0Config | None = None,
    chunk_size: int = CHUNK,
) -> PeftModel:
    """Make an adapter of the states in which a prompt leaves the base model. Nothing is trained.

    The prompt runs through the base model, with all adapters disabled and in evaluation mode. Sequences then start from
    the states at its end, as the model's cache has them, in float32.

    Args:
        model: the model to adapt, in place, as `get_peft_model` does it; or a PeftModel with S0 adapters, which gets
            one more, not yet active, as `add_adapter` does it.
        tokenizer: the model's tokenizer; None if the prompt is token ids.
        prompt: a text, with the special tokens that the tokenizer adds to it; chat messages, put into the tokenizer's
            chat template; or token ids. A list of such: the mean of their states.
        adapter_name: name of the new adapter.
        config: its config. None: `S0Config(alpha=1.0)`, which keeps the states as they are. With another `alpha` they
            are kept divided by it, so that sequences start from the same. With `rank`, each head's state is replaced by
            the nearest of that rank.
        chunk_size: longer prompts are run in pieces of so many tokens, if the base model can go on with a sequence by
            several tokens.

    Returns:
        The PeftModel, whose states are trainable as those of any new adapter, unless the config says inference_mode.

    Raises:
        ValueError: for a prompt without tokens, a name that is taken, a config that does not keep the states (see
            `check_holds_prompt`), a recurrence whose end no initial state can stand for, and states that are not
            finite. The model is then as it was.
        TypeError: for a prompt of another kind.

    Example:
        >>> model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3.5-4B")
        >>> tokenizer = AutoTokenizer.from_pretrained("Qwen/Qwen3.5-4B")
        >>> model = state_from_prompt(model, tokenizer, "Answer in French, and briefly.")
    """
    config = S0Config(alpha=1.0) if config is None else config
    if config.init_weights == "prompt":
        raise ValueError("state_from_prompt got a prompt, and a config with another (init_prompt). Leave one out.")
    check_holds_prompt(config)
    if adapter_name in getattr(model, "peft_config", {}):
        raise ValueError(f"Adapter '{adapter_name}' exists already; choose another name or delete it first.")
    if not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"state_from_prompt: chunk_size must be an integer >= 1, got {chunk_size!r}.")
    states = _states_of(base_of(model), tokenizer, prompt, chunk_size)
    if isinstance(model, PeftModel):
        model.add_adapter(adapter_name, config)
    else:
        model = get_peft_model(cast(Any, model), config, adapter_name)
    _write(base_of(model), adapter_name, states)
    return model


def start_from_prompt(model: nn.Module, adapter_name: str, config: S0Config) -> None:
    """Write the state of its config's prompt into an adapter that was just made, if the config has one.

    Not where states are loaded: for inference, from a file, or on the meta device.

    Raises:
        ValueError: see `state_from_prompt`; also for a model without weights, and without a tokenizer.
    """
    if config.init_weights != "prompt" or config.inference_mode or config.awaits_states:
        return
    layers = [layer_of(module) for module in model.modules() if has_layer(module)]
    layers = [layer for layer in layers if adapter_name in layer.configs]
    if all(learnt.weight.is_meta for layer in layers for learnt in layer.states(adapter_name).values()):
        return
    # Not when the config is made: that of an adapter whose alpha was changed later is read from its file.
    check_holds_prompt(config)
    if any(weight.is_meta for weight in model.parameters()) and getattr(model, "hf_device_map", None) is None:
        raise ValueError(
            "S0Config: init_weights='prompt' runs a prompt through the model, but its weights are on the meta device. "
            "Load the model first."
        )
    prompt: Any = config.init_prompt
    _write(model, adapter_name, _states_of(model, _tokenizer(model, config), prompt, CHUNK))


def _tokenizer(model: nn.Module, config: S0Config) -> Any:
    from transformers import AutoTokenizer

    if not _has_text(config.init_prompt):
        return None
    name = config.tokenizer_name_or_path or getattr(model, "name_or_path", None) or config.base_model_name_or_path
    reason = "the model does not say where it comes from"
    if name:
        try:
            return AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError, KeyError) as error:
            reason = f"{name!r} gives none ({str(error).splitlines()[0]})"
    raise ValueError(
        f"S0Config: init_weights='prompt' needs a tokenizer, and {reason}. Set tokenizer_name_or_path, give "
        "init_prompt as token ids, or call peft_s0.state_from_prompt with a tokenizer."
    )


def _has_text(prompt: Any) -> bool:
    return any(map(_has_text, prompt)) if isinstance(prompt, list) else not isinstance(prompt, int)


def _states_of(model: nn.Module, tokenizer: Any, prompt: Any, chunk_size: int) -> dict[nn.Module, Tensor]:
    """The mean over prompts of the states in which they leave the base model, float32 [heads, ...] for each mixer."""
    rows = token_rows(model, tokenizer, prompt)
    with in_eval_mode(model), without_adapters(model):
        ends = [final_states(model, row, chunk_size) for row in rows]
    names = {module: name for name, module in model.named_modules()}
    means = {mixer: torch.stack([end[mixer] for end in ends]).mean(0) for mixer in ends[0]}
    for mixer, state in means.items():
        check_finite(f"{names[mixer]}, at the end of the prompt", state)
    return means


def _write(model: nn.Module, adapter_name: str, states: dict[nn.Module, Tensor]) -> None:
    """Let the sequences of an adapter start from these states."""
    for mixer, state in states.items():
        if has_layer(mixer) and adapter_name in layer_of(mixer).configs:
            layer = layer_of(mixer)
            layer.state(adapter_name).write(state / layer.alpha(adapter_name))
            # What is beside the state is where it begins, an adapter for inference included: nothing is loaded.
            for learnt in layer.learnt_tensors(adapter_name).values():
                learnt.awaited = False
