"""What must be known of a recurrent mixer, and the register of all that is known."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from ..kernels import in_use
from ..taps import clear, on_output
from .views import SequenceStart

# Attributes of a mixer are read by name, and differ from class to class.
MixerModule = Any
# What transformers calls the argument, and the part of an output, that carries a cache: in 5.24 and later the first.
CACHE_ARGUMENTS = ("cache", "cache_params", "past_key_values")
Columns = Callable[[MixerModule], "Tensor | slice"]


@dataclass(frozen=True)
class Gate:
    """A projection inside a mixer whose output decides what a position does to the state.

    At a pad, its output is set to a value at which the state neither decays nor is written to.

    Args:
        projection: attribute of the mixer that holds the projection.
        frozen: the value that freezes the state, in the projection's own output space.
        columns: from the mixer to the columns of the projection's last dimension that are this gate, as a slice or as
            a bool tensor [features]; None: all of them.
    """

    projection: str
    frozen: float = -1e4
    columns: Columns | None = None

    def freeze(self, mixer: MixerModule, pads: Tensor, output: Tensor) -> Tensor:
        """Freeze the state at pads.

        Args:
            mixer: the mixer that holds the projection.
            pads: bool [batch, tokens], True where the state must stay as it is.
            output: the projection's output [batch, tokens, ...].

        Returns:
            The output with this gate's columns replaced at pads.
        """
        where = pads.reshape(*pads.shape, *[1] * (output.ndim - 2))
        if self.columns is not None:
            chosen = torch.zeros(output.shape[-1], dtype=torch.bool, device=output.device)
            chosen[self.columns(mixer)] = True
            where = where & chosen
        return output.masked_fill(where, self.frozen)

    def engage(self, mixer: MixerModule) -> None:
        """Called before a mixer call in which this gate freezes pads."""

    def release(self, mixer: MixerModule) -> None:
        """Called after it, also if it raised."""


@dataclass(frozen=True)
class Readout:
    """How a mixer reads its state: o_t = S_t q_t. Where q_t comes from, and where the reading goes.

    The q of all tokens are a share of a projection's output, sent through the mixer's short convolution `conv1d`. What
    is read is the first input of a later part, as a rule the gated norm.

    Args:
        projection: attribute of the mixer that holds the projection.
        queries: from the mixer and the projection's output [rows, tokens, features] to that share, [rows, tokens,
            channels], as the convolution sees it.
        channels: from the mixer to the channels of the convolution that are these.
        groups: from the mixer to how many different q a token has; each is shared by as many heads that follow one
            another.
        key_first: whether the state is kept as [heads, key, value], not as [heads, value, key].
        normalize: whether q is divided by its length and by the square root of its size.
        output: attribute that holds the part which takes what is read.
    """

    projection: str
    queries: Callable[[MixerModule, Tensor], Tensor]
    channels: Callable[[MixerModule], slice]
    groups: Callable[[MixerModule], int]
    key_first: bool
    normalize: bool
    output: str

    def output_of(self, mixer: MixerModule) -> str:
        """The attribute that holds the part which takes what is read, as this mixer is configured."""
        return self.output

    def gate(self, mixer: MixerModule, projected: Tensor) -> Tensor | None:
        """What is multiplied to the reading in front of that part.

        Args:
            mixer: the mixer.
            projected: the projection's output [rows, tokens, features].

        Returns:
            [rows, tokens, heads * value size]; None for nothing.
        """
        return None


@dataclass(frozen=True)
class Family:
    """A recurrence: what all mixers share that compute it.

    Args:
        name: the field's name of the recurrence.
        alpha: default scale of an S0 state.
    """

    name: str
    alpha: float


@dataclass(frozen=True)
class Courier:
    """How a mixer learns what its model does not tell it.

    Args:
        argument: an argument that the layer around the mixer hands on to it unseen, and that can carry more.
        mask: whether the model drops the attention mask, too, and not only what describes packed rows.
    """

    argument: str
    mask: bool = False


@dataclass
class Call:
    """One call of a mixer in which S0 has something to do.

    Args:
        cache: the real cache, or None.
        states: float32 [rows, heads, ...], what each row starts from; None when the call continues a sequence.
        held: bool [rows or 1, tokens], positions at which the state must stay as it is; None: nowhere.
        rows: bool [rows] or [1]: rows whose state is not the base model's zero; None: all.
        kept: the rows whose end the cache keeps; None: the call's own rows, whole.
        tokens: the tokens of the kept rows that are real; None: all.
        restore: brings the mixer's output back to the rows and tokens that it was called with; None: they are the same.
        arguments: what the mixer is called with at the start of a sequence.
        join: puts the rows without a learnt state into the output; None: they are right.
        starts: whether the mixer is to be given a view of the cache, as at the start of a sequence.
        offsets: the adapters whose offsets are read, each with the rows that read it; None: all rows.
    """

    cache: Any
    states: Tensor | None
    held: Tensor | None
    rows: Tensor | None = None
    kept: slice | None = None
    tokens: slice | None = None
    restore: Callable[[Tensor], Tensor] | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    join: Callable[[Any], Any] | None = None
    starts: bool = False
    offsets: Sequence[tuple[str, list[int] | None]] = ()


@dataclass(frozen=True)
class Mixer:
    """Declaration of a recurrent mixer that takes its initial state from its cache.

    The class must ask its cache for `get_conv_state(layer_idx, state_idx=0)` and `get_recurrent_state(layer_idx)` and
    hand the latter to its recurrence, and must have an attribute `layer_idx`. Mixers of another kind have a subclass.

    Args:
        path: module and name of the class, as in "transformers.models.mamba2.modeling_mamba2.Mamba2Mixer".
        family: the recurrence.
        state_shape: from a mixer to the shape of one sequence's state, [heads, ...], as the kernel takes it.
        gates: the projections to freeze at pads.
        cache_argument: name of the forward argument that carries the cache; None: that of `CACHE_ARGUMENTS` which
            forward has.
        courier: what tells the mixer of packed rows where its model drops that on the way; None: the model tells it.
        kernels: the module of the Triton kernels that the mixer runs on where it can be imported; None: there are none.
        reach: from a mixer to how many tokens its convolution looks back; only if `kernels` take `cu_seq_lens_q` and a
            state for each of the documents.
        input_argument: name of the forward argument that carries the hidden states [batch, tokens, features].
        starts_with_one: whether a call of a single token may start from a state as it is. Most single steps may not:
            they have no backward pass, or write to the state they are given.
        reads_rows: whether `Call.rows` is to be known in every call, not only where it has pads or a single token.
        checks: whether `check` is to be asked before each call of the model.
        readout: how the mixer reads its state; None: it takes no state offset.
        takes_chunks: whether the base model goes on with a sequence by several tokens in one call.
    """

    path: str
    family: Family
    state_shape: Callable[[MixerModule], tuple[int, ...]]
    gates: tuple[Gate, ...] = ()
    cache_argument: str | None = None
    courier: Courier | None = None
    kernels: str | None = None
    reach: Callable[[MixerModule], int] | None = None
    input_argument: str = "hidden_states"
    starts_with_one: bool = False
    reads_rows: bool = False
    checks: bool = False
    readout: Readout | None = None
    takes_chunks: bool = True

    def cache_argument_of(self, mixer: MixerModule) -> str:
        """The forward argument of a mixer that carries its cache.

        Raises:
            TypeError: if forward has none that is known, so that a sequence that goes on would look like a new one; or
                not the one that was declared.
        """
        name = self.cache_argument or cache_argument(type(mixer))
        if name not in parameter_names(type(mixer)):
            raise TypeError(
                f"S0 does not know how {type(mixer).__name__} takes its cache: expected "
                f"{name or ' or '.join(CACHE_ARGUMENTS)} among the arguments of its forward, found "
                f"{', '.join(parameter_names(type(mixer)))}. Install a version of peft_s0 that knows this version of "
                "the class, or register it with its cache_argument (peft_s0.register_mixer)."
            )
        return name

    def has_past(self, mixer: MixerModule, cache: Any, arguments: dict[str, Any]) -> bool:
        """Whether a call continues a sequence, since its cache already holds a state of this mixer.

        Args:
            mixer: the mixer.
            cache: what it is called with as its cache.
            arguments: the call's arguments by name.
        """
        # Not has_previous_state, which never becomes true of layers that keep several states.
        return cache is not None and cache.get_conv_state(mixer.layer_idx, state_idx=0) is not None

    @property
    def steps_by_cache(self) -> bool:
        """Whether the cache alone tells a call of a single token that goes on, in which only offsets are read."""
        return type(self).has_past is Mixer.has_past and not self.resumes(1, None, None)

    def refusal(self, mixer: MixerModule) -> str | None:
        """Why a mixer of this class cannot start from a state after all, as it is configured; None if it can."""
        return None

    def check(self, backbone: Any, arguments: dict[str, Any]) -> None:
        """Refuse a call of the model that it would answer wrongly, and that the mixer could not tell from others.

        Args:
            backbone: the model that the mixer is part of.
            arguments: what it is called with, by name.

        Raises:
            ValueError: saying how to call it instead.
        """

    def given(self, call: Call, arguments: dict[str, Any]) -> dict[str, Any]:
        """What the mixer is called with: the arguments of a call, where need be others in their place."""
        return arguments

    def resumes(self, tokens: int, pads: Tensor | None, cache: Any) -> bool:
        """Whether there is something to do in a call that continues a sequence.

        Args:
            tokens: how many tokens the call has.
            pads: bool [batch, tokens], its pads; None if there are none.
            cache: the cache that holds the past.
        """
        return pads is not None

    def gap(self, mixer: MixerModule) -> int | None:
        """How many zeros keep documents apart that are run in one row; None: each needs a row of its own."""
        if self.reach is None or not in_use(self.kernels):
            return None
        # One at least, so that a row of one token does not take the path of single steps.
        return max(self.reach(mixer), 1)

    def sequences(self, mixer: MixerModule, kwargs: dict[str, Any]) -> int | None:
        """How many sequences a call starts, if the mixer itself takes packed rows apart and single first tokens.

        Args:
            mixer: the mixer.
            kwargs: the call's arguments.

        Returns:
            The number; None for a mixer whose packed rows and single tokens must be turned into padded rows first.
        """
        return None

    def enter(self, mixer: MixerModule, call: Call) -> Any:
        """Prepare a mixer for a call.

        Returns:
            What the mixer is to be called with in place of its cache.
        """
        if call.held is not None:
            for gate in self.gates:
                gate.engage(mixer)
                on_output(mixer, gate.projection, partial(gate.freeze, mixer, call.held))
        return self.start(call) if call.starts else call.cache

    def start(self, call: Call) -> SequenceStart:
        """The view of the cache at the start of a sequence."""
        return SequenceStart(call.cache, call.states, call.kept, call.tokens)

    def returned(self, call: Call, output: Any) -> Any:
        """What the mixer's caller gets: the output, brought back to the rows and tokens of the call."""
        if call.restore is None:
            return output
        return (call.restore(output[0]), *output[1:]) if isinstance(output, tuple) else call.restore(output)

    def final_state(self, mixer: MixerModule, cache: Any) -> Tensor:
        """The state that calls on a cache have left the mixer's sequences in, [rows, *state shape].

        Args:
            mixer: the mixer.
            cache: the model's cache; None if the model gave none back.

        Raises:
            ValueError: if the state is not there, or no initial state could stand for it.
        """
        if cache is None:
            raise ValueError(
                f"The model gave back no cache, so the state that {type(mixer).__name__} ends in is not known. Its "
                "forward pass must take use_cache=True and return one."
            )
        return self.cached_state(mixer, cache)

    def cached_state(self, mixer: MixerModule, cache: Any) -> Tensor:
        """Where a cache keeps the mixer's state; see `final_state`."""
        state: Tensor = cache.get_recurrent_state(mixer.layer_idx)
        return state

    def leave(self, mixer: MixerModule, call: Call) -> None:
        """Undo `enter`, also after a mixer that raised."""
        if call.held is not None:
            for gate in self.gates:
                gate.release(mixer)
        clear(mixer)

    def __reduce__(self) -> tuple[Any, ...]:
        # Declarations hold functions that pickle cannot carry, and are the same in every process.
        return (_by_path, (self.path,))


