"""Compiled models: one graph for a prefill and one for all decoding steps, with the results of the uncompiled model."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from architectures import ARCHITECTURES, MAIN, Architecture, mixers
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from test_law import left_pad, packed_arguments
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import StaticCache
from tuned import Tuned, tune

from peft_s0 import S0Config
from peft_s0.taps import Tap

pytestmark = pytest.mark.filterwarnings(
    # From inside of torch and transformers.
    "ignore:.*is_gradient_checkpointing:FutureWarning",
    "ignore:.*torch.jit.script:DeprecationWarning",
)


@pytest.fixture
def architecture(architecture: Architecture) -> Architecture:
    return architecture.shallow(1)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled(model: nn.Module, backend: str = "aot_eager", fullgraph: bool = True) -> Callable:
    """The whole PeftModel, compiled; a break in the graph is an error."""
    return torch.compile(model, backend=backend, fullgraph=fullgraph, dynamic=False)


class Recorder:
    """A backend that runs what it is given as it is, and keeps the graphs."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.Graph] = []

    def __call__(self, module: torch.fx.GraphModule, inputs: object) -> Callable:
        self.graphs.append(module.graph)
        return module.forward


def written_out(graph: torch.fx.Graph) -> tuple[set[str], list[object]]:
    """What a graph is made from, by names in the base model, and what it does with that, line by line."""
    # The wrappers around the base model, as the source of each tensor spells them.
    wrappers = {"dict_modules_base_model_dict_modules_model_modules_": "modules_"}
    # transformers' decorators hand on what they are given.
    wrappers |= {"L_args_0_": "L_self_", "L_kwargs_": "L_"}
    names: dict[torch.fx.Node, str] = {}
    inputs, lines = set(), []
    for node in graph.nodes:
        if node.op == "placeholder":
            names[node] = str(node.target)
            for wrapped, plain in wrappers.items():
                names[node] = names[node].replace(wrapped, plain)
            inputs.add(names[node])
        else:
            names[node] = f"line {len(lines)}"
            arguments = torch.fx.map_arg((node.args, node.kwargs), names.__getitem__)
            lines.append((node.op, node.target, arguments))
    return inputs, lines


def graphs() -> int:
    """How many graphs were compiled so far."""
    return counters["stats"]["unique_graphs"]


@torch.no_grad()
def test_prefill_and_decode(tuned: Tuned) -> None:
    """32 steps on a static cache without a recompilation; then the next sequence on the same cache."""
    model, cache = compiled(tuned.model), StaticCache(config=tuned.model.config, max_cache_len=48)
    for seed in (1, 2):
        ids = tuned.ids(2, 40, seed)
        positions = torch.arange(40).expand(2, -1)

        def run(part: slice, ids: Tensor = ids, positions: Tensor = positions) -> Tensor:
            call = {"position_ids": positions[:, part], tuned.architecture.cache: cache}
            return model(ids[:, part], use_cache=True, **call).logits

        logits = [run(slice(0, 7))]
        # transformers' cache makes its tensors in the first prefill, and finds them in the second.
        prefills = seed
        logits += [run(slice(i, i + 1)) for i in range(7, 40)]
        assert graphs() == prefills + 1
        tuned.assert_equal(torch.cat(logits, dim=1), tuned.expected(ids), tuned.effect(ids))
        cache.reset()


@torch.no_grad()
def test_the_graph_of_a_step_is_the_base_models(tuned: Tuned) -> None:
    """What is compiled for decoding is the same to the last operation, and made from the same tensors: no state."""
    ids, positions, found = tuned.ids(2, 9), torch.arange(9).expand(2, -1), []
    for model in (tuned.base, tuned.model):
        recorder, cache = Recorder(), StaticCache(config=tuned.model.config, max_cache_len=16)
        run = torch.compile(model, backend=recorder, fullgraph=True, dynamic=False)
        for part in (slice(0, 7), slice(7, 8), slice(8, 9)):
            call = {"input_ids": ids[:, part], "position_ids": positions[:, part], tuned.architecture.cache: cache}
            run(**call, use_cache=True)
        prefill, step = (written_out(graph) for graph in recorder.graphs)
        found.append((prefill, step))
        torch._dynamo.reset()
    (base_prefill, base), (prefill, with_s0) = found
    assert with_s0 == base
    # That a difference would be seen: of a prefill the states are a part.
    assert prefill != base_prefill
    assert {name for name in prefill[0] - base_prefill[0] if "s0_state" in name}


