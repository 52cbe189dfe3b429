"""Several processes on one machine, as `accelerate launch` starts them with the files of `examples/accelerate`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from architectures import MAIN, Architecture
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from test_training import LAMBDA, RATE
from torch import Tensor
from trainers import tokenizer, words

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "examples" / "accelerate"
SCRIPTS = ROOT / "tests" / "distributed"
# Where `make deepspeed` puts it. Not with the rest: accelerate and transformers import it wherever it is installed.
DEEPSPEED = ROOT / ".deepspeed"
sys.path.insert(0, str(SCRIPTS))

from runs import LAYERS, perform  # noqa: E402

NAMES = [row.name for row in MAIN]
TOLERANCE = 5e-5
"""Of how far a state moved. Rounding makes some 1e-6 to 1e-5 of it, for Adam divides by the size of gradients."""


def launch(script: str, folder: Path, processes: int, config: str = "ddp", runs: list[dict[str, Any]] | None = None):
    """Run a script in so many processes, on CPUs, in float32.

    Args:
        script: in the folder `distributed`.
        folder: what the script is given.
        processes: how many.
        config: a file of `examples/accelerate`.
        runs: what `runs.py` is to do.

    Returns:
        What each of them wrote to `{rank}.json` in the folder.
    """
    folder.mkdir(exist_ok=True)
    (folder / "runs.json").write_text(json.dumps(runs))
    options = ["--config_file", str(CONFIGS / f"{config}.yaml"), "--num_processes", str(processes)]
    options += ["--main_process_port", "0", "--mixed_precision", "no"]
    environment = os.environ | {"PYTHONFAULTHANDLER": "1"}
    if config.startswith("deepspeed"):
        paths = [os.environ.get("PYTHONPATH", ""), str(DEEPSPEED)]
        environment |= {"DS_ACCELERATOR": "cpu", "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    else:
        environment["ACCELERATE_USE_CPU"] = "true"
    run = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *options, str(SCRIPTS / script), str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-5000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]


def test_penalty_in_two_processes(tmp_path: Path) -> None:
    """In SFTTrainer without the callback, in the plain one with it, with one and four accumulated batches."""
    first, second = launch("penalty.py", tmp_path, processes=2)
    assert first == second
    assert len(first) == 8
    for run in first:
        assert (run["processes"], run["wrapper"]) == (2, "DistributedDataParallel")
        factor = pytest.approx((1 - 2 * RATE * LAMBDA) ** 2, rel=1e-5)
        assert (run["smallest"], run["greatest"]) == (factor, factor), run["run"]


# What is done on each engine, by `distributed/runs.py`. Steps see the same rows in however many processes.


def whole(name: str) -> dict[str, Any]:
    """Four steps, checkpoints after two and four, of which that after two comes back at the end."""
    return {"name": f"whole-{name}", "architecture": name, "best": True}


def resumed(name: str, folder: Path) -> dict[str, Any]:
    """The last two of four steps, from a checkpoint of others."""
    return {"name": f"resumed-{name}", "architecture": name, "resume": str(folder / f"whole-{name}" / "checkpoint-2")}


def bf16(name: str) -> dict[str, Any]:
    """A base model in bf16. One step, for what differs by the last bit of a sum may differ by 1 in 256 a step later."""
    one_step = {"max_steps": 1, "save_steps": 1, "config": {"init_weights": True}}
    return {"name": f"bf16-{name}", "architecture": name, "bf16_base": True, **one_step}


def example(folder: Path) -> dict[str, Any]:
    """The example script, with its defaults for all that is not named here; gradient checkpointing is one of them."""
    rows = [{"prompt": words(3 + k, k), "completion": " " + words(2 + 2 * k, 9 + k)} for k in range(4)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    MAIN[0].build().save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    options = ["--model_name_or_path", str(folder / "model"), "--dataset_name", str(folder / "rows.jsonl")]
    options += ["--max_steps", "2", "--dtype", "float32", "--bf16", "False", "--average_over_examples", "True"]
    return {"name": "example", "do": "example", "architecture": MAIN[0].name, "options": options}


def alone(folder: Path, *runs: dict[str, Any]) -> dict[str, Any]:
    """The same in this process."""
    return {run["name"]: perform(folder, run) for run in runs}


@dataclass
class Alone:
    """What one process makes of all that is done on each engine.

    Args:
        folder: where.
        script: the run of the example.
        found: what each run reports.
    """

    folder: Path
    script: dict[str, Any]
    found: dict[str, Any]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Alone:
    folder = tmp_path_factory.mktemp("alone")
    script = example(folder)
    return Alone(folder, script, alone(folder, *map(whole, NAMES), *map(bf16, NAMES), script))


def adapter(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def assert_same(found: Path, expected: Path, steps: tuple[int, ...] = (2, 4)) -> None:
    """The states of checkpoints, relative to how far the steps between moved them, or the only one, from zero."""
    for step in steps:
        first, second = (adapter(folder / f"checkpoint-{step}") for folder in (found, expected))
        assert first.keys() == second.keys()
        start = adapter(expected / f"checkpoint-{6 - step}") if step > 1 else {}
        for name, state in first.items():
            assert state.dtype == torch.float32
            moved = float((second[name] - start.get(name, 0)).abs().max())
            assert moved > 1e-3
            torch.testing.assert_close(state, second[name], atol=TOLERANCE * moved, rtol=0)


def check(architecture: Architecture, ranks: list[Any], folder: Path, one: Alone) -> None:
    """What holds of `whole` on every engine, beside the states of its checkpoints."""
    name = f"whole-{architecture.name}"
    run = folder / name
    for rank in ranks:
        assert rank[name]["processes"] == len(ranks)
        assert rank[name]["precision"] == "no"
        assert rank[name]["seen"] == [["torch.float32", "torch.float32"]]
        assert rank[name]["best"] == str(run / "checkpoint-2")
        for value in ("loss", "eval_loss", "grad_norm", "s0/norm_mean", "s0/norm_max", "s0/penalty"):
            assert len(rank[name][value]) == (2 if value == "eval_loss" else 4)
            assert rank[name][value] == pytest.approx(one.found[name][value], rel=1e-5)
    assert_same(run, one.folder / name)
    # The best came back, in all processes, and is saved as a whole that loads anywhere.
    held, saved, best = load_file(run / "states.safetensors"), adapter(run / "adapter"), adapter(run / "checkpoint-2")
    loaded = get_peft_model_state_dict(PeftModel.from_pretrained(architecture.build(), run / "adapter"))
    assert len(held) == architecture.states
    for states in (saved, best, loaded):
        assert states.keys() == held.keys()
        assert all(torch.equal(states[key], held[key]) for key in held)
    assert len({rank[name]["sum"] for rank in ranks}) == 1
    assert not all(torch.equal(held[key], state) for key, state in adapter(run / "checkpoint-4").items())


def check_example(folder: Path, one: Alone) -> None:
    found, expected = adapter(folder / "example"), adapter(one.folder / "example")
    assert found.keys() == expected.keys()
    for name, state in expected.items():
        assert 1e-3 < state.abs().max() < 2.1e-3  # Adam at 1e-3, two steps
        torch.testing.assert_close(found[name], state, atol=1e-7, rtol=0)


# In one process of the tests, so that what they are compared with is made once.
on_an_engine = pytest.mark.xdist_group("engines")


@on_an_engine
@pytest.mark.timeout(900)  # on a machine that does other things as well
@pytest.mark.filterwarnings("ignore")  # of TRL, on models without names
def test_ddp(one: Alone, tmp_path: Path) -> None:
    two, back = (tmp_path / name for name in ("two", "back"))
    runs = [*map(whole, NAMES), *map(bf16, NAMES), *(resumed(name, one.folder) for name in NAMES), one.script]
    ranks = launch("runs.py", two, processes=2, runs=runs)
    alone(back, *(resumed(name, two) for name in NAMES))
    for row in MAIN:
        assert ranks[0][f"whole-{row.name}"]["wrapper"] == "DistributedDataParallel"
        check(row, ranks, two, one)
        assert_same(two / f"bf16-{row.name}", one.folder / f"bf16-{row.name}", steps=(1,))
        for folder in (two, back):
            assert_same(folder / f"resumed-{row.name}", one.folder / f"whole-{row.name}", steps=(4,))
    check_example(two, one)


@on_an_engine
@pytest.mark.timeout(900)  # on a machine that does other things as well
@pytest.mark.filterwarnings("ignore")  # of TRL, on models without names
def test_fsdp2(one: Alone, tmp_path: Path) -> None:
    sharded, two, back = (tmp_path / name for name in ("sharded", "two", "back"))
    launch("runs.py", sharded, processes=1, config="fsdp2", runs=[whole(name) for name in NAMES])
    runs = [*map(whole, NAMES), *map(bf16, NAMES), *(resumed(name, sharded) for name in NAMES)]
    runs += [{"name": f"cast-{name}", "do": "refused", "architecture": name, "bf16": True} for name in NAMES]
    ranks = launch("runs.py", two, processes=2, config="fsdp2", runs=[*runs, one.script])
    launch("runs.py", back, processes=1, config="fsdp2", runs=[resumed(name, two) for name in NAMES])
    for row in MAIN:
        for rank in ranks:
            found = rank[f"whole-{row.name}"]
            assert (found["engine"], found["wrapper"]) == ("DistributedType.FSDP", "FSDPPeftModel")
            refusal = rank[f"cast-{row.name}"]
            assert refusal["written"] == 0
            assert "states are trained in float32, but this one is torch.bfloat16 in the forward" in refusal["error"]
            assert rank[f"bf16-{row.name}"]["seen"] == [["torch.float32", "torch.float32"]]
        check(row, ranks, two, one)
        assert_same(two / f"bf16-{row.name}", one.folder / f"bf16-{row.name}", steps=(1,))
        assert_same(sharded / f"whole-{row.name}", one.folder / f"whole-{row.name}")
        for folder in (two, back):
            assert_same(folder / f"resumed-{row.name}", one.folder / f"whole-{row.name}", steps=(4,))
    check_example(two, one)


@on_an_engine
@pytest.mark.skipif(
    not DEEPSPEED.is_dir() and find_spec("deepspeed") is None, reason="DeepSpeed is not there: make deepspeed"
)
@pytest.mark.timeout(900)  # on a machine that does other things as well
@pytest.mark.filterwarnings("ignore")  # of TRL, on models without names
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed(one: Alone, tmp_path: Path, stage: int) -> None:
    config = f"deepspeed_zero{stage}"
    two, back = (tmp_path / name for name in ("two", "back"))
    runs = [*map(whole, NAMES), *map(bf16, NAMES), *(resumed(name, two) for name in NAMES)]
    runs += [{"name": f"past-{name}", "do": "refused_save", "architecture": name} for name in NAMES]
    runs += [{"name": f"cast-{name}", "do": "refused_cast", "architecture": name, "stage": stage} for name in NAMES]
    ranks = launch("runs.py", two, processes=2, config=config, runs=[*runs, one.script])
    for row in MAIN:
        for rank in ranks:
            found = rank[f"whole-{row.name}"]
            assert (found["engine"], found["wrapper"]) == ("DistributedType.DEEPSPEED", "DeepSpeedEngine")
            assert (found["shapes"][0] == [0]) == (stage == 3)
            assert "states are trained in float32, but this one is torch.bfloat16" in rank[f"cast-{row.name}"]["error"]
            refusal = rank[f"past-{row.name}"]
            assert (refusal["error"] is None) == (stage == 2)
            if stage == 3:
                assert refusal["written"] == 0
                assert "is empty here: DeepSpeed's ZeRO-3 has dealt it out to the processes" in refusal["error"]
        check(row, ranks, two, one)
        assert_same(two / f"bf16-{row.name}", one.folder / f"bf16-{row.name}", steps=(1,))
        assert_same(two / f"resumed-{row.name}", one.folder / f"whole-{row.name}", steps=(4,))
    check_example(two, one)
    # DeepSpeed's own checkpoints are for the number of processes that wrote them, and say so.
    (rank,) = launch(
        "runs.py", back, processes=1, config=config, runs=[{**resumed(name, two), "do": "refused"} for name in NAMES]
    )
    for name in NAMES:
        assert "world size" in rank[f"resumed-{name}"]["error"]


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_files_for_accelerate(file: Path) -> None:
    """accelerate knows every key; the docs and the files name each other."""
    config = load_config_from_file(str(file))  # refuses keys that it does not know
    options = vars(launch_command_parser().parse_args(["script.py"]))
    nested = {*config.fsdp_config, *config.deepspeed_config}
    assert nested <= options.keys()
    assert bool(nested) == (file.stem != "ddp")
    assert config.mixed_precision == ("bf16" if file.stem == "ddp" else "no")
    assert f"--config_file {file.relative_to(ROOT)} examples/sft.py" in file.read_text()
    assert file.name in (ROOT / "docs" / "distributed.md").read_text()


def test_layers_that_fsdp_deals_out() -> None:
    text = (CONFIGS / "fsdp2.yaml").read_text()
    assert f"fsdp_transformer_layer_cls_to_wrap: {LAYERS['qwen3_5']}" in text
    for row in MAIN:
        assert LAYERS[row.name] in text
        assert LAYERS[row.name] in {type(module).__name__ for module in row.build().modules()}
