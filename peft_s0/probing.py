"""Running a model to look into it: token rows, the base model alone, the states that a row ends in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import ProcessorMixin

from .config import listed
from .mixers import cache_argument, cache_of, find_mixer, parameter_names


def token_rows(model: nn.Module, tokenizer: Any, prompts: Any, opens_answer: bool = False) -> list[Tensor]:
    """Token ids of prompts.

    Args:
        model: the model that is to run them.
        tokenizer: its tokenizer, or a processor that has it; None if the prompts are token ids.
        prompts: a text, chat messages (a list of dicts, put into the tokenizer's chat template) or token ids (ints),
            or a list of such. A text gets the special tokens that the tokenizer adds by itself.
        opens_answer: whether the chat template opens an answer behind the messages.

    Returns:
        Int64 [tokens] on the model's device, for each prompt.

    Raises:
        ValueError: for no prompts, a prompt without tokens, ids that the model does not have, texts without a
            tokenizer, and messages with more than text, such as pictures.
        TypeError: for prompts of another kind.
    """
    prompts = listed(prompts)
    if isinstance(tokenizer, ProcessorMixin):
        # Its own calls take images, and give lists of rows.
        tokenizer = cast(Any, tokenizer).tokenizer
    alone = isinstance(prompts, str) or _is_list_of(prompts, Mapping) or _is_list_of(prompts, int)
    rows = [prompts] if alone else prompts
    if not isinstance(rows, Sequence) or not rows:
        raise ValueError(f"There is no prompt in {prompts!r}; pass a text, messages, token ids, or a list of such.")
    find_embeddings: Any = getattr(model, "get_input_embeddings", lambda: None)
    embeddings = find_embeddings()
    vocabulary = None if embeddings is None else int(embeddings.weight.shape[0])
    device = next((weight.device for weight in model.parameters() if not weight.is_meta), torch.device("cpu"))
    return [
        torch.tensor(_ids(tokenizer, row, vocabulary, opens_answer), dtype=torch.long, device=device) for row in rows
    ]


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, Sequence) and bool(value) and all(isinstance(part, kind) for part in value)


def _ids(tokenizer: Any, prompt: Any, vocabulary: int | None, opens_answer: bool) -> list[int]:
    messages = _is_list_of(prompt, Mapping)
    if messages or isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError(f"The prompt {prompt!r} is text: pass the model's tokenizer, or token ids.")
        if messages:
            _check_parts(prompt)
            chat = tokenizer.apply_chat_template(list(prompt), add_generation_prompt=opens_answer, return_dict=True)
            ids = list(chat["input_ids"])
        else:
            ids = list(tokenizer(prompt)["input_ids"])
    elif isinstance(prompt, Sequence) and all(isinstance(part, int) for part in prompt):
        ids = list(prompt)
    else:
        raise TypeError(
            f"A prompt must be a text, a list of chat messages or a list of token ids, got {type(prompt).__name__}: "
            f"{prompt!r}."
        )
    if not ids:
        raise ValueError(f"The prompt {prompt!r} has no tokens.")
    if vocabulary is not None and not 0 <= min(ids) <= max(ids) < vocabulary:
        raise ValueError(
            f"The prompt {prompt!r} has token ids from {min(ids)} to {max(ids)}, but the model knows {vocabulary}. "
            "Use the model's own tokenizer."
        )
    return ids


def _check_parts(messages: Sequence[Mapping[str, Any]]) -> None:
    """Refuse pictures and the like, of which a chat template leaves no more than a mark."""
    for message in messages:
        content = message.get("content")
        for part in content if isinstance(content, Sequence) else ():
            kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
            if kind != "text":
                raise ValueError(
                    f"A message of a prompt has a part of the type {kind!r}, and only text is run. Leave it out."
                )


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients; every module then gets its mode back."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in training.items():
            module.training = mode


@contextmanager
def without_adapters(model: nn.Module, kept: Sequence[nn.Module] = ()) -> Iterator[None]:
    """The base model, with no adapter of any method but for those of the tuner layers `kept`.

    PEFT's `disable_adapter` would leave adapters that were frozen to be trained.
    """
    layers = [module for module in model.modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    disabled = [layer for layer in layers if not layer.disable_adapters and layer not in kept]
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    for layer in disabled:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in disabled:
            layer.enable_adapters(True)
        for parameter, requires_grad in trained.items():
            parameter.requires_grad_(requires_grad)


def final_states(model: nn.Module, row: Tensor, chunk_size: int | None = None) -> dict[nn.Module, Tensor]:
    """The states that a model's recurrent layers end a row in.

    Args:
        model: the model, without PEFT's around it.
        row: int64 [tokens].
        chunk_size: the most tokens that are run in one call, where the base model can go on with a sequence by several.

    Returns:
        Float32 [heads, ...] for each mixer, in the order of the model.

    Raises:
        ValueError: see `Mixer.final_state`.
    """
    declared = {module: find_mixer(type(module)) for module in model.modules()}
    mixers = {module: declaration for module, declaration in declared.items() if declaration is not None}
    # Without the head, whose logits nobody reads.
    backbone: Any = getattr(model, "base_model", model)
    chunk_size = len(row) if chunk_size is None else chunk_size
    if not all(declaration.takes_chunks for declaration in mixers.values()):
        chunk_size = len(row)
    takes_positions = "position_ids" in parameter_names(type(backbone))
    takes_cache = cache_argument(type(backbone))
    cache, start = None, 0
    for ids in row.unsqueeze(0).split(chunk_size, dim=1):
        # Told, because some models count them wrongly in a call that continues a sequence.
        positions = torch.arange(start, start + ids.shape[1], device=ids.device).unsqueeze(0)
        call: dict[str, Any] = {"position_ids": positions} if takes_positions else {}
        if takes_cache is not None and cache is not None:
            call[takes_cache] = cache
        output = backbone(input_ids=ids, use_cache=True, **call)
        cache = cache_of(output) if isinstance(output, Mapping) else None
        start += ids.shape[1]
    # Copies, for the cache may be written to.
    return {
        mixer: declaration.final_state(mixer, cache)[0].to(torch.float32, copy=True)
        for mixer, declaration in mixers.items()
    }


def base_of(model: nn.Module) -> nn.Module:
    """The model without PEFT's around it."""
    return model.get_base_model() if isinstance(model, PeftModel) else model
