"""Many tasks on one model: a bounded number of states on the device, all others on disk or in CPU memory."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from torch import Tensor, nn

from .config import S0Config, check_readable, find_states, load_config
from .fit import check_fit
from .injection import CHILD, has_layer, layer_of
from .layer import InitialState, S0Layer, Slots, check_finite, set_alpha_keys
from .model import S0Model
from .naming import match_names
from .rows import BASE
from .storage import Stored, group


class UnknownTaskError(ValueError):
    """A request for a task that is not there."""


class StateBank:
    """Serves many S0 adapters ("tasks") on one model, each row of a batch its own.

    The device holds `capacity` states and no more. They lie in slots that are made once: a request names a task for
    each row, states that are missing are copied over those used least recently, and the rows start from their slots.
    For a task no parameter is added, no memory kept and nothing compiled. A slot holds what a sequence starts from, so
    tasks may differ in `alpha`, `normalize`, `rank` and the layers they tune. Results are those of the adapter loaded
    alone. The model's own adapters stay as they are.

    Threads may share a bank. Passes through the model are serialised, since which row starts where is set on its
    layers for the time of a call. Loading is not: a request reads its missing states while others compute, and its
    slots are its own until it ends. If all slots are held, it waits. Calls of the model that do not go through the
    bank must not run at the same time. On a GPU all threads must compute on the same stream, as they do by default.

    Args:
        model: a PEFT model with S0 adapters, in eval mode where it is used; its adapters' layers are those that
            tasks may tune. `torch.compile(model)` is one, too.
        capacity: how many tasks the device holds; no request may have more different ones.
        host: where all tasks lie. "disk": in their files, which are mapped and must stay as they are. "cpu": in memory,
            as they are stored.

    Raises:
        TypeError: if the model is no PEFT model with S0 adapters.
        ValueError: for other values than these, or if the model has a bank already.

    Example:
        >>> model = get_peft_model(AutoModelForCausalLM.from_pretrained("Qwen/Qwen3.5-4B"), S0Config()).eval()
        >>> bank = StateBank(model, capacity=32)
        >>> bank.add("sql", "me/qwen3.5-4b-sql")
        >>> bank.generate(**inputs, tasks=["sql", "__base__"])
    """

    def __init__(self, model: PeftModel, capacity: int = 32, host: Literal["disk", "cpu"] = "disk") -> None:
        tuner = getattr(model, "base_model", None)
        if not isinstance(tuner, S0Model):
            raise TypeError(
                f"StateBank needs a PEFT model with S0 adapters, got {type(model).__name__}. Make one with "
                "peft.get_peft_model(model, S0Config())."
            )
        if not isinstance(capacity, int) or isinstance(capacity, bool) or capacity < 1:
            raise ValueError(f"StateBank: capacity must be an integer >= 1, got {capacity!r}.")
        if host not in ("disk", "cpu"):
            raise ValueError(f"StateBank: host must be 'disk' or 'cpu', got {host!r}.")
        mixers = {name: module for name, module in tuner.model.named_modules() if has_layer(module)}
        if any(layer_of(mixer).slots is not None for mixer in mixers.values()):
            raise ValueError("The model has a StateBank already; use that one, or call its close() first.")
        self.model, self.capacity, self.host = model, capacity, host
        self._tuner, self._mixers = tuner, mixers
        # Also under torch.inference_mode, whose tensors could not be written to outside of it.
        with torch.inference_mode(False):
            for mixer in mixers.values():
                device = next((weight.device for weight in mixer.parameters() if not weight.is_meta), None)
                layer_of(mixer).slots = Slots(capacity, layer_of(mixer).state_shape, device)
        # The tasks and who holds which slot change under one lock, the model computes under the other.
        self._changed, self._passes = threading.Condition(), threading.Lock()
        self._tasks: dict[str, _Task] = {}
        self._slots = [_Slot(index) for index in range(capacity)]  # least recently used first
        self._computing: int | None = None

    @torch.inference_mode(False)
    def add(self, name: str, model_id: str | Path, **kwargs: Any) -> None:
        """Add a task. Its file is checked against the model at once, by its header: layers, shapes and dtype.

        NaN and infinity are looked for where the values are read anyway: here with `host="cpu"`, else when the states
        are first copied to the device. Then the requests for this task fail, and no others.

        Args:
            name: what requests call it.
            model_id: folder or Hub id of the saved adapter.
            kwargs: `subfolder`, `revision`, `token` and the like, for the Hub.

        Raises:
            ValueError: if the name is taken or the file is refused as it would be in loading; also if it holds more
                than initial states, is no safetensors file, or tunes layers that none of the model's adapters does. The
                bank is then as it was.
        """
        if not isinstance(name, str) or name == BASE:
            raise ValueError(f"StateBank: a task's name must be a string other than '{BASE}', got {name!r}.")
        config = load_config(model_id, **kwargs)
        if config.variant != "initial":
            raise ValueError(
                f"'{model_id}' has variant='{config.variant}'. A bank holds what sequences start from, and no offsets, "
                "which are read at every step. Load the adapter with load_adapter and tell rows by adapter_names."
            )
        config = self._tuner._prepare_adapter_config(config, self._tuner.get_model_config(self._tuner.model))
        self._tuner._prepare_model(config, self._tuner.model)
        shapes = {}
        for target in self._tuner._targets(config):
            if target not in self._mixers:
                raise ValueError(
                    f"'{model_id}' tunes '{target}', which no adapter of this model does, so the bank has no slot "
                    "there. Make the model with get_peft_model(model, S0Config()), which covers all recurrent layers."
                )
            state = InitialState(layer_of(self._mixers[target]).state_shape, config, torch.device("meta"))
            shapes[target] = tuple(state.weight.shape)
            if config.learn_alpha:
                shapes[f"{target}{_ALPHA}"] = (1,)
        file = find_states(str(model_id), **kwargs)
        if file is None or file.name != SAFETENSORS_WEIGHTS_NAME:
            raise ValueError(f"'{model_id}' has no {SAFETENSORS_WEIGHTS_NAME}; save the adapter with save_pretrained.")
        # The process may change its working directory before it reads the file.
        task = _Task(name, config, file.absolute(), shapes)
        if self.host == "cpu":
            task.states = {target: stored.clone() for target, stored in task.read(values=True).items()}
        else:
            task.read(values=False)
        with self._changed:
            if name in self._tasks:
                raise ValueError(f"StateBank: task '{name}' is there already; remove it first.")
            self._tasks[name] = task

    def remove(self, name: str) -> None:
        """Remove a task. Requests that hold its slot go on with it, requests that still wait for slots fail.

        Raises:
            ValueError: if there is no such task.
        """
        with self._changed:
            task = self._find(name)
            del self._tasks[name]
            for slot in self._slots:
                if slot.task is task:
                    slot.task = None
            self._changed.notify_all()

    def __len__(self) -> int:
        return len(self._tasks)

    def __contains__(self, name: object) -> bool:
        return name in self._tasks

    def __iter__(self) -> Iterator[str]:
        """The tasks' names, in the order they were added."""
        return iter(list(self._tasks))

    @property
    def resident(self) -> list[str]:
        """The tasks in the slots, least recently used first: the order in which they leave."""
        with self._changed:
            return [slot.task.name for slot in self._slots if slot.task is not None]

    def generate(self, *args: Any, tasks: Sequence[str], **kwargs: Any) -> Any:
        """The model's `generate` with a task for each row; see `use`."""
        with self.use(tasks):
            return self.model.generate(*args, **kwargs)

    def __call__(self, *args: Any, tasks: Sequence[str], **kwargs: Any) -> Any:
        """The model's forward pass with a task for each row; see `use`."""
        with self.use(tasks):
            return self.model(*args, **kwargs)

    @contextmanager
    def use(self, tasks: Sequence[str]) -> Iterator[None]:
        """Let the rows of a batch start from tasks. The model is this thread's alone meanwhile.

        Args:
            tasks: the task of each row of the input, `"__base__"` for the base model.

        Raises:
            TypeError: if `tasks` is no list.
            ValueError: for no tasks, unknown ones, more different ones than slots, states that are not finite or
                whose file was changed, and for a model in training mode or whose adapters are disabled.
            RuntimeError: inside of another `use` of this thread, and after `close`.
        """
        if not isinstance(tasks, (list, tuple)):
            raise TypeError(f"tasks must be a list with one name for each row, got {type(tasks).__name__}.")
        if not tasks:
            raise ValueError("tasks is empty; pass one task for each row of the input.")
        if self._computing == threading.get_ident():
            raise RuntimeError("StateBank.use inside of StateBank.use: this thread has the model already.")
        held = self._hold([name for name in dict.fromkeys(tasks) if name != BASE])
        try:
            for task, slot in held.items():
                self._fill(slot, task)
            with self._passes:
                self._computing = threading.get_ident()
                try:
                    self._route(tasks, {task.name: slot.index for task, slot in held.items()})
                    yield
                finally:
                    self._unroute()
                    self._computing = None
        finally:
            with self._changed:
                for slot in held.values():
                    slot.users -= 1
                self._changed.notify_all()

    def close(self) -> None:
        """Take the slots off the model, after the request that computes. The bank is of no use any more."""
        with self._passes:
            for _, layer, _ in self._layers():
                layer.slots = None

    def _hold(self, names: list[str]) -> dict[_Task, _Slot]:
        """Get a slot for each task, all at once or not yet; until they are given back they keep what is in them."""
        if len(names) > self.capacity:
            raise ValueError(
                f"The request has {len(names)} different tasks, but the bank holds {self.capacity} at a time. Split "
                "the batch, or make the bank with a larger capacity."
            )
        with self._changed:
            while True:
                tasks = [self._find(name) for name in names]
                held = {slot.task: slot for slot in self._slots if slot.task in tasks}
                idle = [slot for slot in self._slots if not slot.users and slot.task not in tasks]
                if len(tasks) <= len(held) + len(idle):
                    break
                self._changed.wait()
            idle.sort(key=lambda slot: slot.task is not None)  # empty ones first
            for task in tasks:
                if task not in held:
                    held[task] = idle.pop(0)
                    held[task].task, held[task].filled = task, False
                held[task].users += 1
                self._slots.remove(held[task])
                self._slots.append(held[task])
            return {task: held[task] for task in tasks}

    @torch.inference_mode(False)
    def _fill(self, slot: _Slot, task: _Task) -> None:
        """Copy a task's states into the slot that was got for it, unless that is done."""
        with slot.filling:
            if slot.filled:
                return
            try:
                states = task.read(values=not task.finite)
                task.finite = True
                for name, _, slots in self._layers():
                    state = slots.states[slot.index]
                    if name in states:
                        stored = states[name].to(state.device).restore()
                        learnt = states.get(f"{name}{_ALPHA}")
                        alpha = None if learnt is None else learnt.restore()
                        state.copy_(_effective_state(self._mixers[name], name, task.config, stored, alpha))
                    else:
                        state.zero_()
            except BaseException:
                with self._changed:
                    slot.task = None if slot.task is task else slot.task
                raise
            slot.filled = True

    def _route(self, tasks: Sequence[str], slots: dict[str, int]) -> None:
        """Say where each row of the next calls starts. Without a task in a slot they run the base model's own code."""
        if self._tuner.training:
            raise ValueError("StateBank is for inference; call model.eval() first.")
        self._layers()
        if slots and any(layer.disable_adapters for layer in self._all_layers()):
            raise ValueError(
                "The model's adapters are disabled, and with them the tasks of its StateBank. Use the bank outside of "
                "disable_adapter(), or call enable_adapter_layers(); rows of the base model are '__base__'."
            )
        rows = [slots.get(name, self.capacity) for name in tasks] if slots else []
        for layer in self._all_layers():
            # A layer without slots was tuned since the bank was made, by an adapter that is none of the rows'.
            here, device = (rows, layer.slots.states.device) if layer.slots is not None else ([], None)
            layer.row_slots = torch.tensor(here, dtype=torch.long, device=device)
        self._tuner._bank_rows = [BASE] * len(tasks)

    def _unroute(self) -> None:
        self._tuner._bank_rows = None
        for layer in self._all_layers():
            layer.row_slots = None

    def _all_layers(self) -> list[S0Layer]:
        # Without a walk over all modules of the model, which a server would do for every token.
        return self._tuner._routing.layers

    def _layers(self) -> list[tuple[str, S0Layer, Slots]]:
        layers = [(name, layer_of(mixer)) for name, mixer in self._mixers.items() if has_layer(mixer)]
        found = [(name, layer, layer.slots) for name, layer in layers if layer.slots is not None]
        if len(found) < len(self._mixers):
            raise RuntimeError("The StateBank was closed, or its model was unloaded; make a new one.")
        return found

    def _find(self, name: str) -> _Task:
        if name not in self._tasks:
            raise UnknownTaskError(
                f"StateBank: unknown task {name!r}, which is none of the {len(self)} in the bank; add() it."
            )
        return self._tasks[name]


