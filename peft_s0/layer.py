"""The states of one mixer, one for each adapter, and what a sequence starts from."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .alpha import find_keys
from .config import S0Config, without_start
from .mixers import Call, Mixer
from .precision import keep_float32
from .rows import Routing
from .switching import Held, let_learn
from .training import check_engine, check_precision, penalize


class Float32Module(nn.Module):
    """A module whose float32 tensors stay float32 whatever the model is cast to."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float32Module:
        # model.half() and model.to(torch.bfloat16) are meant for the base model.
        def keep_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if tensor.dtype == torch.float32 and moved.dtype != torch.float32 and moved.is_floating_point():
                return tensor.to(moved.device)
            return moved

        super()._apply(keep_float32, recurse)
        return self


class Slots(Float32Module):
    """A fixed number of states that rows start from by number; a `StateBank` fills them.

    They are one buffer, `states`: float32 [slots + 1, heads, ...], neither saved nor trained. The last is the base
    model's zero.

    Args:
        slots: how many.
        shape: [heads, ...].
        device: where they are made.
    """

    states: Tensor

    def __init__(self, slots: int, shape: tuple[int, ...], device: torch.device | None) -> None:
        super().__init__()
        self.register_buffer("states", torch.zeros(slots + 1, *shape, device=device), persistent=False)

    def forward(self, rows: Tensor, batch: int) -> Tensor:
        """A copy of each row's state, [batch, heads, ...]; beams and returned sequences repeat a row in place.

        Args:
            rows: the slot of each row of the input, int64 [rows].
            batch: number of rows now.

        Raises:
            ValueError: if the batch is no multiple of the rows.
        """
        repeats, rest = divmod(batch, rows.shape[0])
        if rest:
            raise ValueError(
                f"tasks has {rows.shape[0]} entries, but the batch has {batch} rows, which is no multiple of it. Pass "
                "one task for each row of the input."
            )
        return self.states.index_select(0, rows.repeat_interleave(repeats))


