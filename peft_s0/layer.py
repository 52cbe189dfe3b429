"""The states of one mixer, one for each adapter, and what a sequence starts from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .config import S0Config
from .mixers import Call, Mixer
from .training import check_engine, penalize

BASE = "__base__"


class InitialState(nn.Module):
    """One adapter's initial state of one mixer.

    A module of its own with a single parameter called `weight`, because that is what FSDP wraps, what ZeRO-3 gathers
    before a forward, and what TRL copies to a reference adapter.

    Args:
        shape: [heads, ...], as the mixer's recurrence takes it.
        config: gives `rank`, `init_weights` and `l2_lambda`.
        device: where the parameter is made.
    """

    def __init__(self, shape: tuple[int, ...], config: S0Config, device: torch.device | None) -> None:
        super().__init__()
        self.shape = shape
        self.rank = config.rank
        self.l2_lambda = config.l2_lambda
        stored = shape if self.rank is None else (shape[0], shape[1] + shape[2], self.rank)
        # float32 whatever the base model's dtype: kernels keep the recurrent state in float32, bf16 models included.
        self.weight = nn.Parameter(torch.zeros(stored, dtype=torch.float32, device=device))
        self._initialize(config.init_weights)
        self._created = self.weight._version
        # Whether the parameter was seen as a shard (FSDP2); a forward pass sees it whole.
        self.sharded = False

    def forward(self) -> Tensor:
        """The state [heads, ...] in float32, unscaled; never the parameter itself, whose memory FSDP takes back."""
        if torch.is_grad_enabled():
            check_engine(self)
            penalize(self)
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
        return left @ right.transpose(1, 2)

    @property
    def untouched(self) -> bool:
        """Whether nothing was written to the parameter since it was made."""
        return self.weight._version == self._created

    def _initialize(self, init_weights: bool | float) -> None:
        if self.weight.is_meta:
            return
        std = {True: 0.0, False: 1.0}[init_weights] if isinstance(init_weights, bool) else float(init_weights)
        with torch.no_grad():
            right = self.weight
            if self.rank is not None:
                # U is random and V is zero, so that the state is zero and yet has a gradient.
                left, right = self.weight.split([self.shape[1], self.shape[2]], dim=1)
                left.normal_(std=self.rank**-0.5)
            if std > 0:
                right.normal_(std=std)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> InitialState:
        # model.half() and model.to(torch.bfloat16) are meant for the base model.
        def keep_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if tensor.dtype == torch.float32 and moved.dtype != torch.float32 and moved.is_floating_point():
                return tensor.to(moved.device)
            return moved

        super()._apply(keep_float32, recurse)
        return self

    def extra_repr(self) -> str:
        """Shape and rank, for printing."""
        return f"shape={list(self.shape)}" + ("" if self.rank is None else f", rank={self.rank}")


class S0Layer(nn.Module, BaseTunerLayer):
    """The tuner layer of one recurrent mixer. It is the mixer's child `s0`; the mixer itself stays as it is.

    Args:
        mixer: the mixer it belongs to, read for shape and device, not kept.
        declaration: what is known of the mixer's class.
    """

    adapter_layer_names = ("s0_state",)
    other_param_names = ("configs",)

    def __init__(self, mixer: nn.Module, declaration: Mixer) -> None:
        super().__init__()
        self.declaration = declaration
        self.state_shape = tuple(int(size) for size in declaration.state_shape(mixer))
        self.s0_state = nn.ModuleDict()
        self.configs: dict[str, S0Config] = {}
        # Adapter of each row while a call with `adapter_names` runs.
        self.row_adapters: list[str] | None = None
        self._active_adapter: list[str] = []
        self.handles: list[RemovableHandle] = []
        # The mixer's call that is running, if S0 has something to do in it.
        self.call: Call | None = None

    def update_layer(self, adapter_name: str, config: S0Config, device: torch.device | None) -> None:
        """Add an adapter.

        Args:
            adapter_name: its name.
            config: its config, with alpha already a number.
            device: where the state is made.
        """
        self.configs[adapter_name] = config
        self.s0_state[adapter_name] = InitialState(self.state_shape, config, device)
        self.s0_state[adapter_name].train(self.training)
        self.set_adapter(self.active_adapters)

    def state(self, adapter_name: str) -> InitialState:
        """The module that holds an adapter's state."""
        return cast(InitialState, self.s0_state[adapter_name])

    @property
    def participates(self) -> bool:
        """Whether any row of the next call may start from a learnt state."""
        if self._disable_adapters:
            return False
        names = self._active_adapter if self.row_adapters is None else self.row_adapters
        return any(name in self.configs for name in names)

    def effective_state(self, adapter_name: str) -> Tensor:
        """The state that an adapter's sequences start from.

        Returns:
            [heads, ...] in float32: alpha * S, or alpha * S / ||S||_F with `normalize`; in training mode
            train_alpha * S if `train_alpha` is set. Never the parameter itself nor a view of it, since kernels may
            write to it.
        """
        config = self.configs[adapter_name]
        assert config.alpha is not None, "S0Model sets alpha before it makes layers"
        state: Tensor = self.state(adapter_name)()
        if self.training and config.train_alpha is not None:
            return state * config.train_alpha
        if config.normalize:
            norm = state.norm()
            # A zero state has no direction; it stays zero, with a finite gradient.
            state = torch.where(norm > 0, state / norm.clamp_min(torch.finfo(norm.dtype).tiny), state)
        return state * config.alpha

    def start_states(self, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """What each row of a batch starts from.

        Args:
            batch: number of rows.
            device: where they are needed.

        Returns:
            The states, float32 [batch, heads, ...], contiguous; and which rows differ from the base model's zero state
            or are being learnt, bool [batch] or [1].

        Raises:
            ValueError: if the batch is no multiple of the `adapter_names` that were passed.
        """
        if self.row_adapters is None:
            active = [name for name in self._active_adapter if name in self.configs]
            state = self.effective_state(active[0])
            for name in active[1:]:
                state = state + self.effective_state(name)
            state = state.to(device)
            return state.expand(batch, *state.shape).contiguous(), _matters(state.unsqueeze(0))
        table, index = self._table()
        repeats, rest = divmod(batch, len(index))
        if rest:
            raise ValueError(
                f"adapter_names has {len(index)} entries, but the batch has {batch} rows, which is no multiple of it. "
                "Pass one adapter name for each row of the input."
            )
        states = table.to(device)
        # Beams and returned sequences repeat each row of the input in place.
        rows = torch.tensor(index, device=device).repeat_interleave(repeats)
        return states.index_select(0, rows), _matters(states).index_select(0, rows)

    def _table(self) -> tuple[Tensor, list[int]]:
        """The different states of a call with `adapter_names`, [adapters, heads, ...], and the entry of each name."""
        assert self.row_adapters is not None
        known = sorted({name for name in self.row_adapters if name in self.configs})
        states = [self.effective_state(name) for name in known]
        base = torch.zeros_like(states[0])
        place = {name: place for place, name in enumerate(known)}
        return torch.stack([*states, base]), [place.get(name, len(known)) for name in self.row_adapters]

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # There is no base layer to read a device from; a state is moved to the hidden states' device when it is used.
        if device is not None and adapter_name in self.s0_state:
            self.s0_state[adapter_name].to(device)

    @property
    def weight(self) -> Tensor:
        """None; PEFT reads a wrapped layer's weight here."""
        raise AttributeError("An S0 layer stands beside its mixer and has no base weight.")

    @property
    def bias(self) -> Tensor:
        """None; PEFT reads a wrapped layer's bias here."""
        raise AttributeError("An S0 layer stands beside its mixer and has no base bias.")

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Not possible for states; raises ValueError."""
        raise ValueError(MERGE_ERROR)

    def unmerge(self) -> None:
        """Not possible for states; raises ValueError."""
        raise ValueError(MERGE_ERROR)

    def forward(self, *args: Any, **kwargs: Any) -> None:
        """Never called; raises RuntimeError."""
        raise RuntimeError("An S0 layer is not called; it acts through the hooks of its mixer.")


MERGE_ERROR = (
    "S0 adapters cannot be merged or unmerged: an initial state is no weight, and no weight of the base model has its "
    "effect. There is nothing to gain either, since nothing is added to any step. Keep the adapter loaded, switch with "
    "set_adapter, and get the base model back with unload() or disable_adapter()."
)


def _matters(states: Tensor) -> Tensor:
    """Bool [rows]: whether a row's state is not zero, or is being learnt, so that its pads must be exact."""
    if torch.is_grad_enabled() and states.requires_grad:
        return torch.ones(states.shape[0], dtype=torch.bool, device=states.device)
    return (states != 0).flatten(1).any(dim=1)
