"""The hooks on a mixer: when a sequence starts, and what the mixer is called with then.

Every mixer asks its cache for the state to start from and hands it to whatever kernel is in use. So where a sequence
starts, the mixer is called with a small view in place of its cache, which answers with the learnt state. On a cache
that already holds a state of this layer the mixer is called untouched: decoding runs the base model's own code. Only
what is read from state offsets is added at every step (see `offset`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from . import kernels, padding, taps
from .layer import S0Layer
from .mixers import CACHE_ARGUMENTS, Call, Mixer, cache_of, find_mixer, parameter_names
from .mixers.views import JoinedRows, Stored, join_rows
from .offset import Reading
from .packing import PACKING_ARGUMENTS, Carried, Documents, find_boundaries, find_documents, refuse_boundaries
from .rows import Routing

CHILD = "s0"
# Marks on a model, its backbones, and the layers around its mixers.
_HANDLES, _SAYS, _HEARS = "s0_handles", "s0_says", "s0_hears"
_WATCHED, _COURIER = "s0_watched", "s0_courier"


@dataclass
class Announcement:
    """What a module says of its call to those inside it that the call's arguments do not reach, in each thread."""

    told: dict[int, dict[str, Any]] = field(default_factory=dict)

    def say(self, told: dict[str, Any]) -> None:
        """Say something in place of what was said before."""
        if told:
            self.told[taps.thread()] = told
        elif self.told:
            self.take()

    def hear(self) -> dict[str, Any]:
        """What was said."""
        # Asked at every token, so no call too many.
        return (taps.own(self.told) or {}) if self.told else {}

    def take(self) -> dict[str, Any]:
        """What was said, which no one hears again."""
        return (taps.take(self.told) or {}) if self.told else {}


@dataclass
class Watched:
    """The tuned mixers of a backbone, their tuner layers, and their declarations, each once."""

    mixers: list[nn.Module] = field(default_factory=list)
    layers: list[S0Layer] = field(default_factory=list)
    declarations: list[Mixer] = field(default_factory=list)

    def add(self, mixer: nn.Module) -> None:
        """Note a mixer."""
        layer = layer_of(mixer)
        self.mixers.append(mixer)
        self.layers.append(layer)
        if layer.declaration not in self.declarations:
            self.declarations.append(layer.declaration)

    @property
    def routing(self) -> Routing:
        """What the layers share."""
        return self.layers[0].routing

    def forget_idle(self) -> None:
        """End what `note_idle` has noted."""
        # A compiled model writes nothing that it need not.
        routing = self.routing
        if routing.idle_on is not None:
            routing.idle_on = None

    def note_idle(self, arguments: dict[str, Any]) -> None:
        """Note whether a call of a single token only goes on with sequences, so that no mixer has anything to do.

        To ask all of them here, one after the other, takes a fraction of the time that it takes in between their calls,
        when the processor has forgotten what it needs for that.

        Args:
            arguments: those of the backbone, by name.

        Raises:
            ValueError: if the `adapter_names` that were passed are not one for each row.
        """
        cache = cache_of(arguments)
        if cache is None or not all(declaration.steps_by_cache for declaration in self.declarations):
            return
        for mixer, layer in zip(self.mixers, self.layers, strict=True):
            if not layer.declaration.has_past(mixer, cache, {}) or layer.reads:
                return
        routing = self.routing
        if routing.rows is not None:
            tokens = arguments["input_ids"] if "input_ids" in arguments else arguments["inputs_embeds"]
            routing.rows.check(tokens.shape[0])
        routing.idle_on = cache


def layer_of(mixer: nn.Module) -> S0Layer:
    """The tuner layer of a mixer that has one."""
    # Asked at every token: not by attribute, which torch searches for.
    layer: Any = mixer._modules[CHILD]
    return layer


def has_layer(module: nn.Module) -> bool:
    """Whether a module is a mixer with a tuner layer."""
    return isinstance(getattr(module, CHILD, None), S0Layer)


def attach(mixer: nn.Module, layer: S0Layer) -> None:
    """Make a tuner layer the child of its mixer and hook the mixer."""
    mixer.add_module(CHILD, layer)
    layer.handles = [
        mixer.register_forward_pre_hook(_before_mixer, with_kwargs=True),
        # Always, so that a mixer that raises leaves nothing frozen behind.
        mixer.register_forward_hook(_after_mixer, always_call=True),
    ]


def detach(mixer: nn.Module) -> None:
    """Undo `attach`."""
    layer = layer_of(mixer)
    _clean(mixer, layer)
    for handle in layer.handles:
        handle.remove()
    delattr(mixer, CHILD)


