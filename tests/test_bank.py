"""Many tasks on one model through a bank: exact, bounded, safe to share between threads."""

from __future__ import annotations

import copy
import random
import re
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, Architecture
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file
from test_errors import BAD_FILES, change_states
from test_law import left_pad
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from tuned import tune

from peft_s0 import S0Config, S0Layer, StateBank
from peft_s0.mixers import cache_of

# Six tasks that differ in all that a task may differ in.
TASKS: dict[str, dict] = {
    "plain": {},
    "strong": {"alpha": 1.3},
    "normalised": {"alpha": 9.0, "normalize": True, "train_alpha": 1.0},
    "low-rank": {"rank": 2},
    "one-layer": {"layers_to_transform": [1]},
    "half": {},
}


@pytest.fixture(autouse=True, scope="module")
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def to_bfloat16(states: dict[str, Tensor]) -> None:
    states.update({name: state.bfloat16() for name, state in states.items()})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with the tasks' adapters for each architecture."""
    folders = {}
    for architecture in ARCHITECTURES[:2]:
        folders[architecture.name] = tmp_path_factory.mktemp(architecture.name)
        for seed, (name, config) in enumerate(TASKS.items(), 1):
            base = architecture.build()
            torch.manual_seed(seed)
            model = get_peft_model(base, S0Config(**{"alpha": 0.7, "init_weights": 1.0, **config}))
            model.save_pretrained(folders[architecture.name] / name)
        change_states(folders[architecture.name] / "half", to_bfloat16)
    return folders


@pytest.fixture
def folder(architecture: Architecture, saved: dict[str, Path]) -> Path:
    return saved[architecture.name]


class Served:
    """A model with an adapter of its own and a bank."""

    def __init__(self, architecture: Architecture, folder: Path, capacity: int = 6, **arguments) -> None:
        self.tuned = tune(architecture)
        self.architecture, self.folder, self.model, self.base = architecture, folder, self.tuned.model, self.tuned.base
        self.bank = StateBank(self.model, capacity, **arguments)
        for name in TASKS:
            self.bank.add(name, folder / name)

    def alone(self, name: str) -> PeftModel | PreTrainedModel:
        """The model with this task's adapter and no other."""
        return (
            self.base
            if name == "__base__"
            else PeftModel.from_pretrained(self.architecture.build(), self.folder / name)
        )


@pytest.fixture
def served(architecture: Architecture, folder: Path) -> Served:
    return Served(architecture, folder, capacity=3)


def layers(model: nn.Module) -> list[S0Layer]:
    return [module for module in model.modules() if isinstance(module, S0Layer)]


def slots(model: nn.Module) -> list[Tensor]:
    return [layer.slots.states for layer in layers(model)]


@pytest.mark.parametrize("host", ["disk", "cpu"])
def test_each_task_is_the_adapter_loaded_alone(architecture: Architecture, folder: Path, host: str) -> None:
    """To the last bit, also in a slot that another task had, with padded rows and in beams."""
    served = Served(architecture, folder, capacity=1, host=host)
    ids, mask, positions = left_pad([served.tuned.ids(1, n, seed=n)[0] for n in (9, 4)])
    arguments = {"attention_mask": mask, "position_ids": positions}
    beams = {"attention_mask": mask, "num_beams": 2, "num_return_sequences": 2, "max_new_tokens": 4, "do_sample": False}
    seen = []
    for name in (*TASKS, "__base__", "one-layer", "plain"):
        alone = served.alone(name)
        logits = served.bank(ids, tasks=[name] * 2, **arguments).logits
        assert torch.equal(logits, alone(ids, **arguments).logits)
        tokens = served.bank.generate(input_ids=ids, tasks=[name] * 2, **beams)
        assert torch.equal(tokens, alone.generate(input_ids=ids, **beams))
        seen.append(logits)
    for i, logits in enumerate(seen[:7]):
        assert all((logits - other).abs().max() > 0.3 for other in seen[:i]), "two tasks that cannot be told apart"


