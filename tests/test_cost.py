"""What S0 costs, counted and not timed: a decoded token runs the base model's own code, a switch touches states."""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, MAIN, Architecture, mixers
from peft import inject_adapter_in_model
from peft.tuners.tuners_utils import set_adapter
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from tuned import Tuned, tune

from peft_s0 import S0Config, S0Layer
from peft_s0.injection import Watched

# Python functions that may run for each recurrent layer and once a step, beside the base model's own. A layer has the
# two hooks on its mixer, with what torch's modules do to call hooks.
A_LAYER, ONCE = 25, 40
# Operations for each layer where S0 has to look at values: at positions or the state itself, to know whether a call
# continues a sequence, and at the mask where a model also shows it to its mixers in decoding.
LOOKS = {"recurrent_gemma": 3, "xlstm": 2, "glm5_next": 17}


@pytest.fixture(params=ARCHITECTURES, ids=lambda architecture: architecture.name)
def architecture(request: pytest.FixtureRequest) -> Architecture:
    return request.param


class Operations(TorchDispatchMode):
    """Notes every operation on tensors that runs inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@contextmanager
def counting() -> Iterator[list[str]]:
    """The names of the Python functions that are called inside it."""
    called: list[str] = []

    def note(frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            called.append(frame.f_code.co_qualname if hasattr(frame.f_code, "co_qualname") else frame.f_code.co_name)

    # No callback of the collector, such as hypothesis has, nor of a model that happens to be collected here.
    gc.collect()
    gc.disable()
    sys.setprofile(note)
    try:
        yield called
    finally:
        sys.setprofile(None)
        gc.enable()


@torch.no_grad()
def step(model: nn.Module, architecture: Architecture, ids: Tensor) -> Callable[[], object]:
    """A function that decodes one token behind a prompt."""
    cache = architecture.make_cache(model.config, len(ids))
    model(ids, use_cache=True, **{architecture.cache: cache})
    arguments = {architecture.cache: cache, "use_cache": True}
    # Whatever is looked up once in a process was, in the step before.
    model(ids[:, :1], **arguments)
    return torch.no_grad()(lambda: model(ids[:, :1], **arguments))


def test_the_operations_of_a_step_are_those_of_the_base_model(architecture: Architecture) -> None:
    # States of zero, so that whatever depends on values, such as the choice of experts, is the same.
    tuned = tune(architecture, init_weights=0.0)
    ids, seen = tuned.ids(2, 8), []
    for model in (tuned.base, tuned.model.get_base_model()):
        run = step(model, architecture, ids)
        with Operations() as operations:
            run()
        seen.append(operations.seen)
    base, with_s0 = seen
    if architecture.name in LOOKS:
        assert not Counter(base) - Counter(with_s0)
        assert 0 < len(with_s0) - len(base) <= LOOKS[architecture.name] * architecture.states
    else:
        assert with_s0 == base


def test_the_python_calls_of_a_step(tuned: Tuned) -> None:
    ids, counts = tuned.ids(2, 8), []
    for model in (tuned.base, tuned.model.get_base_model()):
        run = step(model, tuned.architecture, ids)
        with counting() as called:
            run()
        counts.append(len(called))
    base, with_s0 = counts
    # Where the mask is looked at, the call is prepared as at the start of a sequence, with taps.
    a_layer = 6 * A_LAYER if tuned.architecture.name == "glm5_next" else A_LAYER
    assert 0 < with_s0 - base <= tuned.architecture.states * a_layer + ONCE


@pytest.mark.parametrize("architecture", MAIN, ids=lambda architecture: architecture.name)
@torch.no_grad()
def test_a_layer_whose_past_is_gone_starts_again(tuned: Tuned, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step is known beforehand to have nothing to do only where it has nothing to do in any layer."""
    ids, make = tuned.ids(2, 8), partial(tuned.architecture.make_cache, tuned.model.config, 2)
    layer, note = mixers(tuned.model)[-1].layer_idx, Watched.note_idle
    noted: list[bool] = []

    def noting(self: Watched, arguments: dict[str, Any]) -> None:
        note(self, arguments)
        noted.append(self.routing.idle_on is not None)

    def steps() -> tuple[Tensor, Tensor]:
        cache = make()
        call = partial(tuned.model, **{tuned.architecture.cache: cache}, use_cache=True)
        call(ids)
        whole = call(ids[:, :1]).logits
        cache.layers[layer] = make().layers[layer]
        return whole, call(ids[:, 1:2]).logits

    monkeypatch.setattr(Watched, "note_idle", noting)
    whole, missing = steps()
    assert noted == [True, False]
    monkeypatch.setattr(Watched, "note_idle", lambda self, arguments: None)
    asked_each, asked_each_missing = steps()
    assert torch.equal(whole, asked_each)
    assert torch.equal(missing, asked_each_missing)


def test_the_python_calls_of_a_switch(tuned: Tuned) -> None:
    """Whatever the number of adapters that are loaded."""
    model, counts = tuned.model, []
    for loaded in (2, 12):
        while len(model.peft_config) < loaded:
            model.add_adapter(f"task-{len(model.peft_config)}", S0Config(init_weights=1.0))
        model.set_adapter("default")
        with counting() as called:
            model.set_adapter("task-1")
        counts.append(len(called))
    # A walk over the modules of the model would be more than ten for each layer.
    assert counts[0] <= 8 * tuned.architecture.states + 40
    assert counts[1] == counts[0]


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_a_switch_does_what_peft_does() -> None:
    """Also through a second tuner of the same model, and after adapters have come and gone."""
    tuned = tune(MAIN[0])
    model = tuned.model
    inject_adapter_in_model(S0Config(init_weights=1.0), model.get_base_model(), "injected")
    with pytest.raises(ValueError, match="rank"):
        model.add_adapter("refused", S0Config(rank=1000))
    model.add_adapter("other", S0Config(init_weights=1.0))
    model.add_adapter("gone", S0Config(init_weights=1.0))
    model.delete_adapter("gone")
    for names, inference_mode in ((["injected"], False), (["other"], True), (["default", "other"], False)):
        seen = []
        for switch in (model.base_model.set_adapter, partial(set_adapter, model.get_base_model())):
            model.base_model.set_adapter("default")
            # One that somebody has let learn beside the active one is frozen again.
            model.base_model.set_requires_grad("other")
            switch(names, inference_mode=inference_mode)
            layers = [module for module in model.modules() if isinstance(module, S0Layer)]
            assert [layer.active_adapters for layer in layers] == [names] * len(layers)
            seen.append({name for name, parameter in model.named_parameters() if parameter.requires_grad})
        assert seen[0] == seen[1]