def clean(model: nn.Module) -> None:
    """Undo what a call of a model has left in its mixers that was interrupted from the keyboard."""
    for module in model.modules():
        if has_layer(module):
            _clean(module, layer_of(module))


def watch(model: nn.Module) -> None:
    """Hook a model and the backbones above its tuned mixers, so that packed rows are seen wherever they are announced.

    Positions do not reach a mixer, and some models drop what they do not know on the way to their backbone. What is
    added to a backbone's arguments reaches every mixer, also when gradient checkpointing runs a layer again. Where it
    does not, the layer around the mixer is hooked as well, and an argument that it hands on carries it.
    """
    modules = dict(model.named_modules())
    for module in modules.values():
        if _WATCHED in vars(module):
            delattr(module, _WATCHED)
    for name, mixer in modules.items():
        if not has_layer(mixer):
            continue
        declaration, backbone = layer_of(mixer).declaration, _backbone(modules, name)
        if backbone is None:
            continue
        _hook(backbone, _before_backbone, _after_backbone)
        vars(backbone).setdefault(_WATCHED, Watched()).add(mixer)
        if backbone is not model:
            _hook(model, _before_model)
            setattr(backbone, _HEARS, getattr(model, _SAYS))
        if declaration.courier is not None:
            block = modules[name.rpartition(".")[0]]
            _hook(block, _before_block)
            setattr(block, _COURIER, declaration.courier)
            setattr(block, _HEARS, getattr(backbone, _SAYS))


def unwatch(model: nn.Module) -> None:
    """Undo `watch` if no tuned mixer is left, else forget those that are gone."""
    if any(has_layer(module) for module in model.modules()):
        watch(model)
    else:
        for module in model.modules():
            if _HANDLES in vars(module):
                for handle in vars(module).pop(_HANDLES):
                    handle.remove()
                for mark in (_SAYS, _HEARS, _WATCHED, _COURIER):
                    vars(module).pop(mark, None)


def _hook(module: nn.Module, before: Callable[..., Any], after: Callable[..., Any] | None = None) -> None:
    if _HANDLES not in vars(module):
        handles = [module.register_forward_pre_hook(before, with_kwargs=True)]
        if after is not None:
            handles.append(module.register_forward_hook(after, always_call=True))
        setattr(module, _HANDLES, handles)
        setattr(module, _SAYS, Announcement())


def _backbone(modules: dict[str, nn.Module], name: str) -> nn.Module | None:
    """The innermost model around a mixer, if any takes embeddings."""
    while name:
        name = name.rpartition(".")[0]
        if "inputs_embeds" in parameter_names(type(modules[name])):
            return modules[name]
    return None