def test_a_task_for_each_row(architecture: Architecture, folder: Path) -> None:
    served = Served(architecture, folder)
    names = ["strong", "__base__", "low-rank", "normalised", "one-layer", "strong"]
    ids, mask, positions = left_pad([served.tuned.ids(1, n, seed=n)[0] for n in (9, 4, 7, 2, 6, 5)])
    arguments = {"attention_mask": mask, "position_ids": positions}
    logits = served.bank(ids, tasks=names, **arguments).logits
    for i, name in enumerate(names):
        expected = served.alone(name)(ids, **arguments).logits[i]
        torch.testing.assert_close(logits[i], expected, atol=2e-6, rtol=0)
    assert torch.equal(logits[1], served.base(ids, **arguments).logits[1])
    served.model.load_adapter(folder / "strong", "strong")
    adapters = [name if name == "strong" else "__base__" for name in names]
    beams = {"attention_mask": mask, "num_beams": 2, "num_return_sequences": 2, "max_new_tokens": 4, "do_sample": False}
    tokens = served.bank.generate(ids, tasks=names, **beams).view(6, 2, -1)
    expected = served.model.generate(ids, adapter_names=adapters, **beams).view(6, 2, -1)
    for i in (0, 1, 5):
        assert torch.equal(tokens[i], expected[i])


def test_rows_of_the_base_model_alone(served: Served) -> None:
    """The base model's own code, whatever adapter is active."""
    for tokens in (1, 9):
        ids = served.tuned.ids(2, tokens)
        assert torch.equal(served.bank(ids, tasks=["__base__"] * 2).logits, served.base(ids).logits)
    with served.bank.use(["__base__"]):
        assert not any(layer.participates for layer in layers(served.model))
    with served.bank.use(["plain"]):
        assert all(layer.participates for layer in layers(served.model))


def test_calls_of_the_inner_model(served: Served) -> None:
    """As of a library that looks for the model below PEFT's."""
    inner, ids = served.model.get_base_model(), served.tuned.ids(2, 9)
    for name in ("plain", "__base__"):
        with served.bank.use([name] * 2):
            assert torch.equal(inner(ids).logits, served.alone(name)(ids).logits)


def test_the_least_recently_used_leaves(served: Served) -> None:
    ids, bank = served.tuned.ids(2, 5), served.bank
    assert bank.resident == []
    for tasks, resident in [
        (["plain", "strong"], ["plain", "strong"]),
        (["__base__", "half"], ["plain", "strong", "half"]),
        (["plain", "plain"], ["strong", "half", "plain"]),
        (["low-rank", "__base__"], ["half", "plain", "low-rank"]),
        (["half", "one-layer"], ["low-rank", "half", "one-layer"]),
        (["__base__", "__base__"], ["low-rank", "half", "one-layer"]),
    ]:
        bank(ids, tasks=tasks)
        assert bank.resident == resident
    bank.remove("half")
    assert bank.resident == ["low-rank", "one-layer"]
    bank(ids, tasks=["plain", "__base__"])  # into the empty slot, nobody leaves
    assert bank.resident == ["low-rank", "one-layer", "plain"]


def test_a_task_that_stays_is_not_loaded_again(served: Served) -> None:
    ids = served.tuned.ids(1, 5)
    first = served.bank(ids, tasks=["plain"]).logits
    served.bank(ids, tasks=["strong"])
    versions = [states._version for states in slots(served.model)]
    assert torch.equal(served.bank(ids, tasks=["plain"]).logits, first)
    assert [states._version for states in slots(served.model)] == versions


def test_a_bank_is_a_collection_of_names(served: Served) -> None:
    bank = served.bank
    assert len(bank) == 6
    assert list(bank) == list(TASKS)
    assert "plain" in bank
    assert "__base__" not in bank
    bank.remove("plain")
    assert list(bank) == list(TASKS)[1:]
    with pytest.raises(ValueError, match="unknown task 'plain', which is none of the 5 in the bank"):
        bank.remove("plain")