@torch.no_grad()
def test_padded_prefill(tuned: Tuned) -> None:
    rows = [tuned.ids(1, 9)[0], tuned.ids(1, 5)[0]]
    ids, mask, positions = left_pad(rows)
    arguments = {"attention_mask": mask, "position_ids": positions}
    logits = compiled(tuned.model)(ids, **arguments).logits
    torch.testing.assert_close(logits, tuned.model(ids, **arguments).logits, atol=1e-6, rtol=0)
    for i, row in enumerate(rows):
        tuned.assert_equal(logits[i : i + 1][:, mask[i].bool()], tuned.expected(row[None]), tuned.effect(row[None]))
    assert graphs() == 1


def test_train_step(architecture: Architecture) -> None:
    """The same gradients, with the penalty in them, of a model that never ran uncompiled."""
    gradients = []
    for use in (compiled, lambda model: model):
        torch.manual_seed(1)
        model = get_peft_model(architecture.build(), S0Config(init_weights=1.0, alpha=0.7, l2_lambda=0.25)).train()
        ids = torch.arange(3, 17).view(2, 7)
        use(model)(ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert len(gradients[1]) == architecture.states
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], gradient, atol=1e-6, rtol=1e-5)
    assert graphs() == 1


# Not monkeypatch, which takes the setting away for good when it undoes this.
@torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True)
def test_train_step_under_checkpointing(architecture: Architecture) -> None:
    """One graph, if torch may leave out in recomputation what is undone in it anyway; the same gradients."""
    gradients = []
    for use in (partial(compiled, backend="eager"), lambda model: model):
        torch.manual_seed(1)
        model = get_peft_model(architecture.build(), S0Config(init_weights=1.0, alpha=0.7)).train()
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        # PEFT has a hook there that breaks the graph with any adapter.
        model.get_base_model().disable_input_require_grads()
        ids, mask, _ = left_pad([torch.arange(3, 10), torch.arange(10, 14)])
        use(model)(ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], gradient, atol=1e-6, rtol=1e-5)
    assert graphs() == 1


@torch.no_grad()
def test_a_compiled_model_follows(tuned: Tuned) -> None:
    """Whatever is switched or written after compilation; what was compiled once is found again."""
    torch.manual_seed(1)
    tuned.model.add_adapter("second", S0Config(alpha=0.6, init_weights=1.0))
    tuned.model.set_adapter("default")
    ids, model, seen = tuned.ids(2, 9), compiled(tuned.model, backend="eager"), []

    def check(recompiled: bool, **arguments: object) -> Tensor:
        before = graphs()
        logits = model(ids, use_cache=False, **arguments).logits
        assert torch.equal(logits, tuned.model(ids, use_cache=False, **arguments).logits)
        assert graphs() == before + recompiled
        return logits

    seen.append(check(recompiled=True))
    tuned.model.set_adapter("second")
    seen.append(check(recompiled=True))
    tuned.model.set_adapter("default")
    assert torch.equal(check(recompiled=False), seen[0])
    for layer in tuned.model.base_model.tuner_layers():
        layer.s0_state["default"].weight.mul_(-1)
    seen.append(check(recompiled=False))
    set_peft_model_state_dict(tuned.model, get_peft_model_state_dict(tune(tuned.architecture, seed=3).model))
    seen.append(check(recompiled=False))
    with tuned.model.disable_adapter():
        seen.append(check(recompiled=True))
    assert torch.equal(seen[-1], tuned.base(ids, use_cache=False).logits)
    assert torch.equal(check(recompiled=False), seen[-2])
    with tuned.model.disable_adapter():
        check(recompiled=False)
    tuned.model.peft_config["default"].alpha = 0.3
    seen.append(check(recompiled=True))
    rows = check(recompiled=True, adapter_names=["__base__", "second"])
    assert torch.equal(rows[0], seen[-2][0])
    assert torch.equal(rows[1], seen[1][1])
    assert len({float(logits.sum()) for logits in seen}) == len(seen)


@torch.no_grad()
def test_an_adapter_that_was_loaded(tuned: Tuned, tmp_path: Path) -> None:
    """One graph, also where nothing ran before it was compiled."""
    tuned.model.save_pretrained(tmp_path)
    loaded, ids = PeftModel.from_pretrained(tuned.architecture.build(), tmp_path), tuned.ids(2, 9)
    assert torch.equal(compiled(loaded, backend="eager")(ids, use_cache=False).logits, tuned.model(ids).logits)
    assert graphs() == 1