def _before_model(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    names = ("position_ids", *PACKING_ARGUMENTS)
    getattr(model, _SAYS).say({name: kwargs[name] for name in names if kwargs.get(name) is not None})


def _before_backbone(backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    named = {**dict(zip(parameter_names(type(backbone)), args, strict=False)), **kwargs} if args else kwargs
    arguments = {name: value for name, value in named.items() if value is not None}
    heard, says = getattr(backbone, _HEARS, None), getattr(backbone, _SAYS)
    if heard is not None:
        # Once: the next call may come without the model around it.
        arguments = {**heard.take(), **arguments}
    says.take()
    tokens = next((arguments[name].shape[1] for name in ("input_ids", "inputs_embeds") if name in arguments), 0)
    packing = {name: arguments[name] for name in PACKING_ARGUMENTS if name in arguments}
    mask = arguments.get("attention_mask")
    watched: Watched = getattr(backbone, _WATCHED)
    # It is there still if the last step was interrupted from the keyboard.
    watched.forget_idle()
    positions = arguments.get("position_ids") if mask is None and not packing else None
    compiling = torch.compiler.is_compiling()
    if not compiling:
        packing = packing or find_boundaries(positions)
    couriers = [declaration.courier for declaration in watched.declarations if declaration.courier is not None]
    told = dict(packing) if couriers else {}
    if tokens > 1 and any(courier.mask for courier in couriers):
        # For a static cache, generate() has made a mask for each kind of layers.
        mask = mask.get("linear_attention") if isinstance(mask, dict) else mask
        if padding.pads_of(mask, tokens) is not None:
            told["attention_mask"] = mask
    checking = [declaration for declaration in watched.declarations if declaration.checks]
    if not packing and not told and not checking and (positions is None or not compiling):
        if tokens == 1 and not compiling:
            watched.note_idle(arguments)
        return None
    layers = [layer for layer in watched.layers if layer.participates]
    if not layers:
        return None
    for declaration in checking:
        declaration.check(backbone, {**arguments, **packing})
    if compiling:
        refuse_boundaries(positions)
    if told:
        _check_couriers(backbone, packing, told.get("attention_mask"), len(layers))
        says.say(told)
        return None
    return (args, {**kwargs, **packing}) if packing else None


def _after_backbone(backbone: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    watched: Watched = getattr(backbone, _WATCHED)
    watched.forget_idle()
    getattr(backbone, _SAYS).take()


def _check_couriers(backbone: nn.Module, packing: dict[str, Any], mask: Tensor | None, layers: int) -> None:
    """Refuse what some of the mixers would not be told.

    Raises:
        ValueError: where a document would run into the next, or pads into a row, without anybody noticing.
    """
    name, mixers = type(backbone).__name__, [m for m in backbone.modules() if find_mixer(type(m)) is not None]
    if packing and layers < len(mixers):
        raise ValueError(
            f"{name} does not tell its recurrent layers where the documents of packed rows begin. S0 tells those that "
            f"it tunes, here {layers} of {len(mixers)}; in the others the state would run from one document into the "
            "next, also without S0. Tune all of them, or pad the rows instead of packing them (in TRL: packing=False, "
            "padding_free=False)."
        )
    if mask is not None and layers < len(mixers) and bool(((mask[:, :-1] == 0) & (mask[:, 1:] != 0)).any()):
        raise ValueError(
            f"{name} does not show its recurrent layers the pads in front of a row. S0 shows them to those that it "
            f"tunes, here {layers} of {len(mixers)}; the others would take them for tokens, also without S0. Tune all "
            "of them, or pass rows of the same length."
        )


def _before_block(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    told = getattr(block, _HEARS).hear()
    if not told:
        return None
    name = getattr(block, _COURIER).argument
    place = parameter_names(type(block)).index(name)
    if place < len(args):
        return (*args[:place], Carried(args[place], told), *args[place + 1 :]), kwargs
    return args, {**kwargs, name: Carried(kwargs.get(name), told)}


def _before_mixer(mixer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    layer = layer_of(mixer)
    if layer.calls:
        _clean(mixer, layer)
    idle_on = layer.routing.idle_on
    if (
        idle_on is not None
        and kwargs.get(layer.cache_argument) is idle_on
        and kwargs.get("attention_mask") is None
        # Layers that are compiled one by one would be compiled for each cache again.
        and not torch.compiler.is_compiling()
    ):
        return None
    declaration, participates, unchanged = layer.declaration, layer.participates, None
    courier = declaration.courier
    if args and (participates or courier is not None or layer.routing.rows is not None):
        kwargs = {**dict(zip(parameter_names(type(mixer)), args, strict=False)), **kwargs}
    if kwargs.get(layer.cache_argument) is None and declaration.cache_argument is None and cache_of(kwargs) is not None:
        # transformers takes the names that a cache had earlier, too.
        named = {name: value for name, value in kwargs.items() if name not in CACHE_ARGUMENTS}
        kwargs = {**named, layer.cache_argument: cache_of(kwargs)}
        unchanged = (), kwargs
    if courier is not None and isinstance(kwargs.get(courier.argument), Carried):
        carried = cast(Carried, kwargs[courier.argument])
        unchanged = (), {**kwargs, courier.argument: carried.value}
        kwargs = {**kwargs, courier.argument: carried.value, **carried.told}
    if not participates:
        if layer.routing.rows is not None:
            layer.routing.rows.check(kwargs[declaration.input_argument].shape[0])
        return unchanged
    if declaration.has_past(mixer, kwargs.get(layer.cache_argument), kwargs):
        changed = _continue(mixer, layer, kwargs)
    else:
        kernels.check_device(declaration.kernels, kwargs[declaration.input_argument].device)
        kwargs = dict(kwargs)
        sequences = declaration.sequences(mixer, kwargs)
        changed = _start(mixer, layer, kwargs) if sequences is None else _start_as_is(mixer, layer, kwargs, sequences)
    return unchanged if changed is None else ((), changed)


def _continue(mixer: nn.Module, layer: S0Layer, kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """A call on a cache that holds a past: pads are frozen, and offsets are read.

    Returns:
        What the mixer is to be called with; None: what it is called with.
    """
    declaration = layer.declaration
    cache: Any = kwargs.get(layer.cache_argument)
    hidden_states, mask = kwargs[declaration.input_argument], kwargs.get("attention_mask")
    tokens = hidden_states.shape[1]
    # Asked at every token where the cache alone does not tell, so no call too many.
    pads = None if mask is None else padding.pads_of(mask, tokens)
    resumes = declaration.resumes(tokens, pads, cache) and layer.starts
    if not resumes and not layer.reads:
        return None
    batch = hidden_states.shape[0]
    call = Call(cache, None, None, offsets=layer.offsets(batch))
    if resumes:
        call.rows = layer.learnt(layer.start_states(batch, hidden_states.device))
        call.held = padding.held_positions(pads, call.rows, None)
        if mask is not None and pads is not None:
            # Some models pass the whole sequence's mask on.
            kwargs = {**kwargs, "attention_mask": mask[:, -tokens:]}
    past = cache.get_conv_state(mixer.layer_idx, state_idx=0) if call.offsets else None
    return declaration.given(call, {**kwargs, layer.cache_argument: _enter(mixer, layer, call, past)})


def _start_as_is(mixer: nn.Module, layer: S0Layer, kwargs: dict[str, Any], sequences: int) -> dict[str, Any]:
    """A call that starts sequences in a mixer that takes packed rows apart itself, and single tokens as they are."""
    declaration = layer.declaration
    hidden_states = kwargs[declaration.input_argument]
    batch, tokens = hidden_states.shape[:2]
    pads = padding.pads_of(kwargs.get("attention_mask"), tokens)
    packed = None if sequences == batch else [0] * sequences
    states = layer.start_states(batch, hidden_states.device, packed)
    held = None if pads is None else padding.held_positions(pads, layer.learnt(states), None)
    call = Call(kwargs.get(layer.cache_argument), states, held, arguments=kwargs, starts=True)
    kwargs[layer.cache_argument] = _enter(mixer, layer, call)
    return kwargs


def _start(mixer: nn.Module, layer: S0Layer, kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """A call that starts sequences: padded rows, packed ones, or a single token.

    Returns:
        What the mixer is to be called with; None: what it is called with.
    """
    declaration = layer.declaration
    hidden_states, mask = kwargs[declaration.input_argument], kwargs.get("attention_mask")
    batch, tokens = hidden_states.shape[:2]
    pads = padding.pads_of(mask, tokens)
    # In one row, documents of several adapters' offsets would not be told apart.
    apart = pads is not None or (layer.reads and layer.routing.rows is not None)
    documents = find_documents(kwargs, hidden_states, None if apart else declaration.gap(mixer))
    source = None if documents is None else documents.source
    states = layer.start_states(batch, hidden_states.device, source) if layer.starts else None
    learnt = None
    if states is not None and (pads is not None or tokens == 1 or declaration.reads_rows):
        learnt = layer.learnt(states)
    call = Call(kwargs.get(layer.cache_argument), states, None, learnt, arguments=kwargs, starts=True)
    call.offsets = layer.offsets(batch, source)
    if documents is not None:
        _take_apart(call, kwargs, documents, declaration.input_argument)
    elif tokens == 1 and not declaration.starts_with_one and not _some(states, learnt):
        if not call.offsets:
            return None
        call.states = None
        call.starts = call.cache is None
    elif tokens == 1 and not declaration.starts_with_one:
        assert learnt is not None
        _append_pad(mixer, layer, call, kwargs, learnt)
    else:
        call.held = padding.held_positions(None if states is None else pads, learnt, None)
        # With a cache, the base model's own code; without one, some mixers take fused paths that call no parts.
        call.starts = states is not None or call.cache is None
    kwargs[layer.cache_argument] = _enter(mixer, layer, call)
    return declaration.given(call, kwargs)


def _take_apart(call: Call, kwargs: dict[str, Any], documents: Documents, input_argument: str) -> None:
    """Give each document of packed rows a place where it starts from its own state."""
    hidden_states, mask = kwargs[input_argument], kwargs.get("attention_mask")
    batch, tokens = hidden_states.shape[:2]
    pads = None if call.states is None else padding.pads_of(mask, tokens)
    pads = None if pads is None else documents.unpack(pads)
    kwargs[input_argument] = documents.unpack(hidden_states)
    kwargs["attention_mask"] = None if mask is None or mask.ndim != 2 else documents.unpack(mask[:, -tokens:])
    for name in PACKING_ARGUMENTS:
        kwargs.pop(name, None)
    if documents.boundaries is not None:
        kwargs["cu_seq_lens_q"] = documents.boundaries
    call.held = padding.held_positions(pads, call.rows, documents.pads())
    call.restore = partial(documents.pack, batch=batch)
    # The packed row ends where its last document ends.
    call.kept, call.tokens = slice(-1, None), None if call.cache is None else documents.end()


def _append_pad(mixer: nn.Module, layer: S0Layer, call: Call, kwargs: dict[str, Any], learnt: Tensor) -> None:
    """Run a single first token as two, the second being a pad.

    Single steps are made for decoding: some kernels have no backward pass, some write to the state they are given, some
    ignore the mask.
    """
    argument = layer.declaration.input_argument
    hidden_states, mask = kwargs[argument], kwargs.get("attention_mask")
    pads = padding.pads_of(mask, 1)
    if not _all(layer, learnt):
        call.cache = None if call.cache is None else Stored(call.cache)
        call.join = partial(_run_base_rows, mixer, dict(kwargs), learnt, call.cache, call.offsets)
    kwargs[argument] = pad(hidden_states, (0, 0, 0, 1))
    kwargs["attention_mask"] = None if mask is None or mask.ndim != 2 else pad(mask[:, -1:], (0, 1))
    added = torch.tensor([[False, True]], device=hidden_states.device)
    call.held = padding.held_positions(None if pads is None else pad(pads, (0, 1)), learnt, added)
    call.restore = _first_token
    call.kept, call.tokens = slice(None), slice(0, 1)


def _enter(mixer: nn.Module, layer: S0Layer, call: Call, past: Tensor | None = None) -> Any:
    layer.calls[taps.thread()] = call
    entered = layer.declaration.enter(mixer, call)
    _read_offsets(mixer, layer, call.offsets, past)
    return entered


def _read_offsets(
    mixer: nn.Module, layer: S0Layer, offsets: Sequence[tuple[str, list[int] | None]], past: Tensor | None = None
) -> None:
    """Let the mixer's next call read offsets, until its taps are cleared."""
    readout = layer.declaration.readout
    if offsets and readout is not None:
        Reading(mixer, readout, past, partial(layer.read_offsets, offsets)).engage()


def _after_mixer(mixer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    layer = layer_of(mixer)
    # Asked at every token, so no call too many.
    call = taps.take(layer.calls) if layer.calls else None
    if call is None:
        return None
    layer.declaration.leave(mixer, call)
    if output is None:
        return None
    output = layer.declaration.returned(call, output)
    return output if call.join is None else call.join(output)


def _clean(mixer: nn.Module, layer: S0Layer) -> None:
    """Undo what a call has left that was interrupted from the keyboard: no hook runs after it."""
    call = layer.calls.pop(taps.thread(), None)
    if call is not None:
        layer.declaration.leave(mixer, call)


def _run_base_rows(
    mixer: nn.Module,
    kwargs: dict[str, Any],
    learnt: Tensor,
    stored: Stored | None,
    offsets: Sequence[tuple[str, list[int] | None]],
    output: Any,
) -> Any:
    """Give the rows without a learnt state what the base model makes of a single first token, to the last bit.

    The others were run as two tokens, which rounds otherwise: the products of matrices have another shape. So the mixer
    runs once more, as the base model runs it.

    Args:
        mixer: the mixer.
        kwargs: what it was called with.
        learnt: bool [rows], the rows to leave as they are.
        stored: what these rows leave in the cache; None without a cache.
        offsets: what is read at this token, too, also in rows without a learnt state.
        output: their output.
    """
    layer = layer_of(mixer)
    argument = layer.cache_argument
    if stored is not None:
        kwargs = {**kwargs, argument: JoinedRows(kwargs[argument], stored, learnt)}
    _read_offsets(mixer, layer, offsets)
    try:
        # Not as a module: hooks of others see one call.
        base = mixer.forward(**kwargs)
    finally:
        taps.clear(mixer)
    if isinstance(output, tuple):
        return (join_rows(learnt, output[0], base[0]), *output[1:])
    return join_rows(learnt, output, base)


def _some(states: Tensor | None, learnt: Tensor | None) -> bool:
    """Whether any row starts from a learnt state. If none does, a single first token runs the base model's own code."""
    if states is None or learnt is None:
        return False
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and states.requires_grad):
        return True
    return bool(learnt.any())


def _all(layer: S0Layer, learnt: Tensor) -> bool:
    """Whether every row does."""
    rows = layer.routing.rows
    if rows is None and layer.row_slots is None:
        return True
    if torch.compiler.is_compiling():
        return layer.row_slots is None and rows is not None and all(name in layer.s0_state for name in rows.different)
    return bool(learnt.all())


def _first_token(output: Tensor) -> Tensor:
    return output[:, :1]