def test_nothing_grows(served: Served) -> None:
    """Memory is taken once: no tensor, parameter or module more after many tasks than after none."""
    model, ids = served.model, served.tuned.ids(2, 5)

    def tensors() -> dict[str, tuple]:
        named = [*model.named_parameters(), *model.named_buffers()]
        return {name: (tensor.data_ptr(), tensor.shape, tensor.dtype, tensor.requires_grad) for name, tensor in named}

    before, modules = tensors(), [name for name, _ in model.named_modules()]
    for name in TASKS:
        served.bank(ids, tasks=[name, "plain"])
    assert tensors() == before
    assert [name for name, _ in model.named_modules()] == modules
    for layer in layers(model):
        assert layer.slots.states.shape == (3 + 1, *layer.state_shape)
        assert layer.slots.states.dtype == torch.float32
        assert not layer.slots.states[3].any()
        assert (layer.routing.rows, layer.row_slots) == (None, None)


def test_slots_are_neither_saved_nor_trained(served: Served, tmp_path: Path) -> None:
    untouched = tune(served.architecture).model
    served.bank(served.tuned.ids(2, 5), tasks=["plain", "strong"])
    assert served.model.state_dict().keys() == untouched.state_dict().keys()
    assert served.model.get_nb_trainable_parameters() == untouched.get_nb_trainable_parameters()
    served.model.save_pretrained(tmp_path / "with")
    untouched.save_pretrained(tmp_path / "without")
    files = [{path.relative_to(root) for path in root.rglob("*")} for root in (tmp_path / "with", tmp_path / "without")]
    assert files[0] == files[1]
    states = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("with", "without")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_the_model_is_as_it_was(served: Served) -> None:
    """Its weights, its own adapters, and switching between them."""
    model, ids = served.model, served.tuned.ids(2, 9)
    weights = {name: weight.clone() for name, weight in model.named_parameters()}
    expected = model(ids).logits
    for name in TASKS:
        served.bank(ids, tasks=[name, "__base__"])
        assert torch.equal(model(ids).logits, expected)
    assert all(torch.equal(weight, weights[name]) for name, weight in model.named_parameters())
    model.load_adapter(served.folder / "plain", "second")
    model.set_adapter("second")
    assert torch.equal(model(ids).logits, served.alone("plain")(ids).logits)
    assert torch.equal(model(ids, adapter_names=["default"] * 2).logits, expected)
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, served.base(ids).logits)
    assert torch.equal(served.bank(ids, tasks=["strong"] * 2).logits, served.alone("strong")(ids).logits)


def test_rows_of_a_task_have_the_base_models_head(architecture: Architecture, folder: Path) -> None:
    """Not the one that an adapter of the model has trained beside its states."""
    model = get_peft_model(architecture.build(), S0Config(init_weights=1.0, modules_to_save=["lm_head"])).eval()
    model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
    bank = StateBank(model, capacity=1)
    bank.add("plain", folder / "plain")
    alone, ids = PeftModel.from_pretrained(architecture.build(), folder / "plain"), tune(architecture).ids(2, 5)
    assert torch.equal(bank(ids, tasks=["plain"] * 2).logits, alone(ids).logits)


def test_beams_beside_an_adapter_with_a_head(architecture: Architecture, folder: Path) -> None:
    model = get_peft_model(architecture.build(), S0Config(init_weights=1.0, modules_to_save=["lm_head"])).eval()
    model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
    bank = StateBank(model, capacity=1)
    bank.add("plain", folder / "plain")
    alone, ids = PeftModel.from_pretrained(architecture.build(), folder / "plain"), tune(architecture).ids(2, 5)
    beams = {"num_beams": 2, "num_return_sequences": 2, "max_new_tokens": 4, "do_sample": False}
    expected = alone.generate(input_ids=ids, **beams)
    assert torch.equal(bank.generate(input_ids=ids, tasks=["plain"] * 2, **beams), expected)


def test_packed_rows(architecture: Architecture, folder: Path) -> None:
    """All documents of a packed row start from the row's task."""
    served = Served(architecture, folder)
    ids = torch.cat([served.tuned.ids(1, n, seed=n) for n in (5, 4)], dim=1)
    positions = torch.tensor([[*range(5), *range(4)]])
    expected = served.alone("plain")(ids, position_ids=positions, use_cache=False).logits
    actual = served.bank(ids, position_ids=positions, use_cache=False, tasks=["plain"]).logits
    assert torch.equal(actual, expected)
    assert not torch.equal(actual[0, 5:], served.alone("plain")(ids, use_cache=False).logits[0, 5:])


