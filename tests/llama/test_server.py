"""llama-server with tuned states: two tasks that take turns, what it forgets, the example and the page that use it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import urllib.error
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from typer.testing import CliRunner

from llama.conftest import EXAMPLES, LLAMA_CPP, ROOT
from peft_s0 import S0Config
from peft_s0.export.llama_cpp import CacheSettings, write_slot, write_state
from peft_s0_cli import app

import llama_server  # isort: skip
from miniature.base import load_base, load_tokenizer  # isort: skip
from miniature.evaluate import HELD_OUT, complete  # isort: skip

TASKS = ("first", "second")
PROMPTS = [problem.prompt for problem in HELD_OUT[:6]]


@dataclass
class Served:
    """A server and the model it is to answer like."""

    server: llama_server.Server
    model: PeftModel
    gguf: Path
    folder: Path

    def expected(self, prompts: list[str], task: str | None) -> list[str]:
        if task is None:
            with self.model.disable_adapter():
                return complete(self.model, load_tokenizer(), prompts)
        self.model.set_adapter(task)
        return complete(self.model, load_tokenizer(), prompts)


@pytest.fixture(scope="module")
def served(ggufs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("slots")
    torch.manual_seed(0)
    model = get_peft_model(load_base(), S0Config(alpha=2.0, init_weights=1.0), adapter_name=TASKS[0]).eval()
    model.add_adapter(TASKS[1], S0Config(alpha=2.0, init_weights=1.0))
    for task in TASKS:
        slot = folder / f"{task}.slot"
        assert write_slot(model, ggufs["example"], slot, adapter_name=task, cache=llama_server.CACHE) == [1]
    with llama_server.Server(LLAMA_CPP, ggufs["example"], folder) as server:
        yield Served(server, model, ggufs["example"], folder)


def test_tasks_take_turns(served: Served) -> None:
    """With prompts of the base model in between, which have nothing to do with either."""
    expected = {task: served.expected(PROMPTS, task) for task in (None, *TASKS)}
    for prompt, *answers in zip(PROMPTS, *expected.values(), strict=True):
        assert len(set(answers)) == 3, "tasks that answer alike would show nothing"
        for task, answer in zip(expected, answers, strict=True):
            assert served.server.ask(prompt, task) == answer
    for task in (*TASKS, *reversed(TASKS), None):
        assert served.server.ask(PROMPTS[0], task) == expected[task][0]


def test_a_prefix_of_the_users_own(served: Served) -> None:
    tokens = write_slot(
        served.model,
        served.gguf,
        served.folder / "def.slot",
        "def g(x):",
        adapter_name=TASKS[0],
        cache=llama_server.CACHE,
    )
    prompts = [problem.prompt for problem in HELD_OUT if problem.name == "g"][:3]
    assert tokens == load_tokenizer()("def g(x):")["input_ids"]
    for prompt, answer in zip(prompts, served.expected(prompts, TASKS[0]), strict=True):
        assert served.server.ask(prompt, "def") == answer
    other = next(problem.prompt for problem in HELD_OUT if problem.name == "total")
    with pytest.raises(RuntimeError, match="does not begin with the prefix of task 'def'"):
        served.server.ask(other, "def")


def test_what_it_forgets(served: Served) -> None:
    """Why a slot is restored before each prompt: otherwise the base model answers, and nothing says so."""
    (base,), (tuned,) = (served.expected(PROMPTS[:1], task) for task in (None, TASKS[0]))
    server, question = served.server, {"n_predict": 32, "temperature": 0, "cache_prompt": False}
    server.post("/slots/0?action=restore", filename=f"{TASKS[0]}.slot")
    assert server.post("/completion", prompt=PROMPTS[0], **question)["content"] == base
    # A state without tokens works for the next prompt.
    write_state(served.model, served.gguf, served.folder / "bare.state", adapter_name=TASKS[0])
    server.post("/slots/0?action=restore", filename="bare.state")
    question["cache_prompt"] = True
    assert server.post("/completion", prompt=PROMPTS[0], **question)["content"] == tuned


def test_slots_of_other_settings_are_refused(served: Served) -> None:
    write_slot(
        served.model, served.gguf, served.folder / "half.slot", adapter_name=TASKS[0], cache=CacheSettings(False)
    )
    with pytest.raises(urllib.error.HTTPError) as caught:
        served.server.ask(PROMPTS[0], "half")
    assert caught.value.code == 400
    assert "Unable to restore slot" in json.load(caught.value)["error"]["message"]
    assert served.server.ask(PROMPTS[0], None) == served.expected(PROMPTS[:1], None)[0]


def test_a_server_that_does_not_start(tmp_path: Path) -> None:
    (tmp_path / "none.gguf").write_text("none")
    with (
        pytest.raises(RuntimeError, match=r"did not start, see .*server\.log"),
        llama_server.Server(LLAMA_CPP, tmp_path / "none.gguf", tmp_path),
    ):
        pass


def test_the_command(served: Served, tmp_path: Path) -> None:
    """A slot from the command line is the one that Python writes."""
    served.model.set_adapter(TASKS[0])
    served.model.save_pretrained(tmp_path)
    command = ["export", str(tmp_path / TASKS[0]), "-o", str(tmp_path / "task.slot"), "--gguf", str(served.gguf)]
    command += ["-b", str(EXAMPLES / "models" / "tiny-qwen3.5"), "--prefix", "def g(x):"]
    flash = {None: "auto", True: "on", False: "off"}[llama_server.CACHE.flash_attention]
    command += ["--flash-attn", flash, "--cache-type-k", llama_server.CACHE.type_k]
    result = CliRunner().invoke(app, [*command, "--cache-type-v", llama_server.CACHE.type_v])
    assert (result.exit_code, result.stdout.strip()) == (0, str(tmp_path / "task.slot"))
    write_slot(
        served.model,
        served.gguf,
        tmp_path / "python.slot",
        "def g(x):",
        adapter_name=TASKS[0],
        cache=llama_server.CACHE,
    )
    assert (tmp_path / "task.slot").read_bytes() == (tmp_path / "python.slot").read_bytes()
    result = CliRunner().invoke(app, [*command, "--cache-type-v", "f17"])
    assert result.exit_code == 1
    assert "task.slot' exists" in result.stderr
    result = CliRunner().invoke(app, [*command, "--overwrite", "--cache-type-v", "f17"])
    assert "type_v must be one of ggml's types" in result.stderr


@pytest.mark.timeout(600)
def test_the_example(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "llama_server.py"), "--llama_cpp", str(LLAMA_CPP), "--prompts", "10"]
    run = subprocess.run(
        [*command, "--output", str(tmp_path)], capture_output=True, text=True, cwd=tmp_path, env={**os.environ}
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-3000:]
    assert run.stdout.count("10 of 10 answers are those of transformers.") == 3
    effects = re.findall(r"changes logits by (\S+), as in transformers but for (\S+) of that", run.stdout)
    assert len(effects) == 2
    assert all(float(effect) > 0.3 and float(error) < 1e-2 for effect, error in effects)


def test_the_page(served: Served, tmp_path: Path) -> None:
    """Its scripts run as they stand there, on the tiny model."""
    page = (ROOT / "docs" / "llama-cpp.md").read_text()
    scripts = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert len(scripts) == 3
    served.model.set_adapter(TASKS[0])
    served.model.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / TASKS[0]).rename(tmp_path / "my-task")
    (tmp_path / "model.gguf").symlink_to(served.gguf)
    (tmp_path / "slots").symlink_to(served.folder)
    for script in scripts:
        script = script.replace("Qwen/Qwen3.5-4B", str(EXAMPLES / "models" / "tiny-qwen3.5"))
        script = script.replace('"bfloat16"', '"float32"').replace("qwen3.5-4b.gguf", "model.gguf")
        script = script.replace("http://127.0.0.1:8080", served.server.url).replace('"<|im_start|>"', "None")
        script = script.replace("CacheSettings()", repr(llama_server.CACHE))
        script = script.replace(
            "<|im_start|>user\\nWrite a function.<|im_end|>\\n<|im_start|>assistant\\n", "def g(x):"
        )
        run = subprocess.run(
            [sys.executable, "-W", "error::SyntaxWarning", "-c", script], capture_output=True, text=True, cwd=tmp_path
        )
        assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.strip() == served.expected(["def g(x):"], TASKS[0])[0].strip()
