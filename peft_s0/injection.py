"""The hooks on a mixer: when a sequence starts, and what the mixer is called with then.

Every mixer asks its cache for the state to start from and hands it to whatever kernel is in use. So where a sequence
starts, the mixer is called with a small view in place of its cache, which answers with the learnt state. On a cache
that already holds a state of this layer the mixer is called untouched: decoding runs the base model's own code.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from . import kernels, padding, taps
from .layer import S0Layer
from .mixers import Call, parameter_names
from .mixers.views import JoinedRows, Stored, join_rows
from .packing import PACKING_ARGUMENTS, find_boundaries, find_documents, refuse_boundaries

CHILD = "s0"
_WATCH, _ANNOUNCED = "s0_watch", "s0_announced"


def layer_of(mixer: nn.Module) -> S0Layer:
    """The tuner layer of a mixer that has one."""
    return cast(S0Layer, mixer.s0)


def has_layer(module: nn.Module) -> bool:
    """Whether a module is a mixer with a tuner layer."""
    return isinstance(getattr(module, CHILD, None), S0Layer)


def attach(mixer: nn.Module, layer: S0Layer) -> None:
    """Make a tuner layer the child of its mixer and hook the mixer."""
    mixer.add_module(CHILD, layer)
    layer.handles = [
        mixer.register_forward_pre_hook(_before_mixer, with_kwargs=True),
        # Always, so that a mixer that raises leaves nothing frozen behind.
        mixer.register_forward_hook(_after_mixer, with_kwargs=True, always_call=True),
        *taps.install(mixer, layer.declaration.parts),
    ]


def detach(mixer: nn.Module) -> None:
    """Undo `attach`."""
    layer = layer_of(mixer)
    for handle in layer.handles:
        handle.remove()
    taps.uninstall(mixer, layer.declaration.parts)
    delattr(mixer, CHILD)


def watch_packing(model: nn.Module) -> None:
    """Hook a model and the backbones above its tuned mixers, so that packed rows are seen wherever they are announced.

    Positions do not reach a mixer, and some models drop what they do not know on the way to their backbone. What is
    added to a backbone's arguments reaches every mixer, also when gradient checkpointing runs a layer again.
    """
    for module, hook in [(model, _before_model), *((backbone, _before_backbone) for backbone in _backbones(model))]:
        if _WATCH not in vars(module):
            setattr(module, _WATCH, module.register_forward_pre_hook(hook, with_kwargs=True))
            if module is not model:
                setattr(module, _ANNOUNCED, None)


def unwatch_packing(model: nn.Module) -> None:
    """Undo `watch_packing` if no tuned mixer is left."""
    if not any(has_layer(module) for module in model.modules()):
        for module in model.modules():
            if _WATCH in vars(module):
                vars(module).pop(_WATCH).remove()
                vars(module).pop(_ANNOUNCED, None)


def _backbones(model: nn.Module) -> list[nn.Module]:
    modules, found = dict(model.named_modules()), []
    for name, module in modules.items():
        while has_layer(module) and name:
            name = name.rpartition(".")[0]
            if name and "inputs_embeds" in parameter_names(type(modules[name])):
                found.append(modules[name])
                break
    return found


def _before_model(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    announced = {name: kwargs[name] for name in ("position_ids", *PACKING_ARGUMENTS) if kwargs.get(name) is not None}
    if all(name == "position_ids" and positions.shape[-1] == 1 for name, positions in announced.items()):
        # Decoding: nothing is packed, and nothing may be looked for in each step.
        return
    for module in model.modules():
        if hasattr(module, _ANNOUNCED):
            setattr(module, _ANNOUNCED, announced)


def _before_backbone(backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    announced = getattr(backbone, _ANNOUNCED, None)
    if announced is not None:
        setattr(backbone, _ANNOUNCED, None)
    arguments = {
        **(announced or {}),
        **dict(zip(parameter_names(type(backbone)), args, strict=False)),
        **{name: value for name, value in kwargs.items() if value is not None},
    }
    packing = {name: arguments[name] for name in PACKING_ARGUMENTS if name in arguments}
    positions = arguments.get("position_ids") if arguments.get("attention_mask") is None else None
    compiling = torch.compiler.is_compiling()
    if not packing and not compiling:
        packing = find_boundaries(positions)
    if not packing and (positions is None or not compiling):
        return None
    layers = [layer for layer in backbone.modules() if isinstance(layer, S0Layer) and layer.participates]
    if not layers:
        return None
    if not packing:
        refuse_boundaries(positions)
        return None
    if not all(layer.declaration.hears_packing for layer in layers):
        raise ValueError(
            f"{type(backbone).__name__} does not tell its recurrent layers where the documents of packed rows begin, "
            "so the state would run from one document into the next, also without S0. Pad the rows instead of packing "
            "them (in TRL: packing=False, padding_free=False)."
        )
    return args, {**kwargs, **packing}


def _before_mixer(mixer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    layer = layer_of(mixer)
    declaration = layer.declaration
    if not layer.participates:
        if layer.routing.rows is not None:
            layer.routing.rows.check((args[0] if args else kwargs[declaration.input_argument]).shape[0])
        return None
    if args:
        kwargs = {**dict(zip(parameter_names(type(mixer)), args, strict=False)), **kwargs}
    cache = kwargs.get(declaration.cache_argument)
    hidden_states, mask = kwargs[declaration.input_argument], kwargs.get("attention_mask")
    batch, tokens = hidden_states.shape[:2]
    pads = padding.pads_of(mask, tokens)
    if declaration.has_past(mixer, cache):
        if not declaration.resumes(tokens, pads, cache):
            return None
        rows = layer.learnt(layer.start_states(batch, hidden_states.device))
        call = Call(cache, None, padding.held_positions(pads, rows, None), rows)
        if mask is not None and pads is not None:
            # Some models pass the whole sequence's mask on.
            kwargs = {**kwargs, "attention_mask": mask[:, -tokens:]}
        return (), {**kwargs, declaration.cache_argument: _enter(mixer, layer, call)}

    kernels.check_device(declaration.kernels, hidden_states.device)
    kwargs = dict(kwargs)
    sequences = declaration.sequences(mixer, kwargs)
    if sequences is not None:
        packed = None if sequences == batch else [0] * sequences
        states = layer.start_states(batch, hidden_states.device, packed)
        held = None if pads is None else padding.held_positions(pads, layer.learnt(states), None)
        call = Call(cache, states, held, arguments=kwargs)
        kwargs[declaration.cache_argument] = _enter(mixer, layer, call)
        return (), kwargs

    documents = find_documents(kwargs, hidden_states, declaration.gap(mixer) if pads is None else None)
    states = layer.start_states(batch, hidden_states.device, None if documents is None else documents.source)
    learnt = layer.learnt(states) if pads is not None or tokens == 1 else None
    call, added = Call(cache, states, None, learnt), None
    if documents is not None:
        hidden_states = documents.unpack(hidden_states)
        added = documents.pads()
        pads = None if pads is None else documents.unpack(pads)
        mask = None if mask is None or mask.ndim != 2 else documents.unpack(mask[:, -tokens:])
        for name in PACKING_ARGUMENTS:
            kwargs.pop(name, None)
        if documents.boundaries is not None:
            kwargs["cu_seq_lens_q"] = documents.boundaries
        call.restore = partial(documents.pack, batch=batch)
        # The packed row ends where its last document ends.
        call.kept, call.tokens = slice(-1, None), None if cache is None else documents.end()
    elif tokens == 1:
        assert learnt is not None
        if not _some(states, learnt):
            return None
        # Single steps are made for decoding: some kernels have no backward pass, some write to the state they are
        # given, some ignore the mask. A single first token is therefore run as two tokens, the second being a pad.
        hidden_states = pad(hidden_states, (0, 0, 0, 1))
        added = torch.tensor([[False, True]], device=hidden_states.device)
        pads = None if pads is None else pad(pads, (0, 1))
        mask = None if mask is None or mask.ndim != 2 else pad(mask[:, -1:], (0, 1))
        call.restore = _first_token
        call.kept, call.tokens = slice(None), slice(0, 1)
        if not _all(layer, learnt):
            call.cache = None if cache is None else Stored(cache)
            call.join = partial(_run_base_rows, mixer, dict(kwargs), learnt, call.cache)
    call.held = padding.held_positions(pads, learnt, added)
    kwargs.update({declaration.input_argument: hidden_states, "attention_mask": mask})
    kwargs[declaration.cache_argument] = _enter(mixer, layer, call)
    return (), kwargs


def _enter(mixer: nn.Module, layer: S0Layer, call: Call) -> Any:
    layer.handles.extend(taps.install(mixer, layer.declaration.parts))
    layer.call = call
    return layer.declaration.enter(mixer, call)


def _after_mixer(mixer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    layer = layer_of(mixer)
    call = layer.call
    if call is None:
        return None
    layer.call = None
    layer.declaration.leave(mixer, call)
    if output is None:
        return None
    output = layer.declaration.returned(call, output)
    return output if call.join is None else call.join(output)


def _run_base_rows(mixer: nn.Module, kwargs: dict[str, Any], learnt: Tensor, stored: Stored | None, output: Any) -> Any:
    """Give the rows without a learnt state what the base model makes of a single first token, to the last bit.

    The others were run as two tokens, which rounds otherwise: the products of matrices have another shape. So the mixer
    runs once more, as the base model runs it.

    Args:
        mixer: the mixer.
        kwargs: what it was called with.
        learnt: bool [rows], the rows to leave as they are.
        stored: what these rows leave in the cache; None without a cache.
        output: their output.
    """
    argument = layer_of(mixer).declaration.cache_argument
    if stored is not None:
        kwargs = {**kwargs, argument: JoinedRows(kwargs[argument], stored, learnt)}
    # Not as a module: hooks of others see one call.
    base = mixer.forward(**kwargs)
    if isinstance(output, tuple):
        return (join_rows(learnt, output[0], base[0]), *output[1:])
    return join_rows(learnt, output, base)


def _some(states: Tensor, learnt: Tensor) -> bool:
    """Whether any row starts from a learnt state. If none does, a single first token runs the base model's own code."""
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and states.requires_grad):
        return True
    return bool(learnt.any())


def _all(layer: S0Layer, learnt: Tensor) -> bool:
    """Whether every row does."""
    rows = layer.routing.rows
    if rows is None:
        return True
    if torch.compiler.is_compiling():
        return all(name in layer.configs for name in rows.different)
    return bool(learnt.all())


def _first_token(output: Tensor) -> Tensor:
    return output[:, :1]