def test_layers_that_are_tuned_later(architecture: Architecture, folder: Path) -> None:
    """An adapter that adds layers to the model does not reach the rows of a bank that has no slots there."""
    model = get_peft_model(architecture.build(), S0Config(layers_to_transform=[1])).eval()
    bank = StateBank(model, capacity=1)
    with pytest.raises(ValueError, match=r"plain' tunes 'model\.layers\.0\.\w+', which no adapter of this model does"):
        bank.add("plain", folder / "plain")
    bank.add("one-layer", folder / "one-layer")
    model.add_adapter("all", S0Config(init_weights=1.0, alpha=1.0))
    model.set_adapter("all")
    alone, ids = PeftModel.from_pretrained(architecture.build(), folder / "one-layer"), tune(architecture).ids(2, 5)
    with bank.use(["one-layer"] * 2):
        assert torch.equal(model(ids).logits, alone(ids).logits)
        assert torch.equal(model.get_base_model()(ids).logits, alone(ids).logits)


def test_threads_get_what_they_get_alone(served: Served) -> None:
    """8 threads, 120 requests, 6 tasks, 3 slots and a task that comes and goes: bit-equal to one after another."""
    draw = random.Random(0)
    requests = [
        (served.tuned.ids(2, draw.randint(1, 6), seed=i), draw.choices([*TASKS, "__base__"], k=2)) for i in range(120)
    ]
    serial = [served.bank(ids, tasks=tasks).logits for ids, tasks in requests]
    assert len({tuple(logits.flatten()[:3].tolist()) for logits in serial}) > 80

    def serve(request: tuple[Tensor, list[str]]) -> Tensor:
        with torch.no_grad():
            return served.bank(request[0], tasks=request[1]).logits

    def come_and_go() -> None:
        for _ in range(20):
            served.bank.add("new", served.folder / "strong")
            assert torch.equal(serve((ids, ["new"] * 2)), strong)
            served.bank.remove("new")

    ids = served.tuned.ids(2, 5)
    strong = served.bank(ids, tasks=["strong"] * 2).logits
    with ThreadPoolExecutor(8) as pool:
        others = pool.submit(come_and_go)
        parallel = list(pool.map(serve, requests, timeout=120))
        others.result(timeout=120)
    assert all(torch.equal(*pair) for pair in zip(serial, parallel, strict=True))
    assert [slot.users for slot in served.bank._slots] == [0] * 3


def test_threads_generate(served: Served) -> None:
    requests = [(served.tuned.ids(2, 3 + i % 3, seed=i), [name, "__base__"]) for i, name in enumerate([*TASKS] * 3)]

    def serve(request: tuple[Tensor, list[str]]) -> Tensor:
        return served.bank.generate(request[0], tasks=request[1], max_new_tokens=4, do_sample=False)

    serial = [serve(request) for request in requests]
    with ThreadPoolExecutor(8) as pool:
        assert all(torch.equal(*pair) for pair in zip(serial, pool.map(serve, requests, timeout=120), strict=True))


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def wait_until(condition) -> None:
    for _ in range(2000):
        if condition():
            return
        threading.Event().wait(0.005)
    raise AssertionError("it did not happen within 10 s")


def test_a_request_waits_for_a_slot_and_takes_none_that_is_held(
    architecture: Architecture, folder: Path, pool: ThreadPoolExecutor
) -> None:
    served = Served(architecture, folder, capacity=1)
    ids = served.tuned.ids(1, 5)
    expected = {name: served.alone(name)(ids).logits for name in ("plain", "strong")}
    with served.bank.use(["plain"]):
        other = pool.submit(served.bank, ids, tasks=["strong"])
        wait_until(lambda: served.bank._changed._waiters)
        assert not other.done()
        assert served.bank.resident == ["plain"]
        assert torch.equal(served.model(ids).logits, expected["plain"])
    assert torch.equal(other.result(timeout=10).logits, expected["strong"])
    assert served.bank.resident == ["strong"]