@torch.no_grad()
def test_importing_compiles_nothing_again(tuned: Tuned, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was compiled does not depend on which modules a process has imported since."""
    ids, model = tuned.ids(2, 9), compiled(tuned.model, backend="eager")
    model(ids, use_cache=False)
    monkeypatch.setitem(sys.modules, "imported_later", ModuleType("imported_later"))
    model(ids, use_cache=False)
    assert graphs() == 1


@torch.no_grad()
def test_packed_rows(tuned: Tuned) -> None:
    """Positions alone cannot tell a compiled model how many documents there are: it says so. With their lengths it is
    exact, in several graphs."""
    rows = [tuned.ids(1, 6)[0], tuned.ids(1, 8, seed=1)[0]]
    ids, arguments = torch.cat(rows)[None], packed_arguments([6, 8])
    with pytest.raises(RuntimeError, match="A compiled model cannot find the documents from positions alone"):
        compiled(tuned.model)(ids, position_ids=arguments["position_ids"], use_cache=False)
    torch._dynamo.reset()
    logits = compiled(tuned.model, backend="eager", fullgraph=False)(ids, use_cache=False, **arguments).logits
    for row, actual in zip(rows, logits.split([6, 8], dim=1), strict=True):
        tuned.assert_equal(actual, tuned.expected(row[None]), tuned.effect(row[None]))


@pytest.mark.parametrize("architecture", MAIN[1:], ids=lambda row: row.name)
@torch.no_grad()
def test_mixers_compiled_one_by_one(tuned: Tuned) -> None:
    """Also when torch goes on uncompiled with a part of their call, which it has compiled too often for its limit."""
    whole = copy.deepcopy(tuned.model)
    for mixer in mixers(tuned.model):
        mixer.compile(backend="eager")
    with torch._dynamo.config.patch(recompile_limit=2):
        for longest in range(9, 14):
            ids, mask, _ = left_pad([tuned.ids(1, length)[0] for length in range(longest, 5, -2)])
            found, expected = (model(ids, attention_mask=mask).logits for model in (tuned.model, whole))
            torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=1e-6, rtol=0)
            assert not any(layer.calls for layer in tuned.model.base_model.tuner_layers())
            assert not any(isinstance(module, Tap) for module in tuned.model.modules())


@pytest.mark.parametrize("name", ["mamba", "recurrent_gemma"])
@pytest.mark.filterwarnings(
    # Of how transformers is written.
    "ignore:Dynamo detected a call to a `functools.lru_cache`-wrapped function:UserWarning",
    "ignore:.*torch.autograd.function.Function:DeprecationWarning",
)
@torch.no_grad()
def test_a_layer_compiled_alone(name: str) -> None:
    """Documents and pads, of which the model around it, that is not compiled, must tell its mixer."""
    tuned = tune(next(row for row in ARCHITECTURES if row.name == name))
    whole = copy.deepcopy(tuned.model)
    next(m for m in tuned.model.modules() if isinstance(m, nn.ModuleList))[0].compile(backend="eager")
    rows = [tuned.ids(1, 9)[0], tuned.ids(1, 4, seed=1)[0]]
    ids, mask, _ = left_pad(rows)
    packed = {"input_ids": torch.cat(rows)[None], **packed_arguments([9, 4])}
    arguments = packed if name == "mamba" else {"input_ids": ids, "attention_mask": mask}
    there = slice(None) if name == "mamba" else mask.bool()
    found, expected = (model(use_cache=False, **arguments).logits[there] for model in (tuned.model, whole))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_after_an_export(tuned: Tuned) -> None:
    """torch.export puts other dicts of parameters into modules: a model can still be switched, trained and copied."""
    tuned.model.add_adapter("second", S0Config(alpha=0.6))
    tuned.model.set_adapter("default")
    ids, other = tuned.ids(2, 9), tuned.ids(2, 9, seed=1)
    program = torch.export.export(tuned.model, (ids,), {"use_cache": False}).module()
    tuned.assert_equal(program(other, use_cache=False).logits, tuned.expected(other), tuned.effect(other))
    tuned.model.set_adapter("second")
    learning = [name for name, parameter in tuned.model.named_parameters() if parameter.requires_grad]
    assert learning
    assert all(".second." in name for name in learning)
    copied = copy.deepcopy(tuned.model)
    copied.set_adapter("default")
    tuned.assert_equal(copied(ids, use_cache=False).logits, tuned.expected(ids), tuned.effect(ids))