@dataclass(eq=False)
class _Task:
    """An adapter's file and what is known of it."""

    name: str
    config: S0Config
    file: Path
    shapes: dict[str, tuple[int, ...]]  # of the stored states, by the mixers' names, and of alphas that were learnt
    states: dict[str, Stored] | None = None  # where the host is the CPU
    finite: bool = False

    def __post_init__(self) -> None:
        self.stamp = self._stamp()

    def _stamp(self) -> tuple[int, int, int]:
        stat = self.file.stat()
        return stat.st_ino, stat.st_size, stat.st_mtime_ns

    def read(self, values: bool) -> dict[str, Stored]:
        """The stored states by their mixers' names; from a file they are mapped, so that reading them is what reads it.

        Args:
            values: look for NaN and infinity.

        Raises:
            ValueError: if they do not fit, or the file was changed since it was added; the message names task and file.
        """
        if self.states is not None:
            return self.states
        try:
            check_readable(self.file)
            states = {}
            with safe_open(self.file, framework="pt") as file:
                tensors = group({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - no dict
            for name, stored in tensors.items():
                if not name.endswith((_STATE, _ALPHA)):
                    raise ValueError(f"It holds '{name}' beside its states, which a bank cannot serve.")
                states[name.removeprefix("base_model.model.").removesuffix(_STATE)] = stored
            if self._stamp() != self.stamp:
                raise ValueError("The file was changed since it was added. Remove the task and add it again.")
            own = match_names(states, self.shapes)
            states = {own[name]: state for name, state in states.items()}
            check_fit(self.shapes, {name: stored.outline for name, stored in states.items()}, values=False)
            if values:
                for name, stored in states.items():
                    check_finite(name, stored.restore())
        except (ValueError, OSError) as error:
            raise ValueError(f"Task '{self.name}', file '{self.file}': {error}") from error
        return states


@dataclass(eq=False)
class _Slot:
    """A place for one task in the slots of every layer."""

    index: int
    task: _Task | None = None
    users: int = 0  # requests that hold it
    filled: bool = False
    filling: threading.Lock = field(default_factory=threading.Lock)


_STATE, _ALPHA = f".{CHILD}.s0_state.weight", f".{CHILD}.s0_alpha.weight"


def _effective_state(mixer: nn.Module, name: str, config: S0Config, stored: Tensor, alpha: Tensor | None) -> Tensor:
    """What sequences start from in a mixer of this name whose only adapter has this config, state and learnt alpha."""
    layer = S0Layer(mixer, layer_of(mixer).declaration).eval()
    set_alpha_keys("task", config, {name: layer})
    layer.update_layer("task", config, torch.device("meta"))
    for kind, learnt in layer.learnt_tensors("task").items():
        value = stored if kind == "s0_state" else alpha
        assert value is not None, "the file was compared with what its config says"
        learnt.weight = nn.Parameter(value.to(stored.device), requires_grad=False)
        # Its values were looked at when the file was read.
        learnt.replaced = False
    return layer.effective_state("task")