def test_states_are_read_while_another_request_computes(served: Served, pool: ThreadPoolExecutor) -> None:
    ids = served.tuned.ids(1, 5)
    expected = {name: served.alone(name)(ids).logits for name in ("plain", "strong")}
    with served.bank.use(["plain"]):
        other = pool.submit(served.bank, ids, tasks=["strong"])
        wait_until(lambda: any(slot.filled and slot.task.name == "strong" for slot in served.bank._slots if slot.task))
        assert not other.done()
        assert torch.equal(served.model(ids).logits, expected["plain"])
    assert torch.equal(other.result(timeout=10).logits, expected["strong"])


def test_removing_a_task_in_use(served: Served, pool: ThreadPoolExecutor) -> None:
    """The request that holds it goes on, also if the name means another file meanwhile."""
    bank, ids = served.bank, served.tuned.ids(1, 5)
    expected = {name: served.alone(name)(ids).logits for name in ("plain", "strong")}
    with bank.use(["plain"]):
        bank.remove("plain")
        assert "plain" not in bank
        assert bank.resident == []
        bank.add("plain", served.folder / "strong")
        other = pool.submit(bank, ids, tasks=["plain"])
        wait_until(lambda: bank.resident == ["plain"])
        # All slots that are not held are taken over by others.
        bank._hold(["half"])
        assert torch.equal(served.model(ids).logits, expected["plain"])
    assert torch.equal(other.result(timeout=10).logits, expected["strong"])


def test_removing_a_task_that_a_request_waits_for(
    architecture: Architecture, folder: Path, pool: ThreadPoolExecutor
) -> None:
    served = Served(architecture, folder, capacity=1)
    with served.bank.use(["plain"]):
        other = pool.submit(served.bank, served.tuned.ids(1, 5), tasks=["strong"])
        wait_until(lambda: served.bank._changed._waiters)
        served.bank.remove("strong")
        with pytest.raises(ValueError, match="unknown task 'strong'"):
            other.result(timeout=10)


def test_more_tasks_than_slots(served: Served) -> None:
    ids, names = served.tuned.ids(5, 5), ["plain", "strong", "half", "low-rank", "__base__"]
    with pytest.raises(ValueError, match=r"4 different tasks, but the bank holds 3 at a time\. Split the batch"):
        served.bank(ids, tasks=names)
    assert served.bank.resident == []
    served.bank(ids, tasks=["plain", "strong", "half", "plain", "__base__"])


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    """A task's folder that a test may damage."""
    target = tmp_path / "task"
    target.mkdir()
    for file in (folder / "plain").iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


@pytest.mark.parametrize("host", ["disk", "cpu"])
@pytest.mark.parametrize(("change", "message"), BAD_FILES)
def test_bad_states(architecture: Architecture, folder: Path, copied: Path, host: str, change, message: str) -> None:
    """Refused when added; NaN and infinity, which only the values tell, when they are first read."""
    served = Served(architecture, folder, capacity=2, host=host)
    ids = served.tuned.ids(1, 5)
    expected = served.bank(ids, tasks=["plain"]).logits
    change_states(copied, change)
    late = host == "disk" and "NaN" in message
    if late:
        served.bank.add("bad", copied)
        for _ in range(2):
            with pytest.raises(ValueError, match=rf"Task 'bad', file '.*': .*{message}"):
                served.bank(ids.repeat(2, 1), tasks=["bad", "strong"])
        assert [slot.users for slot in served.bank._slots] == [0, 0]
        assert served.bank.resident == ["strong"]
    else:
        with pytest.raises(ValueError, match=rf"Task 'bad', file '.*': .*{message}"):
            served.bank.add("bad", copied)
        assert served.bank.resident == ["plain"]
    assert list(served.bank) == [*TASKS, "bad"] if late else list(TASKS)
    assert torch.equal(served.bank(ids, tasks=["plain"]).logits, expected)


@pytest.mark.parametrize("keep", [0, 200, -10])
def test_truncated_file(served: Served, copied: Path, keep: int) -> None:
    file = copied / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"adapter_model.safetensors' is not a whole safetensors file"):
        served.bank.add("bad", copied)
    assert "bad" not in served.bank