class InitialState(Float32Module):
    """One adapter's initial state of one mixer.

    A module of its own with a single parameter called `weight`, because that is what FSDP wraps, what ZeRO-3 gathers
    before a forward, and what TRL copies to a reference adapter.

    Args:
        shape: [heads, ...], as the mixer's recurrence takes it.
        config: gives `rank`, `init_weights`, `l2_lambda` and `inference_mode`.
        device: where the parameter is made.
        cast: whether trainers cast what they train, so that the parameter must be one that stays float32.
    """

    def __init__(
        self, shape: tuple[int, ...], config: S0Config, device: torch.device | None, cast: bool = False
    ) -> None:
        super().__init__()
        self.shape = shape
        self.cast = cast
        self.rank = config.rank
        self.config = config
        stored = shape if self.rank is None else (shape[0], shape[1] + shape[2], self.rank)
        # float32 whatever the base model's dtype: kernels keep the recurrent state in float32, bf16 models included.
        # Also under torch.inference_mode, whose tensors count no writes and cannot be written to outside of it.
        with torch.inference_mode(False):
            self.weight = nn.Parameter(torch.zeros(stored, dtype=torch.float32, device=device))
        # The states of an adapter for inference are loaded; its first values stand for nothing.
        # In int8 those for training are, too: transformers cannot read them, and would train the first values.
        # And a prompt does not run for a config that came from a file, so that its first values are not the prompt's.
        self.awaited = (
            config.inference_mode or config.awaits_int8 or (config.awaits_states and config.init_weights == "prompt")
        )
        if not self.awaited:
            self._initialize(config.init_weights)
        self._created = _version(self.weight)
        # Whether a loader put another parameter in place of the first, whose values nobody has looked at.
        self.replaced = False
        # What was loaded, until accelerate has placed the model.
        self.loaded: Tensor | None = None
        # Whether the parameter was seen as a shard (FSDP2); a forward pass sees it whole.
        self.sharded = False

    @property
    def l2_lambda(self) -> float:
        """Weight of the penalty, as the config says it now."""
        return self.config.l2_lambda

    def forward(self, use: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """The state [heads, ...] in float32, unscaled; never the parameter itself, whose memory FSDP takes back.

        Args:
            use: what is made of the state while its memory is there; None: a copy.

        Raises:
            RuntimeError: if the state is for inference and was never loaded.
            ValueError: if a loader that does not look at values has loaded NaN or infinity; in training, if an engine
                has cast the state, or would give the penalty another weight.
        """
        self.check_loaded()
        if torch.is_grad_enabled():
            check_precision(self)
            check_engine(self)
            penalize(self)
        if use is not None:
            return use(self.compose(self.weight))
        return self.compose(self.weight) if self.rank is not None else self.weight.clone()

    def train(self, mode: bool = True) -> InitialState:
        """See `torch.nn.Module.train`. A compiled forward pass can put no penalty on its parameters; this can."""
        if mode:
            penalize(self)
        super().train(mode)
        return self

    def compose(self, weight: Tensor) -> Tensor:
        """The state that a parameter value stands for: itself, or with a rank each head's U V^T."""
        if self.rank is None:
            return weight
        left, right = weight.split([self.shape[1], self.shape[2]], dim=1)
        # In float32, which autocast would undo.
        with torch.autocast(weight.device.type, enabled=False):
            return left @ right.transpose(1, 2)

    @torch.no_grad()
    def write(self, state: Tensor) -> None:
        """Let the parameter stand for a state, with a rank for the nearest one of that rank in Frobenius norm.

        Args:
            state: [heads, ...], unscaled.
        """
        if self.rank is not None:
            # By the largest singular values (Eckart and Young), with their roots in either factor.
            left, values, right = torch.linalg.svd(state.double(), full_matrices=False)
            values, right = values[:, None, : self.rank], right[:, : self.rank].transpose(1, 2)
            # Where the state has fewer than the rank, U is not zero, so that V has a gradient.
            there = values > torch.finfo(torch.float32).eps * values.amax(-1, keepdim=True)
            left = left[..., : self.rank] * torch.where(there, values.sqrt(), 1.0)
            state = torch.cat([left, right * torch.where(there, values.sqrt(), 0.0)], dim=1)
        self.weight.copy_(state)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Also called for a parameter that a loader puts in place of the first."""
        super().register_parameter(name, param)
        self._adopt()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A parameter that was copied or pickled comes without what was added to it."""
        super().__setstate__(state)
        self._adopt()

    def _adopt(self) -> None:
        if self.cast:
            keep_float32(self.weight)
        # Now, for a compiled model could not add it when it runs.
        penalize(self)
        # A copy counts what is written to its parameter from the start again.
        self._created = _version(self.weight)

    @property
    def untouched(self) -> bool:
        """Whether nothing was written to the parameter since it was made."""
        return _version(self.weight) == self._created

    def check_loaded(self) -> None:
        """Refuse a state that was never loaded though it is for inference, or was loaded broken; see `forward`."""
        if self.awaited:
            if self.untouched:
                raise RuntimeError(NOT_LOADED)
            self.awaited = False
        if self.replaced and not self.weight.is_meta and not torch.compiler.is_compiling():
            check_finite("weight", self.weight.detach())
            self.replaced = False

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Of torch.nn.Module; here it is noted that the state was loaded, which compiled code could not find out."""
        super()._load_from_state_dict(*args, **kwargs)
        self.awaited = self.awaited and self.untouched

    def __setattr__(self, name: str, value: Any) -> None:
        # How transformers loads: it puts a parameter of its own in place of the first. FSDP does so in each pass.
        if name == "weight":
            self.awaited, self.replaced = False, not vars(self).get("sharded", False)
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        self.awaited = self.awaited and self.untouched
        return vars(self)

    def _initialize(self, init_weights: bool | float | str) -> None:
        if self.weight.is_meta:
            return
        # A prompt's state is written when the whole model is there to run it.
        init_weights = True if isinstance(init_weights, str) else init_weights
        std = {True: 0.0, False: 1.0}[init_weights] if isinstance(init_weights, bool) else float(init_weights)
        with torch.no_grad():
            right = self.weight
            if self.rank is not None:
                # U is random and V is zero, so that the state is zero and yet has a gradient.
                left, right = self.weight.split([self.shape[1], self.shape[2]], dim=1)
                left.normal_(std=self.rank**-0.5)
            if std > 0:
                right.normal_(std=std)

    def extra_repr(self) -> str:
        """Shape and rank, for printing."""
        return f"shape={list(self.shape)}" + ("" if self.rank is None else f", rank={self.rank}")


def _version(weight: Tensor) -> int:
    """How often a parameter was written to; 0 for one that a loader made under torch.inference_mode."""
    return 0 if weight.is_inference() else weight._version


class StateOffset(InitialState):
    """One adapter's state offset of one mixer: kept as a state is, but read at every step (see `offset`)."""


class LearntAlpha(InitialState):
    """One adapter's learnt scale of one mixer, a parameter of shape [1]: kept as a state is, without a penalty.

    Args:
        alpha: where it starts.
        config: see `InitialState`.
        device: see `InitialState`.
        cast: see `InitialState`.
    """

    def __init__(self, alpha: float, config: S0Config, device: torch.device | None, cast: bool = False) -> None:
        # Not of shape [], which FSDP2 does not take.
        super().__init__((1,), without_start(config, rank=None, l2_lambda=0.0), device, cast)
        if not self.weight.is_meta:
            nn.init.constant_(self.weight, alpha)
        self._adopt()


class S0Layer(nn.Module, BaseTunerLayer):
    """The tuner layer of one recurrent mixer. It is the mixer's child `s0`; the mixer itself stays as it is.

    Args:
        mixer: the mixer it belongs to, read for shape and device, not kept.
        declaration: what is known of the mixer's class.
    """

    adapter_layer_names = ("s0_state", "s0_offset", "s0_alpha")
    other_param_names = ("configs", "alpha_keys")
    # peft.helpers.disable_input_dtype_casting sets it on every tuner layer; states are cast nowhere.
    cast_input_dtype_enabled = True

    def __init__(self, mixer: nn.Module, declaration: Mixer) -> None:
        super().__init__()
        self.declaration = declaration
        self.cache_argument = declaration.cache_argument_of(mixer)
        self.state_shape = tuple(int(size) for size in declaration.state_shape(mixer))
        self.s0_state = nn.ModuleDict()
        self.s0_offset = nn.ModuleDict()
        self.s0_alpha = nn.ModuleDict()
        self.configs: dict[str, S0Config] = {}
        # For an adapter whose alpha_pattern speaks of this layer, the key there.
        self.alpha_keys: dict[str, str] = {}
        # The model's own, once S0Model has put it here.
        self.routing = Routing()
        # A bank's states, and the slot of each row while it is used; empty where no row has a task. A tensor, so that
        # compiled code serves all tasks.
        self.slots: Slots | None = None
        self.row_slots: Tensor | None = None
        self._active_adapter: list[str] = []
        self.held: Held = {}
        # Of the instance, as it will be after the first disable_adapter(): a compiled model sees the difference.
        self._disable_adapters = False
        self.handles: list[RemovableHandle] = []
        # The mixer's call that is running in a thread, if S0 has something to do in it.
        self.calls: dict[int, Call] = {}

    def update_layer(
        self, adapter_name: str, config: S0Config, device: torch.device | None, cast: bool = False
    ) -> None:
        """Add an adapter.

        Args:
            adapter_name: its name.
            config: its config, with alpha already a number.
            device: where the state is made.
            cast: whether trainers cast what they train.
        """
        self.configs[adapter_name] = config
        if config.variant != "offset":
            self.s0_state[adapter_name] = InitialState(self.state_shape, config, device, cast).train(self.training)
        if config.variant != "initial":
            self.s0_offset[adapter_name] = StateOffset(self.state_shape, config, device, cast).train(self.training)
        if config.learn_alpha:
            alpha = LearntAlpha(self.alpha(adapter_name), config, device, cast)
            self.s0_alpha[adapter_name] = alpha.train(self.training)
        self._forget(adapter_name)
        self.held[adapter_name] = list(self.learnt_tensors(adapter_name).values())
        self.set_adapter(self.active_adapters)

    def delete_adapter(self, adapter_name: str) -> None:
        """See `BaseTunerLayer.delete_adapter`."""
        self._forget(adapter_name)
        super().delete_adapter(adapter_name)

    def drop_adapter(self, adapter_name: str) -> None:
        """Take an adapter away without another becoming active in its place, as in `delete_adapter`."""
        vars(self)["_active_adapter"] = [name for name in self.active_adapters if name != adapter_name]
        self.delete_adapter(adapter_name)

    def snapshot(self) -> Callable[[], None]:
        """What puts the layer's adapters back as they are now: the same parameters, under the same names."""
        kept: Any = [self._modules[kind] for kind in self.adapter_layer_names]
        places: list[dict[str, Any]] = [*(modules._modules for modules in kept), self.configs, self.alpha_keys]
        places.append(self.held)
        before, active = [dict(place) for place in places], self._active_adapter

        def restore() -> None:
            for place, entries in zip(places, before, strict=True):
                place.clear()
                place.update(entries)
            self.routing.held = None
            vars(self)["_active_adapter"] = active

        return restore

    def _forget(self, adapter_name: str) -> None:
        self.held.pop(adapter_name, None)
        self.routing.held = None

    def state(self, adapter_name: str) -> InitialState:
        """The module that holds an adapter's state."""
        state: InitialState = self._kept("s0_state")[adapter_name]
        return state

    def learnt_tensors(self, adapter_name: str) -> dict[str, InitialState]:
        """The modules that hold what an adapter has learnt here, by what it is: `s0_state`, `s0_offset`, `s0_alpha`."""
        found = {kind: getattr(self, kind) for kind in self.adapter_layer_names}
        return {kind: held[adapter_name] for kind, held in found.items() if adapter_name in held}

    def states(self, adapter_name: str) -> dict[str, InitialState]:
        """Those of `learnt_tensors` that have the shape of a state."""
        return {kind: held for kind, held in self.learnt_tensors(adapter_name).items() if kind != "s0_alpha"}

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """See `BaseTunerLayer.set_adapter`.

        Args:
            adapter_names: the active adapters.
            inference_mode: whether their states are frozen.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else [*adapter_names]
        let_learn(self.held, [] if inference_mode else names)
        if names != self._active_adapter:
            # The same list stays, which layers share: compiled code sees whether they do. And not as an attribute: that
            # of a module takes longer than all else here.
            vars(self)["_active_adapter"] = names

    def alpha(self, adapter_name: str) -> float:
        """The scale of an adapter's state in this layer: what was learnt, else what its config says now.

        In training mode, `train_alpha` may go before it.
        """
        learnt = self._kept("s0_alpha").get(adapter_name)
        if learnt is not None:
            return float(learnt.weight.detach())
        config = self.configs[adapter_name]
        assert config.alpha is not None, "S0Model sets alpha before it makes layers"
        key = self.alpha_keys.get(adapter_name)
        return config.alpha if key is None else config.alpha_pattern.get(key, config.alpha)

    @property
    def participates(self) -> bool:
        """Whether any row of the next call may start from a learnt state or read an offset."""
        if self._disable_adapters:
            return False
        if self.row_slots is not None:
            return self.row_slots.shape[0] > 0
        return _any_in(self._called, self.configs)

    @property
    def starts(self) -> bool:
        """Whether any row of a call that this layer participates in may start from a learnt state."""
        return self.row_slots is not None or self._holds("s0_state")

    @property
    def reads(self) -> bool:
        """Whether any row of a call that this layer participates in reads an offset."""
        return self.row_slots is None and self._holds("s0_offset")

    def _holds(self, kind: str) -> bool:
        """Whether an adapter of the next call has a tensor of this kind. Asked at every token, so no call too many."""
        kept: Any = self._modules[kind]
        return bool(kept._modules) and _any_in(self._called, kept._modules)

    def _kept(self, kind: str) -> Mapping[str, Any]:
        """The modules that hold what adapters have learnt, by the adapters' names.

        As attributes of a module, they would take several times as long to find.
        """
        kept: Any = self._modules[kind]
        held: Mapping[str, Any] = kept._modules
        return held

    @property
    def _called(self) -> Sequence[str]:
        """The adapters of the next call, some of which may have nothing in this layer."""
        rows = self.routing.rows
        return self._active_adapter if rows is None else rows.different

    def effective_state(self, adapter_name: str) -> Tensor:
        """The state that an adapter's sequences start from.

        Returns:
            [heads, ...] in float32: alpha * S, or alpha * S / ||S||_F with `normalize`; in training mode
            train_alpha * S if `train_alpha` is set. Never the parameter itself nor a view of it, since kernels may
            write to it.
        """
        return self._read(self.state(adapter_name), adapter_name, _as_it_is)

    def effective_offset(self, adapter_name: str) -> Tensor:
        """What an adapter adds to the state where it is read: [heads, ...] in float32, scaled as its state is."""
        return self._read(self.s0_offset[adapter_name], adapter_name, _as_it_is)

    def offsets(self, batch: int, documents: Sequence[int] | None = None) -> list[tuple[str, list[int] | None]]:
        """The adapters whose offsets are read in a call that this layer participates in.

        Args:
            batch: number of rows.
            documents: for packed rows, the row of each document.

        Returns:
            Their names, each with the rows or documents that read the offset; None: all of them.

        Raises:
            ValueError: if the `adapter_names` that were passed are not one for each row.
        """
        if not self.reads:
            return []
        names = [name for name in self._called if name in self.s0_offset]
        rows = self.routing.rows
        if rows is None:
            return [(name, None) for name in names]
        of = rows.of(batch, documents)
        return [(name, [i for i, other in enumerate(of) if other == name]) for name in names]

    def read_offsets(
        self,
        offsets: Sequence[tuple[str, list[int] | None]],
        query: Tensor,
        product: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        """What is read from offsets: the sum over all adapters.

        Args:
            offsets: see `offsets`; at least one.
            query: what is read with, [rows, ...].
            product: from that and an offset [heads, ...] to what is read, [rows, ...]; linear in the offset.
        """
        total: Tensor | None = None
        for name, rows in offsets:
            read = self._read(self.s0_offset[name], name, partial(product, query if rows is None else query[rows]))
            if rows is not None:
                total = read.new_zeros(query.shape[0], *read.shape[1:]) if total is None else total
                total[rows] = read
            else:
                total = read if total is None else total + read
        assert total is not None, "there is an offset to be read"
        return total

    def start_states(self, batch: int, device: torch.device, documents: Sequence[int] | None = None) -> Tensor:
        """What each sequence of a batch starts from.

        Args:
            batch: number of rows.
            device: where the states are needed.
            documents: for packed rows, the row of each document.

        Returns:
            Float32 [rows or documents, heads, ...], contiguous: some kernels make a copy of what is not, and then take
            it for a tensor that needs no gradient.

        Raises:
            ValueError: if the `adapter_names` that were passed are not one for each row.
        """
        if self.slots is not None and self.row_slots is not None:
            states = self.slots(self.row_slots, batch).to(device)
            return states if documents is None else states[torch.tensor(documents, device=device)]
        rows = self.routing.rows
        if rows is None:
            kept = self._kept("s0_state")
            count = batch if documents is None else len(documents)
            # Scaled as it is copied.
            copies = partial(_copies, count, device)
            first, *others = [self._read(kept[name], name, copies) for name in self._active_adapter if name in kept]
            return sum(others, first).contiguous()
        names = rows.of(batch, documents)
        kept = self._kept("s0_state")
        found = {name: self._to_scale(kept[name], name, device) for name in rows.different if name in kept}
        factors = [factor for _, factor in found.values()]
        # One product for all rows where it is the same: many small ones let an accelerator wait.
        alike = bool(factors) and all(not isinstance(factor, Tensor) and factor == factors[0] for factor in factors)
        states = {name: state if alike else state * factor for name, (state, factor) in found.items()}
        zero = torch.zeros((), dtype=torch.float32, device=device).expand(self.state_shape)
        stacked = torch.stack([states.get(name, zero) for name in names])
        return stacked.mul_(factors[0]) if alike else stacked

    def requires_grad_(self, requires_grad: bool = True) -> S0Layer:
        """As of any module.

        transformers freezes a layer so when it has loaded an adapter. It only logs which states it did not find; here
        they are refused.

        Raises:
            RuntimeError: if a state is for inference and was never loaded.
            ValueError: if one has values that are NaN or infinite.
        """
        for name in self.configs:
            for learnt in self.learnt_tensors(name).values():
                learnt.check_loaded()
        return super().requires_grad_(requires_grad)

    def learnt(self, states: Tensor) -> Tensor:
        """Which rows differ from the base model's zero state or are being learnt, so that their pads must be exact.

        Args:
            states: from `start_states`.

        Returns:
            Bool [rows], or [1] if all rows start from the same state.
        """
        if self.routing.rows is None and self.row_slots is None:
            states = states[:1]
        if torch.is_grad_enabled() and states.requires_grad:
            return torch.ones(states.shape[0], dtype=torch.bool, device=states.device)
        return states.flatten(1).any(dim=1)

    def _read(self, held: nn.Module, adapter_name: str, product: Callable[[Tensor], Tensor]) -> Tensor:
        """A linear function of an adapter's scaled state or offset, which is nowhere copied where it need not be."""

        def read(state: Tensor) -> Tensor:
            state, factor = self._scale(adapter_name, state)
            result = product(state)
            return result * (factor.to(result.device) if isinstance(factor, Tensor) else factor)

        result: Tensor = held(read)
        return result

    def _to_scale(self, held: nn.Module, adapter_name: str, device: torch.device) -> tuple[Tensor, float | Tensor]:
        """An adapter's state, and the factor that it is still to be multiplied by.

        It may be the parameter itself, but not where that is there for the call of its module only (FSDP, ZeRO-3).
        """
        if type(held) is InitialState and not held._forward_hooks:
            state, factor = held(partial(self._scale, adapter_name))
            return state.to(device), factor.to(device) if isinstance(factor, Tensor) else factor
        return self.effective_state(adapter_name).to(device), 1.0

    def _scale(self, adapter_name: str, state: Tensor) -> tuple[Tensor, float | Tensor]:
        """A state or an offset of an adapter, and the factor that it is still to be multiplied by.

        A factor that is learnt is a tensor of shape [].
        """
        config = self.configs[adapter_name]
        if self.training and config.train_alpha is not None:
            return state, config.train_alpha
        if config.normalize:
            norm = state.norm()
            # A zero state has no direction; it stays zero, with a finite gradient.
            state = torch.where(norm > 0, state / norm.clamp_min(torch.finfo(norm.dtype).tiny), state)
        learnt = self._kept("s0_alpha").get(adapter_name)
        return state, self.alpha(adapter_name) if learnt is None else learnt().squeeze(0)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # There is no base layer to read a device from; a state is moved to the hidden states' device when it is used.
        if device is not None:
            for learnt in self.learnt_tensors(adapter_name).values():
                learnt.to(device)

    @property
    def weight(self) -> Tensor:
        """None; PEFT reads a wrapped layer's weight here."""
        raise AttributeError("An S0 layer stands beside its mixer and has no base weight.")

    @property
    def bias(self) -> Tensor:
        """None; PEFT reads a wrapped layer's bias here."""
        raise AttributeError("An S0 layer stands beside its mixer and has no base bias.")

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Leave the states as they are, in force, where another method's adapters are merged.

        PEFT calls this for every tuner layer of a model, whichever method is to be merged.

        Args:
            safe_merge: without meaning here.
            adapter_names: the adapters to merge; None: the active ones of each method.

        Raises:
            ValueError: if one of the names is that of an S0 adapter.

        Warns:
            UserWarning: always, since the weights alone are not all of the model's adapters then.
        """
        if any(name in self.configs for name in adapter_names or ()):
            raise ValueError(MERGE_ERROR)
        warnings.warn(STAYS_WARNING, stacklevel=2)

    def unmerge(self) -> None:
        """Do nothing: states are never merged."""

    def forward(self, *args: Any, **kwargs: Any) -> None:
        """Never called; raises RuntimeError."""
        raise RuntimeError("An S0 layer is not called; it acts through the hooks of its mixer.")


def _as_it_is(state: Tensor) -> Tensor:
    return state


def _copies(count: int, device: torch.device, state: Tensor) -> Tensor:
    """One for each row, without memory of their own."""
    return state.to(device).expand(count, *state.shape)


def _any_in(names: Sequence[str], held: Mapping[str, Any]) -> bool:
    # A loop: a generator takes longer, and torch.compile knows no isdisjoint.
    for name in names:  # noqa: SIM110
        if name in held:
            return True
    return False


def set_alpha_keys(adapter_name: str, config: S0Config, layers: Mapping[str, S0Layer]) -> None:
    """Tell layers, given by their mixers' names, where in a config's `alpha_pattern` they find their alpha."""
    keys = find_keys(config.alpha_pattern, layers)
    for name, layer in layers.items():
        layer.alpha_keys.pop(adapter_name, None)
        if name in keys:
            layer.alpha_keys[adapter_name] = keys[name]


def check_finite(name: str, state: Tensor) -> None:
    """Refuse a state with values that are not finite as float32, which is what it will be.

    Raises:
        ValueError: naming the state and how many values are bad.
    """
    # Smallest and largest tell at a tenth of the cost of all.
    if not bool(torch.isfinite(torch.stack(state.float().aminmax())).all()):
        bad = int((~torch.isfinite(state.float())).sum())
        raise ValueError(
            f"The state '{name}' has {bad} of {state.numel()} values that are NaN or infinite; a training run that "
            "diverged or a damaged file. Load another checkpoint."
        )


NOT_LOADED = (
    "A state of an S0 adapter for inference was never loaded: the file or state dict had none of its name and shape. "
    "transformers' own load_adapter and from_pretrained do not translate all names between the classes of a model, as "
    "from text-only to vision-language, nor read states stored in int8. PeftModel.from_pretrained does: take this "
    "adapter away with delete_adapter and load it so. For an adapter that is to start from its first values or its "
    "prompt, set inference_mode=False before it is made, in a copy of the config: dataclasses.replace(config, "
    "inference_mode=False)."
)

STAYS_WARNING = (
    "S0 adapters are not merged with the others: an initial state is no weight. It stays in force in this model, but "
    "whatever takes the merged weights alone, such as an inference engine, runs without it."
)

MERGE_ERROR = (
    "S0 adapters cannot be merged or unmerged: an initial state is no weight, and no weight of the base model has its "
    "effect. There is nothing to gain either, since nothing is added to any step. Keep the adapter loaded, switch with "
    "set_adapter, and get the base model back with unload() or disable_adapter()."
)
