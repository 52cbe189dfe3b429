"""The code on the pages of docs/ runs, and the commands there name what is there."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import peft_s0
from peft_s0 import S0Config
from peft_s0.convert import export_s0_tuning
from peft_s0.training import OptimizerSteps
from peft_s0_cli.app import app

ROOT = Path(__file__).resolve().parents[1]
TINY = str(ROOT / "examples" / "models" / "tiny-qwen3.5")
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "experiments" / "README.md"])
HUB_NAMES = {"Qwen/Qwen3.5-4B": TINY, "JackYoung27/s0-tuning-qwen3.5-4b-humaneval": "published"}
"""What stands on the pages for models and files that are not at hand in tests."""

ELSEWHERE = {
    "README.md": "test_examples.py",
    "alpha.md": "test_calibrate.py",
    "llama-cpp.md": "llama/test_server.py",
    "mlx.md": "on_mlx/test_cache.py",
    "serving-http.md": "test_serving.py",
    "serving-many-tasks.md": "test_bank.py",
}
"""Pages whose code a test of their own runs."""

Names = dict[str, Any]


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)


def adapted(*adapters: str) -> PeftModel:
    """The tiny model with adapters of random states."""
    torch.manual_seed(0)
    first, *others = adapters
    config = S0Config(init_weights=1.0, alpha=1.0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(TINY), config, adapter_name=first)
    for name in others:
        model.add_adapter(name, S0Config(init_weights=1.0, alpha=1.0))
    return model.eval()


def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TINY)


def states(folder: str) -> dict[str, torch.Tensor]:
    return load_file(f"{folder}/adapter_model.safetensors")


def importing() -> tuple[Names, Callable[[Names], None]]:
    adapted("default").save_pretrained("my-task")
    export_s0_tuning("my-task", "published", TINY)

    def check(names: Names) -> None:
        there, back = states("my-task"), states("humaneval")
        assert there.keys() == back.keys()
        assert all(torch.equal(there[name], back[name]) for name in there)
        assert (
            Path("for-s0-tuning", "states.safetensors").read_bytes()
            == Path("published/states.safetensors").read_bytes()
        )

    return {}, check


def peft() -> tuple[Names, Callable[[Names], None]]:
    model = adapted("task", "style")
    classes = (AutoModelForCausalLM, LoraConfig, PeftModel, S0Config)

    def check(names: Names) -> None:
        assert names["layers"] == [0, 1, 2]
        assert model.peft_config.keys() == {"task", "style", "mixture"}
        assert names["config"].variant == "offset"
        assert not any(isinstance(module, LoraLayer) for module in names["model"].modules())
        assert names["states"].get_nb_trainable_parameters()[1] > 0
        assert Path("both/states/adapter_model.safetensors").exists()

    names: Names = {cls.__name__: cls for cls in classes}
    return {**names, "peft_s0": peft_s0, "get_peft_model": get_peft_model, "model": model}, check


def prompts() -> tuple[Names, Callable[[Names], None]]:
    for folder in ("right", "one-line"):
        adapted("default").save_pretrained(folder)

    def check(names: Names) -> None:
        assert names["model"].peft_config.keys() == {"default", "short"}
        assert all(tensor.any() for tensor in states("french").values())
        assert all(torch.equal(tensor, states("right")[name]) for name, tensor in states("mixture").items())

    return {}, check


def reading_a_state() -> tuple[Names, Callable[[Names], None]]:
    texts = ["def f(x):", "def total(x):\n    return x"]
    names = {"model": adapted("task"), "tokenizer": tokenizer(), "texts": texts, "prompts": texts}
    return names, lambda names: None


def small_states() -> tuple[Names, Callable[[Names], None]]:
    adapted("default").save_pretrained("my-task")
    size = Path("my-task/adapter_model.safetensors").stat().st_size

    def check(names: Names) -> None:
        assert Path("my-task/adapter_model.safetensors").stat().st_size < 0.4 * size
        assert len(names["errors"]) == 3
        assert Path("small/task-r4/adapter_config.json").exists()

    return {"S0Config": S0Config, "compress_adapter": peft_s0.compress_adapter, "model": adapted("task")}, check


def training() -> tuple[Names, Callable[[Names], None]]:
    names = {"OptimizerSteps": OptimizerSteps, "model": adapted("task"), "scaler": None, "loader": [[], []]}

    def check(names: Names) -> None:
        assert isinstance(names["steps"], OptimizerSteps)

    return names, check


HERE = {
    "importing.md": importing,
    "peft.md": peft,
    "prompts.md": prompts,
    "reading-a-state.md": reading_a_state,
    "small-states.md": small_states,
    "training.md": training,
}
"""What each page takes for granted, and what is so once its code has run, top to bottom."""


@pytest.mark.filterwarnings(
    "ignore:You are trying to modify a model with PEFT for a second time", "ignore:Already found a `peft_config`"
)
@pytest.mark.parametrize("name", HERE)
def test_the_code_of_a_page_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it stands there, but for the model, which is the tiny one."""
    monkeypatch.chdir(tmp_path)
    names, check = HERE[name]()
    for block in blocks(ROOT / "docs" / name):
        for hub_name, folder in HUB_NAMES.items():
            block = block.replace(hub_name, folder)
        exec(compile(block, name, "exec"), names)
    check(names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_code_is_left_out(page: Path) -> None:
    if not blocks(page):
        assert page.name not in HERE
    elif page.name not in HERE:
        assert page.name in (ROOT / "tests" / ELSEWHERE[page.name]).read_text()


def commands(page: Path) -> list[str]:
    """The lines of shell on a page: those indented by four, and in blocks without a language."""
    text = re.sub(r"\\\n\s*", "", page.read_text())
    fenced = "\n".join(re.findall(r"```(?:sh|bash|shell)?\n(.*?)```", text, flags=re.DOTALL))
    outside = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    lines = [*fenced.splitlines(), *re.findall(r"^    (\S.*)$", outside, flags=re.MULTILINE)]
    starts = ("python ", "make ", "peft-s0 ", "accelerate ", "torchrun ", "pip ")
    return [line.split("  #")[0].strip() for line in lines if line.startswith(starts)]


def test_commands_are_found() -> None:
    assert sum(len(commands(page)) for page in PAGES) > 20


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_name_what_is_there(page: Path) -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    own = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    for line in commands(page):
        first, *words = line.split()
        if first == "make":
            assert words[0] in targets, line
        if first == "peft-s0" and not words[0].startswith("-") and not words[0].isupper():
            assert words[0] in own, line
        for word in words:
            if re.fullmatch(r"(examples|benchmarks|experiments|docs|tests)/[\w./-]+", word):
                assert (ROOT / word).exists(), line