def test_a_file_that_changes_after_it_was_added(served: Served, copied: Path) -> None:
    ids, file = served.tuned.ids(1, 5), copied / "adapter_model.safetensors"
    served.bank.add("task", copied)
    change_states(copied, lambda states: [state.mul_(2) for state in states.values()])
    with pytest.raises(ValueError, match=r"Task 'task', file .*changed since it was added. Remove the task and add"):
        served.bank(ids, tasks=["task"])
    served.bank.remove("task")
    served.bank.add("task", copied)
    served.bank(ids, tasks=["task"])
    file.unlink()
    served.bank(ids, tasks=["task"])  # still resident
    served.bank(ids.repeat(3, 1), tasks=["plain", "strong", "half"])
    with pytest.raises(ValueError, match=r"Task 'task', file .*No such file"):
        served.bank(ids, tasks=["task"])


def test_a_working_directory_that_changes(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between adding a task by a relative path and reading its states."""
    monkeypatch.chdir(served.folder)
    served.bank.add("relative", "strong")
    monkeypatch.chdir("/")
    ids = served.tuned.ids(1, 5)
    assert torch.equal(served.bank(ids, tasks=["relative"]).logits, served.alone("strong")(ids).logits)


def test_tasks_in_memory_need_no_file(architecture: Architecture, folder: Path, copied: Path) -> None:
    bank = StateBank(tune(architecture).model, capacity=1, host="cpu")
    bank.add("task", copied)
    (copied / "adapter_model.safetensors").write_bytes(b"")
    ids, alone = tune(architecture).ids(1, 5), PeftModel.from_pretrained(architecture.build(), folder / "plain")
    assert torch.equal(bank(ids, tasks=["task"]).logits, alone(ids).logits)


def test_folders_that_hold_something_else(served: Served, copied: Path, tmp_path: Path) -> None:
    get_peft_model(served.architecture.build(), LoraConfig(target_modules=["q_proj"])).save_pretrained(
        tmp_path / "lora"
    )
    with pytest.raises(ValueError, match=r"lora' holds an adapter of the method .*LORA, expected S0"):
        served.bank.add("bad", tmp_path / "lora")
    head = get_peft_model(served.architecture.build(), S0Config(modules_to_save=["lm_head"]))
    head.save_pretrained(tmp_path / "head")
    with pytest.raises(ValueError, match=r"Task 'bad'.*holds 'base_model.model.lm_head.weight' beside its states"):
        served.bank.add("bad", tmp_path / "head")
    other = next(other for other in ARCHITECTURES[:2] if other is not served.architecture)
    tune(other).model.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"matches nothing. The recurrent mixers of this model are"):
        served.bank.add("bad", tmp_path / "other")
    (copied / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"task' has no adapter_model.safetensors; save the adapter with"):
        served.bank.add("bad", copied)
    with pytest.raises(ValueError, match=r"Can.t find .adapter_config\.json. at"):
        served.bank.add("bad", tmp_path / "nowhere")
    assert list(served.bank) == list(TASKS)


def put_on_hub(folder: Path, cache: Path) -> str:
    """Make a folder an adapter on the Hub that was downloaded before, and say its id."""
    commit = "0" * 40
    snapshot = cache / "models--me--task" / "snapshots" / commit
    shutil.copytree(folder, snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text(commit)
    return "me/task"


def test_tasks_on_the_hub(architecture: Architecture, folder: Path, tmp_path: Path) -> None:
    bank, ids = StateBank(tune(architecture).model, capacity=1), tune(architecture).ids(1, 5)
    bank.add("task", put_on_hub(folder / "strong", tmp_path), cache_dir=tmp_path)
    alone = PeftModel.from_pretrained(architecture.build(), folder / "strong")
    assert torch.equal(bank(ids, tasks=["task"]).logits, alone(ids).logits)
    with pytest.raises(ValueError, match="Can't find 'adapter_config"):
        bank.add("other", "me/nothing", cache_dir=tmp_path)


def test_names(served: Served) -> None:
    with pytest.raises(ValueError, match="task 'plain' is there already; remove it first"):
        served.bank.add("plain", served.folder / "strong")
    for name in ("__base__", 3):
        with pytest.raises(ValueError, match=r"must be a string other than '__base__', got"):
            served.bank.add(name, served.folder / "plain")
    ids = served.tuned.ids(2, 5)
    assert torch.equal(served.bank(ids, tasks=["plain"] * 2).logits, served.alone("plain")(ids).logits)


def test_requests_that_make_no_sense(served: Served) -> None:
    bank, ids = served.bank, served.tuned.ids(3, 5)
    expected = served.model(ids).logits
    with pytest.raises(ValueError, match="unknown task 'plan'"):
        bank(ids, tasks=["plain", "plan", "plain"])
    with pytest.raises(TypeError, match="must be a list with one name for each row, got str"):
        bank(ids, tasks="plain")
    with pytest.raises(ValueError, match="tasks is empty"):
        bank(ids, tasks=[])
    for names in (["plain", "strong"], ["__base__"]):
        with pytest.raises(ValueError, match=f"^tasks has {len(names)} entries, but the batch has 3 rows"):
            bank(ids, tasks=names)
    with bank.use(["plain"] * 3):
        with pytest.raises(RuntimeError, match=r"inside of StateBank\.use"), bank.use(["plain"] * 3):
            pass
        with pytest.raises(ValueError, match="adapter_names was passed while a StateBank"):
            served.model(ids, adapter_names=["default"] * 3)
        assert torch.equal(served.model(ids).logits, served.alone("plain")(ids).logits)
    served.model.train()
    with pytest.raises(ValueError, match=r"StateBank is for inference; call model\.eval\(\) first"):
        bank(ids, tasks=["plain"] * 3)
    served.model.eval()
    with pytest.raises(RuntimeError, match="out of patience"), bank.use(["plain"] * 3):
        raise RuntimeError("out of patience")
    assert torch.equal(served.model(ids).logits, expected)
    assert [slot.users for slot in bank._slots] == [0] * 3


def test_adapters_that_are_disabled(served: Served) -> None:
    """Tasks are not answered by the base model without a word; who disables them for a call of his own gets that."""
    bank, model, ids = served.bank, served.model, served.tuned.ids(1, 5)
    message = r"adapters are disabled, and with them the tasks of its StateBank\. Use the bank outside of"
    with model.disable_adapter():
        with pytest.raises(ValueError, match=message):
            bank(ids, tasks=["plain"])
        assert torch.equal(bank(ids, tasks=["__base__"]).logits, served.base(ids).logits)
    model.base_model.disable_adapter_layers()
    with pytest.raises(ValueError, match=message):
        bank.generate(input_ids=ids, tasks=["plain"], max_new_tokens=2)
    model.base_model.enable_adapter_layers()
    with bank.use(["plain"]):
        with model.disable_adapter():
            assert torch.equal(model(ids).logits, served.base(ids).logits)
        assert torch.equal(model(ids).logits, served.alone("plain")(ids).logits)


def test_a_cache_goes_on_with_the_task_that_has_filled_it(served: Served) -> None:
    ids = served.tuned.ids(1, 9)
    expected = served.alone("plain")(ids).logits[:, 5:]
    cache = cache_of(served.bank(ids[:, :5], use_cache=True, tasks=["plain"]))
    actual = served.bank(ids[:, 5:], tasks=["strong"], **{served.tuned.architecture.cache: cache}).logits
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_banks_that_make_no_sense(served: Served) -> None:
    for arguments, message in (
        ({"capacity": 0}, "capacity must be an integer >= 1, got 0"),
        ({"capacity": True}, "capacity must be an integer >= 1, got True"),
        ({"host": "gpu"}, "host must be 'disk' or 'cpu', got 'gpu'"),
        ({}, "has a StateBank already"),
    ):
        with pytest.raises(ValueError, match=message):
            StateBank(served.model, **arguments)
    with pytest.raises(TypeError, match=rf"PEFT model with S0 adapters, got {type(served.base).__name__}"):
        StateBank(served.base)
    lora = get_peft_model(served.architecture.build(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(TypeError, match="PEFT model with S0 adapters, got PeftModel"):
        StateBank(lora)


def test_closing_and_unloading(served: Served) -> None:
    ids = served.tuned.ids(1, 5)
    served.bank.close()
    assert all(layer.slots is None for layer in layers(served.model))
    for tasks in (["plain"], ["__base__"]):
        with pytest.raises(RuntimeError, match="was closed, or its model was unloaded"):
            served.bank(ids, tasks=tasks)
    bank = StateBank(served.model, capacity=1)
    bank.add("plain", served.folder / "plain")
    assert torch.equal(bank(ids, tasks=["plain"]).logits, served.alone("plain")(ids).logits)
    base = served.model.unload()
    with pytest.raises(RuntimeError, match="was closed, or its model was unloaded"):
        bank(ids, tasks=["plain"])
    assert torch.equal(base(ids).logits, served.base(ids).logits)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_the_models_own_adapters_come_and_go(served: Served, copied: Path) -> None:
    """The slots stay, also in layers that no adapter is left in."""
    ids = served.tuned.ids(1, 5)
    inject_adapter_in_model(S0Config(layers_to_transform=[0]), served.model.get_base_model())
    change_states(copied, BAD_FILES[0][0])
    with pytest.raises(ValueError, match=BAD_FILES[0][1]):
        served.model.load_adapter(copied, "refused")
    assert torch.equal(served.bank(ids, tasks=["strong"]).logits, served.alone("strong")(ids).logits)


def test_cast_models_keep_float32_states(served: Served) -> None:
    ids = served.tuned.ids(1, 5)
    served.bank(ids, tasks=["plain"])
    before = [states.clone() for states in slots(served.model)]
    served.model.bfloat16()
    assert all(torch.equal(*pair) for pair in zip(slots(served.model), before, strict=True))
    alone = served.alone("strong").bfloat16()
    assert torch.equal(served.bank(ids, tasks=["strong"]).logits, alone(ids).logits)


def test_inference_mode(architecture: Architecture, folder: Path) -> None:
    model, ids = tune(architecture).model, tune(architecture).ids(1, 5)
    with torch.inference_mode():
        bank = StateBank(model, capacity=1)
        for name in ("plain", "strong"):
            bank.add(name, folder / name)
        bank(ids, tasks=["plain"])
    alone = PeftModel.from_pretrained(architecture.build(), folder / "strong")
    assert torch.equal(bank(ids, tasks=["strong"]).logits, alone(ids).logits)


def test_copies_of_the_model_have_slots_of_their_own(served: Served) -> None:
    ids = served.tuned.ids(1, 5)
    expected = served.bank(ids, tasks=["plain"]).logits
    for states in slots(copy.deepcopy(served.model)):
        states.zero_()
    assert torch.equal(served.bank(ids, tasks=["plain"]).logits, expected)


def test_compiled_code_serves_all_tasks(served: Served) -> None:
    """One graph, whatever the tasks, their slots and their alpha."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    ids = served.tuned.ids(2, 9)
    expected = {name: served.alone(name)(ids, use_cache=False).logits for name in TASKS}
    served.bank(ids, tasks=["plain", "strong"], use_cache=False)
    torch._dynamo.reset()
    served.bank.model = torch.compile(served.model, backend=backend, fullgraph=True)
    for name in TASKS:
        actual = served.bank(ids, tasks=[name] * 2, use_cache=False).logits
        torch.testing.assert_close(actual, expected[name], atol=2e-6, rtol=0)
    served.bank(ids, tasks=["half", "__base__"], use_cache=False)
    assert len(graphs) == 1
    torch._dynamo.reset()


def test_the_script_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it stands there, but for the model, which is the tiny one."""
    root = Path(__file__).resolve().parent.parent
    page = (root / "docs" / "serving-many-tasks.md").read_text()
    (script,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    tiny = str(root / "examples" / "models" / "tiny-qwen3.5")
    for name in ("sql", "chat"):
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), S0Config(init_weights=1.0, alpha=1.0))
        model.save_pretrained(tmp_path / "tasks" / name)
    monkeypatch.chdir(tmp_path)
    variables: dict = {}
    exec(script.replace("Qwen/Qwen3.5-4B", tiny), variables)
    assert list(variables["bank"]) == ["sql", "chat"]
    assert variables["bank"].resident == ["chat", "sql"]
    assert len(variables["tokens"]) == 3
