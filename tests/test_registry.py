"""S0 as a member of PEFT's registry."""

from __future__ import annotations

import copy
import importlib
import pickle
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from architectures import ARCHITECTURES
from peft import PeftConfig, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from torch import nn

import peft_s0
from peft_s0 import Family, Gate, Mixer, S0Config, S0Model, register_mixer
from peft_s0.mixers.base import _MIXERS, find_mixer
from peft_s0.registry import register


def test_member_of_the_enum() -> None:
    member = PeftType("S0")
    assert member is PeftType.S0 is PeftType["S0"]
    assert isinstance(member, PeftType)
    assert (member.name, member.value, str.__str__(member)) == ("S0", "S0", "S0")
    assert member in PeftType
    assert "S0" in [str(item.value) for item in PeftType]
    assert list(PeftType).count(member) == 1
    assert repr(member) == "<PeftType.S0: 'S0'>"


def test_member_survives_copies() -> None:
    member = PeftType("S0")
    assert pickle.loads(pickle.dumps(member)) is member
    assert copy.deepcopy(member) is member
    assert pickle.loads(pickle.dumps(S0Config())).peft_type is member


def test_mappings() -> None:
    member = PeftType("S0")
    assert PEFT_TYPE_TO_CONFIG_MAPPING[member] is S0Config
    assert PEFT_TYPE_TO_TUNER_MAPPING[member] is S0Model
    assert PEFT_TYPE_TO_PREFIX_MAPPING[member] == "s0_"


def test_registering_again_changes_nothing() -> None:
    members = list(PeftType)
    register()
    importlib.import_module("peft_s0")
    assert list(PeftType) == members


def test_steps_aside_for_a_method_of_pefts_own(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(PeftConfig):
        pass

    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, PeftType("S0"), Other)
    with pytest.warns(UserWarning, match="PEFT already has a method 'S0'.*Other"):
        register()
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType("S0")] is Other


def test_import_touches_nothing_else() -> None:
    """Importing the package changes no function of PEFT or transformers, and nothing in the enum but one member."""
    script = """
import inspect, sys
import peft, transformers.cache_utils, peft.tuners.tuners_utils as tuners, peft.peft_model as models
modules = [transformers.cache_utils, tuners, models, peft.config]
def functions():
    found = {}
    for module in modules:
        for name, thing in vars(module).items():
            found[module.__name__, name] = id(thing)
            if inspect.isclass(thing):
                found.update({(module.__name__, name, key): id(value) for key, value in vars(thing).items()
                              if callable(value) or isinstance(value, (property, classmethod, staticmethod))})
    return found
before, members = functions(), set(peft.PeftType.__members__)
import peft_s0
assert functions() == before
assert set(peft.PeftType.__members__) - members == {"S0"}
"""
    subprocess.run([sys.executable, "-c", script], check=True)


class _Recurrence(nn.Module):
    """A minimal mixer of someone else's: S_t = g_t S_{t-1} + x_t, read out by a projection."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.layer_idx = 0
        self.size = size
        self.gate = nn.Linear(size, 1)
        self.out = nn.Linear(size, size)

    def forward(self, hidden_states, cache_params=None, attention_mask=None):
        state = torch.zeros(hidden_states.shape[0], 1, self.size)
        if cache_params is not None:
            cache_params.get_conv_state(self.layer_idx, state_idx=0)
            state = cache_params.get_recurrent_state(self.layer_idx)
        if attention_mask is not None:
            hidden_states = hidden_states * attention_mask[..., None]
        decay, outputs = torch.sigmoid(self.gate(hidden_states)), []
        for t in range(hidden_states.shape[1]):
            state = decay[:, t : t + 1] * state + hidden_states[:, t : t + 1]
            outputs.append(self.out(state))
        return torch.cat(outputs, dim=1)


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixer = _Recurrence(6)

    def forward(self, x, attention_mask=None):
        return self.mixer(x, attention_mask=attention_mask)


def test_a_mixer_of_someone_elses_can_be_registered() -> None:
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="no recurrent layers"):
        get_peft_model(_Model(), S0Config())
    path = f"{__name__}._Recurrence"
    register_mixer(
        Mixer(
            path=path,
            family=Family("leaky sum", alpha=0.5),
            state_shape=lambda mixer: (1, mixer.size),
            gates=(Gate("gate", frozen=1e4),),
        )
    )
    try:
        model = get_peft_model(_Model(), S0Config(init_weights=1.0))
        assert model.peft_config["default"].alpha == 0.5
        with torch.no_grad():
            x = torch.randn(1, 5, 6)
            padded, mask = torch.cat([torch.zeros(1, 3, 6), x], dim=1), torch.tensor([[0] * 3 + [1] * 5])
            actual = model(padded, attention_mask=mask)[:, 3:]
            torch.testing.assert_close(actual, model(x), atol=1e-6, rtol=0)
            with model.disable_adapter():
                assert (actual - model(x)).abs().max() > 0.1
        # Pickled models name their mixers; a process that never registered it is told so.
        declaration = pickle.dumps(find_mixer(_Recurrence))
        assert pickle.loads(declaration) is find_mixer(_Recurrence)
    finally:
        del _MIXERS[path]
    with pytest.raises(ValueError, match=f"No recurrent mixer '{path}' is registered"):
        pickle.loads(declaration)


class _OtherCache(_Recurrence):
    def forward(self, hidden_states, memory=None, attention_mask=None):
        return super().forward(hidden_states, memory, attention_mask)


def test_a_cache_of_an_unknown_name() -> None:
    """A sequence that goes on could not be told from a new one."""
    declared = Mixer(f"{__name__}._OtherCache", Family("leaky sum", alpha=0.5), lambda mixer: (1, mixer.size))
    model = _Model()
    model.mixer = _OtherCache(6)
    before = list(model.state_dict())
    try:
        register_mixer(declared)
        with pytest.raises(
            TypeError, match=r"_OtherCache takes its cache: expected cache or .*found hidden_states, me"
        ):
            get_peft_model(model, S0Config())
        assert list(model.state_dict()) == before
        register_mixer(replace(declared, cache_argument="memories"))
        # Where forward takes further arguments, a sequence would start from nothing, and nobody would say so.
        with pytest.raises(
            TypeError, match=r"expected memories among the arguments of its forward, found hidden_states, me"
        ):
            get_peft_model(model, S0Config())
        register_mixer(replace(declared, cache_argument="memory"))
        layer = next(get_peft_model(model, S0Config()).base_model.tuner_layers())
        assert layer.cache_argument == "memory"
    finally:
        del _MIXERS[declared.path]


def test_public_names() -> None:
    assert all(hasattr(peft_s0, name) for name in peft_s0.__all__)
    for declaration in peft_s0.registered_mixers():
        module, _, name = declaration.path.rpartition(".")
        if not module.startswith("transformers."):
            continue  # not installed here; the kernels' tests have them
        assert issubclass(getattr(importlib.import_module(module), name), nn.Module)
    assert {architecture.name for architecture in ARCHITECTURES}