_MIXERS: dict[str, Mixer] = {}


def register_mixer(mixer: Mixer) -> Mixer:
    """Make a recurrent mixer known, so that S0 finds it in models.

    Args:
        mixer: the declaration. A second one for the same class replaces the first.

    Returns:
        The declaration.
    """
    _MIXERS[mixer.path] = mixer
    return mixer


def registered_mixers() -> tuple[Mixer, ...]:
    """All declarations, in the order of registration."""
    return tuple(_MIXERS.values())


def find_mixer(module_class: type) -> Mixer | None:
    """The declaration for a module's class or the nearest of its bases, None if there is none."""
    for base in module_class.__mro__:
        mixer = _MIXERS.get(f"{base.__module__}.{base.__qualname__}")
        if mixer is not None:
            return mixer
    return None


def cache_argument(module_class: Any) -> str | None:
    """What the forward of a mixer or a model calls its cache, None if it takes none."""
    names = parameter_names(module_class)
    return next((name for name in CACHE_ARGUMENTS if name in names), None)


def cache_of(named: Mapping[str, Any]) -> Any:
    """The cache among the arguments or in the output of a model, by name; None if there is none."""
    return next((named[name] for name in CACHE_ARGUMENTS if named.get(name) is not None), None)


def parameter_names(module_class: Any) -> tuple[str, ...]:
    """Names of the arguments of a class's forward, without self."""
    # torch.compile looks at the cached function itself, and warns of the cache.
    return _look_up(module_class.forward) if torch.compiler.is_compiling() else _names(module_class.forward)


def _look_up(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]


_names = cache(_look_up)


def _by_path(path: str) -> Mixer:
    try:
        return _MIXERS[path]
    except KeyError:
        raise ValueError(
            f"No recurrent mixer '{path}' is registered with peft_s0 here. Call peft_s0.register_mixer for it before "
            "unpickling a model that has it."
        ) from None
