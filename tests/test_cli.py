"""The command line: what the commands print, their exit codes, and programs that are run with S0 registered."""

from __future__ import annotations

import ast
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import MAIN, Architecture
from full_disk import full_disk
from hub import Hub, Repository
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_convert import change_json, contents, save
from transformers import AutoModelForCausalLM
from tuned import tune
from typer.testing import CliRunner, Result

from peft_s0 import S0Config
from peft_s0_cli import app, main

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

from miniature.base import load_base, load_tokenizer  # noqa: E402
from miniature.task import problems  # noqa: E402

QWEN, FALCON = MAIN
RUN = [sys.executable, "-c", "from peft_s0_cli import main; main()"]


def call(*arguments: object, code: int = 0) -> Result:
    """A command in this process."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.stderr)
    return result


def failure(*arguments: object, code: int = 1) -> str:
    """The one line that a command ends in."""
    result = call(*arguments, code=code)
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1
    return lines[0]


@pytest.fixture(autouse=True, scope="module")
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def base(architecture: Architecture, tmp_path: Path) -> Path:
    architecture.build().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def save_adapter(
    folder: Path, architecture: Architecture, base: Path | None = None, seed: int = 0, **config: Any
) -> None:
    model = tune(architecture, **config).model
    generator = torch.Generator().manual_seed(seed)
    for layer in model.base_model.tuner_layers():
        for learnt in layer.learnt_tensors("default").values():
            learnt.weight.normal_(generator=generator)
    model.peft_config["default"].base_model_name_or_path = None if base is None else str(base)
    model.save_pretrained(folder)


def states_of(folder: Path) -> dict[str, torch.Tensor]:
    """States in the order of the layers, by the mixers' names."""
    states = load_file(folder / "adapter_model.safetensors")
    return {name.removeprefix("base_model.model.").removesuffix(".s0.s0_state.weight"): states[name] for name in states}


def test_help_is_there_before_torch_is_imported() -> None:
    script = """
import sys
import time
import urllib.error
import urllib.request
from peft_s0_cli import main
sys.argv = ["peft-s0", "--help"]
try:
    main()
finally:
    print("torch" in sys.modules, "peft_s0" in sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.endswith("False False\n")
    for name in ("inspect", "diff", "soup", "import", "export", "run", "calibrate", "train"):
        assert re.search(rf"^  {name} ", run.stdout, re.MULTILINE)


@pytest.mark.parametrize("command", ["inspect", "diff", "soup", "import", "export", "run", "calibrate", "train"])
def test_every_command_has_help_with_examples(command: str) -> None:
    assert f"Examples:\n    peft-s0 {command}" in call(command, "--help").stdout


def test_the_version_and_wrong_usage() -> None:
    assert re.fullmatch(r"peft-s0 \d+\.\d+\.\d+\n", call("--version").stdout)
    for arguments in (["nothing"], ["inspect"], ["inspect", "a", "b"], ["diff", "a"], ["import", "a", "-o", "b"]):
        assert "Usage: " in call(*arguments, code=2).stderr


@pytest.mark.parametrize("rank", [None, 2])
def test_inspect(architecture: Architecture, base: Path, tmp_path: Path, rank: int | None) -> None:
    folder = tmp_path / "adapter"
    save_adapter(folder, architecture, base, alpha=0.25, rank=rank, train_alpha=1.0)
    found = json.loads(call("inspect", folder, "--json").stdout)
    size = (folder / "adapter_model.safetensors").stat().st_size
    stored = states_of(folder)
    assert (found["base_model"], found["variant"], found["alpha"], found["rank"]) == (str(base), "initial", 0.25, rank)
    assert (found["train_alpha"], found["normalize"], found["bytes"], found["others"]) == (1.0, False, size, {})
    assert found["parameters"] == sum(state.numel() for state in stored.values())
    assert [layer["name"] for layer in found["layers"]] == sorted(stored)
    heads, rows, columns = found["layers"][0]["shape"]
    for layer in found["layers"]:
        state = stored[layer["name"]]
        if rank is not None:
            state = torch.einsum("hir,hjr->hij", *state.split([rows, columns], dim=1))
        assert layer["shape"] == list(state.shape) == [heads, rows, columns]
        norms = [math.sqrt(float((head * head).sum())) for head in state]
        assert layer["head_norms"] == pytest.approx(norms, rel=1e-5)
        assert layer["max_norm"] == pytest.approx(max(norms), rel=1e-5)
        assert layer["mean_norm"] == pytest.approx(sum(norms) / len(norms), rel=1e-5)
    text = call("inspect", folder).stdout
    assert f"base model   {base}\n" in text
    assert f"parameters   {found['parameters']:,}\n" in text
    for layer in found["layers"]:
        shown = f"{layer['mean_norm']:.4g}", f"{layer['max_norm']:.4g}"
        assert re.search(rf"^{layer['name']} +4 x {rows} x {columns} +{shown[0]} +{shown[1]}$", text, re.MULTILINE)


def test_alphas_of_layers(tmp_path: Path) -> None:
    save_adapter(tmp_path / "given", QWEN, alpha=0.25, alpha_pattern={"layers.0.linear_attn": 0.5})
    save_adapter(tmp_path / "learnt", QWEN, learn_alpha=True)
    given, learnt = (json.loads(call("inspect", tmp_path / name, "--json").stdout) for name in ("given", "learnt"))
    assert (given["alpha"], given["alpha_pattern"], given["learnt_alphas"]) == (0.25, {"layers.0.linear_attn": 0.5}, {})
    stored = load_file(tmp_path / "learnt" / "adapter_model.safetensors")
    assert learnt["learnt_alphas"] == {
        name.removeprefix("base_model.model.").removesuffix(".s0.s0_alpha.weight"): float(value)
        for name, value in stored.items()
        if "s0_alpha" in name
    }
    assert len(learnt["learnt_alphas"]) == len(learnt["layers"]) == QWEN.states
    assert re.search(r"alpha of layers.0.linear_attn +0.5\n", call("inspect", tmp_path / "given").stdout)
    name, alpha = next(iter(learnt["learnt_alphas"].items()))
    shown = call("inspect", tmp_path / "learnt").stdout
    assert re.search(rf"alpha of {name} +{alpha:.4g}\n", shown)
    assert "beside the states" not in shown


def test_states_that_are_stored_small(tmp_path: Path) -> None:
    """They are measured, compared and exported as what is loaded of them."""
    QWEN.build().save_pretrained(tmp_path / "base")
    norms = {}
    for storage in ("float32", "bfloat16", "int8"):
        save_adapter(tmp_path / storage, QWEN, tmp_path / "base", storage=storage)
        found = json.loads(call("inspect", tmp_path / storage, "--json").stdout)
        assert (found["storage"], found["parameters"]) == ([storage], 3 * 4 * 16 * 8)
        assert f" bytes, states in {storage}\n" in call("inspect", tmp_path / storage).stdout
        norms[storage] = torch.tensor([layer["head_norms"] for layer in found["layers"]])
        call("export", tmp_path / storage, "-o", tmp_path / "theirs", "--overwrite")
        exported = [*load_file(tmp_path / "theirs" / "states.safetensors").values()]
        measured = torch.stack([state.flatten(1).norm(dim=1) for state in exported])
        assert torch.equal(measured, norms[storage])
    for storage in ("bfloat16", "int8"):
        assert 0 < (norms[storage] / norms["float32"] - 1).abs().max() < 1e-2
        layers = json.loads(call("diff", tmp_path / "float32", tmp_path / storage, "--json", code=1).stdout)["layers"]
        assert all(0 < layer["distance"] < 1e-2 for layer in layers)


@pytest.mark.parametrize("rank", [None, 2])
def test_offsets_stand_beside_states(tmp_path: Path, rank: int | None) -> None:
    QWEN.build().save_pretrained(tmp_path / "base")
    save_adapter(tmp_path / "adapter", QWEN, tmp_path / "base", rank=rank, variant="both")
    found = json.loads(call("inspect", tmp_path / "adapter", "--json").stdout)
    mixers = [f"model.layers.{index}.linear_attn" for index in range(3)]
    assert [layer["name"] for layer in found["layers"]] == [
        f"{mixer}{kind}" for mixer in mixers for kind in ("", " (offset)")
    ]
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for layer in found["layers"]:
        mixer, _, kind = layer["name"].partition(" (")
        state = stored[f"base_model.model.{mixer}.s0.s0_{'offset' if kind else 'state'}.weight"]
        if rank is not None:
            state = torch.einsum("hir,hjr->hij", *state.split([16, 8], dim=1))
        assert layer["head_norms"] == pytest.approx(state.flatten(1).norm(dim=1).tolist(), rel=1e-5)
    assert re.search(r"^  layers +3$", call("inspect", tmp_path / "adapter").stdout, re.MULTILINE)
    assert "The same, in all of 3 layers." in call("diff", tmp_path / "adapter", tmp_path / "adapter").stdout
    # An offset is a row of its own in comparisons, and enters nowhere where only starts have a place.
    found = json.loads(call("diff", tmp_path / "adapter", tmp_path / "adapter", "--json").stdout)
    assert len(found["layers"]) == 6
    line = failure("export", tmp_path / "adapter", "-o", tmp_path / "theirs")
    assert "has variant='both'; this format has a place for 'initial' alone" in line


def test_inspect_without_a_base_model(tmp_path: Path) -> None:
    """It is read from the file alone, unless states are of low rank."""
    save_adapter(tmp_path / "full", QWEN)
    save_adapter(tmp_path / "low", QWEN, rank=2)
    assert "base model   not said" in call("inspect", tmp_path / "full").stdout
    assert "does not say which base model it is for; name the base model" in failure("inspect", tmp_path / "low")
    QWEN.build().save_pretrained(tmp_path / "base")
    assert "rank         2\n" in call("inspect", tmp_path / "low", "--base-model", tmp_path / "base").stdout


def test_a_heat_map_of_norms(tmp_path: Path) -> None:
    QWEN.build().save_pretrained(tmp_path / "base")
    save_adapter(tmp_path / "adapter", QWEN, tmp_path / "base", rank=2)
    for name in ("norms.png", "norms.svg"):
        call("inspect", tmp_path / "adapter", "--plot", tmp_path / name)
    assert (tmp_path / "norms.png").read_bytes().startswith(b"\x89PNG")
    # A colour for each head of each layer, and the layers by their names.
    drawing = (tmp_path / "norms.svg").read_text()
    assert all(f"<!-- {word} -->" in drawing for word in ("head", "norm of the state"))
    assert "is not supported" in failure("inspect", tmp_path / "adapter", "--plot", tmp_path / "norms.none")


def test_layers_are_listed_in_the_order_of_the_model(tmp_path: Path) -> None:
    save_adapter(tmp_path / "adapter", QWEN)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    states = load_file(file)
    first = sorted(states)[0]
    save_file({**states, first.replace("layers.0", "layers.10"): states[first].clone()}, file)
    layers = json.loads(call("inspect", tmp_path / "adapter", "--json").stdout)["layers"]
    assert [layer["name"].split(".")[2] for layer in layers] == ["0", "1", "2", "10"]


def test_what_inspect_refuses(tmp_path: Path) -> None:
    save_adapter(tmp_path / "adapter", QWEN)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-8])
    assert "is not a whole safetensors file" in failure("inspect", tmp_path / "adapter")
    states = {name: state / 0 for name, state in states_of_file(whole, tmp_path).items()}
    save_file(states, file)
    assert re.search(
        r"error: The state '.*' has \d+ of 512 values that are NaN or infinite", failure("inspect", file.parent)
    )
    file.unlink()
    assert failure("inspect", file.parent).endswith(
        "has no adapter_model.safetensors; save the adapter with save_pretrained."
    )
    config = json.loads((file.parent / "adapter_config.json").read_text())
    (file.parent / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "FOO"}))
    for command in (["inspect"], ["export", "-o", tmp_path / "out"], ["soup", "-o", tmp_path / "out"]):
        assert "is of an adapter of the method 'FOO', which this PEFT does not know" in failure(*command, file.parent)
    (file.parent / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "LORA"}))
    assert call("inspect", file.parent, code=1).stderr.endswith(
        "holds an adapter of the method PeftType.LORA, expected S0.\n"
    )
    assert failure("inspect", tmp_path / "none").startswith("peft-s0: error: Can't find 'adapter_config.json' at")


def states_of_file(content: bytes, folder: Path) -> dict[str, torch.Tensor]:
    (folder / "whole.safetensors").write_bytes(content)
    return load_file(folder / "whole.safetensors")


def test_diff(architecture: Architecture, tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    save_adapter(a, architecture, alpha=0.25)
    save_adapter(b, architecture, alpha=0.25)
    assert "The same, in all of" in call("diff", a, b).stdout
    assert json.loads(call("diff", a, b, "--json").stdout)["same"] is True

    save_adapter(b, architecture, alpha=0.5, seed=1)
    found = json.loads(call("diff", a, b, "--json", code=1).stdout)
    assert found["same"] is False
    assert found["config"] == {"alpha": [0.25, 0.5]}
    assert found["only_in"] == [[], []]
    assert len(found["layers"]) == architecture.states
    text = call("diff", a, b, code=1).stdout
    assert "alpha: 0.25 in A, 0.5 in B\n" in text
    for layer in found["layers"]:
        x, y = (states_of(folder)[layer["name"]].double().flatten() for folder in (a, b))
        assert layer["distance"] == pytest.approx(math.sqrt(float(((x - y) ** 2).sum() / (x**2).sum())), rel=1e-9)
        assert layer["cosine"] == pytest.approx(float(torch.cosine_similarity(x, y, dim=0)), rel=1e-9)
        shown = f"{layer['distance']:.4g} +{layer['cosine']:.6f}"
        assert re.search(rf"^{re.escape(layer['name'])} +{shown}$", text, re.MULTILINE)


def test_a_difference_in_one_bit_of_one_state(tmp_path: Path) -> None:
    for name in "ab":
        save_adapter(tmp_path / name, QWEN)
    file = tmp_path / "b" / "adapter_model.safetensors"
    states = load_file(file)
    first = sorted(states)[0]
    states[first][0, 0, 0] = torch.nextafter(states[first][0, 0, 0], torch.tensor(9.0))
    save_file(states, file)
    found = json.loads(call("diff", tmp_path / "a", tmp_path / "b", "--json", code=1).stdout)
    assert [layer["same"] for layer in found["layers"]] == [False, True, True]
    assert found["layers"][0]["distance"] < 1e-6


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([5, 6, 7], [7, 6, 5]),
        ([{"content": "a"}, {"content": "b"}], [{"content": "b"}, {"content": "a"}]),
        ([{"content": "a"}, {"content": "b"}], "a"),
    ],
    ids=["ids", "messages", "kinds"],
)
def test_diff_of_prompts(first: Any, second: Any, tmp_path: Path) -> None:
    """Their order counts, and none of them need be numbers."""
    for name, prompt in (("a", first), ("b", second)):
        save_adapter(tmp_path / name, QWEN)
        file = tmp_path / name / "adapter_config.json"
        config = json.loads(file.read_text())
        file.write_text(json.dumps({**config, "alpha": 1.0, "init_weights": "prompt", "init_prompt": prompt}))
    assert json.loads(call("diff", tmp_path / "a", tmp_path / "a", "--json").stdout)["same"] is True
    found = json.loads(call("diff", tmp_path / "a", tmp_path / "b", "--json", code=1).stdout)
    assert found["config"] == {"init_prompt": [first, second]}


def test_diff_of_other_layers_shapes_and_weights(tmp_path: Path) -> None:
    for name in "ab":
        save_adapter(tmp_path / name, QWEN)
    file = tmp_path / "b" / "adapter_model.safetensors"
    states = load_file(file)
    first, second, third = sorted(states)
    states[first] = states[first][:2].contiguous()
    states[second] = torch.zeros_like(states[second])
    states["base_model.model.lm_head.weight"] = torch.zeros(2)
    del states[third]
    save_file(states, file)
    text = call("diff", tmp_path / "a", tmp_path / "b", code=1).stdout
    assert "model.layers.0.linear_attn: [4, 16, 8] in A, [2, 16, 8] in B\n" in text
    assert "model.layers.2.linear_attn: only in A\n" in text
    assert "base_model.model.lm_head.weight: differs\n" in text
    assert re.search(r"^model\.layers\.1\.linear_attn +1 +-$", text, re.MULTILINE)
    # Relative to A, where A is zero, there is no distance.
    assert re.search(
        r"^model\.layers\.1\.linear_attn +- +-$",
        call("diff", tmp_path / "b", tmp_path / "a", code=1).stdout,
        re.MULTILINE,
    )


def test_diff_of_what_two_classes_call_otherwise(tmp_path: Path) -> None:
    """Their learnt alphas are those of the same layers, as their states are."""
    for name in "ab":
        save_adapter(tmp_path / name, QWEN, learn_alpha=True)
    file = tmp_path / "b" / "adapter_model.safetensors"
    states = load_file(file)
    states = {name.replace("model.layers", "model.language_model.layers"): state for name, state in states.items()}
    save_file(states, file)
    assert "The same, in all of 3 layers." in call("diff", tmp_path / "a", tmp_path / "b").stdout
    changed = next(name for name in states if "s0_alpha" in name)
    save_file({**states, changed: states[changed] + 1}, file)
    found = json.loads(call("diff", tmp_path / "a", tmp_path / "b", "--json", code=1).stdout)
    assert found["others"] == [changed.replace("language_model.", "")]


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    save_adapter(tmp_path / "a", QWEN)
    assert "Can't find 'adapter_config.json'" in failure("diff", tmp_path / "a", tmp_path / "none", code=2)


def test_soup(architecture: Architecture, tmp_path: Path) -> None:
    for seed in (0, 1):
        save_adapter(tmp_path / f"seed-{seed}", architecture, alpha=0.25, seed=seed)
    first, second, out = tmp_path / "seed-0", tmp_path / "seed-1", tmp_path / "out"
    assert call("soup", first, second, "-o", out, "--weights", "0.5,-2").stdout == f"{out}\n"
    a, b = states_of(first), states_of(second)
    for name, state in states_of(out).items():
        torch.testing.assert_close(state, 0.5 * a[name] - 2 * b[name], atol=1e-6, rtol=1e-6)
    assert S0Config.from_pretrained(out).alpha == 0.25
    before = contents(out)
    assert f"'{out}' exists already" in failure("soup", first, second, "-o", out)
    assert "takes numbers with commas between them" in call("soup", first, "-o", out, "--weights", "1;2", code=2).stderr
    assert "Pass one weight for each adapter, got 2 adapters and 1 weights" in failure(
        "soup", first, second, "-o", out, "--weights", "1", "--overwrite"
    )
    assert contents(out) == before
    call("soup", first, second, "-o", out, "--overwrite")
    for name, state in states_of(out).items():
        torch.testing.assert_close(state, (a[name] + b[name]) / 2, atol=1e-6, rtol=1e-6)


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    """It is said in a line what could not be written, and nothing is left of it."""
    QWEN.build().save_pretrained(tmp_path / "base")
    save_adapter(tmp_path / "adapter", QWEN, tmp_path / "base")
    out, before = tmp_path / "out", sorted(tmp_path.iterdir())
    for command in (["soup", tmp_path / "adapter"], ["export", tmp_path / "adapter"]):
        with full_disk(3000):
            line = failure(*command, "-o", out)
        assert f"'{out}' cannot be written" in line
        assert "File too large" in line
    assert sorted(tmp_path.iterdir()) == before


def test_import_and_export(architecture: Architecture, base: Path, tmp_path: Path) -> None:
    save(tmp_path / "theirs", architecture)
    adapter, again = tmp_path / "adapter", tmp_path / "again"
    assert call("import", tmp_path / "theirs", "-b", base, "-o", adapter).stdout == f"{adapter}\n"
    assert call("export", adapter, "--output", again).stdout == f"{again}\n"
    assert contents(again) == contents(tmp_path / "theirs")
    assert f"'{adapter}' exists already" in failure("import", tmp_path / "theirs", "-b", base, "-o", adapter)
    call("import", tmp_path / "theirs", "-b", base, "-o", adapter, "--overwrite")
    assert f"'{again}' exists already" in failure("export", adapter, "-o", again)
    call("export", adapter, "-o", again, "--overwrite", "--format", "s0-tuning")
    assert contents(again) == contents(tmp_path / "theirs")


@pytest.mark.parametrize(
    "arguments", [("--format", "llama.cpp"), ("--prefix", "def"), ("--format", "rwkv", "--gguf", "model.gguf")]
)
def test_a_slot_needs_a_gguf(arguments: tuple[str, ...], tmp_path: Path) -> None:
    result = call("export", "my-task", "-o", tmp_path / "out", *arguments, code=2)
    assert "--format llama.cpp and --gguf go together" in result.stderr
    assert not (tmp_path / "out").exists()


def test_what_serve_refuses(tmp_path: Path) -> None:
    assert "takes NAME=ADAPTER, got 'first'" in call("serve", "base", "--task", "first", code=2).stderr
    twice = call("serve", "base", "--task", "a=b", "--task", "a=c", code=2)
    assert "--task a is there twice" in twice.stderr
    assert f"No folder in '{tmp_path}' holds an adapter" in failure("serve", "base", "--tasks", tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_text("{}")
    assert "There are two tasks 'a'" in failure("serve", "base", "--tasks", tmp_path, "--task", "a=b")
    assert "A task is called 'a', as the base model is" in failure("serve", "models/a", "--tasks", tmp_path)


def test_warnings_are_lines_of_their_own(base: Path, architecture: Architecture, tmp_path: Path) -> None:
    save(tmp_path / "theirs", architecture)
    (tmp_path / "theirs" / "meta.json").write_text('{"state_shape": [1]}')
    result = call("import", tmp_path / "theirs", "-b", base, "-o", tmp_path / "adapter")
    assert re.fullmatch(r"peft-s0: warning: '.*': state_shape in meta\.json is \[1\], but .* count\.\n", result.stderr)


def test_rwkv_files(base: Path, tmp_path: Path) -> None:
    """How they are told from others; what is in them is tested with fla, in tests/kernels/test_rwkv_states.py."""
    torch.save({"emb.weight": torch.zeros(1)}, tmp_path / "state.pth")
    for source, options in (("state.pth", []), ("state", ["--format", "rwkv"])):
        (tmp_path / source).write_bytes((tmp_path / "state.pth").read_bytes())
        line = failure("import", tmp_path / source, "-b", base, "-o", tmp_path / "out", *options)
        assert "holds 'emb.weight', expected states only" in line
    assert "must be a local file" in call(
        "import", "state.pth", "-b", base, "-o", "out", "--revision", "main", code=2
    ).stderr.replace("\n│", "")
    save_adapter(tmp_path / "adapter", QWEN, base)
    assert "need flash-linear-attention" in failure("export", tmp_path / "adapter", "-o", tmp_path / "out.pth")


# What it runs is asked about itself.
ABOUT = """
import json, sys
print(json.dumps({
    "argv": sys.argv, "path": sys.path[0], "name": __name__, "file": __file__, "main": sys.modules["__main__"].__file__,
    "registered": "peft_s0" in sys.modules,
}))
"""


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    """`peft-s0` in this process, with its search path and arguments put back afterwards."""

    def start(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["peft-s0", *map(str, arguments)])
        monkeypatch.setattr(sys, "path", ["/where/peft-s0/is", *sys.path])
        capsys.readouterr()
        main()
        return capsys.readouterr().out

    monkeypatch.chdir(tmp_path)
    return start


def test_a_script_is_run_as_by_the_interpreter(start: Any, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "beside.py").write_text("WORD = 'imported'")
    script = tmp_path / "folder" / "script.py"
    script.write_text(ABOUT + "import beside; print(beside.WORD); raise SystemExit(7)")
    with pytest.raises(SystemExit) as ended:
        start("run", "folder/script.py", "-m", "--help", "x y")
    assert ended.value.code == 7
    # The same, asked of the interpreter, but for the registration.
    expected = subprocess.run(
        [sys.executable, "folder/script.py", "-m", "--help", "x y"], cwd=tmp_path, capture_output=True, text=True
    )
    assert expected.returncode == 7
    about = json.loads(expected.stdout.splitlines()[0])
    assert about.pop("registered") is False
    assert about["argv"] == ["folder/script.py", "-m", "--help", "x y"]
    script.write_text(ABOUT)
    found = json.loads(start("run", "folder/script.py", "-m", "--help", "x y"))
    assert found.pop("registered") is True
    assert {name: Path(tmp_path, value) if name in ("file", "main") else value for name, value in found.items()} == {
        name: Path(tmp_path, value) if name in ("file", "main") else value for name, value in about.items()
    }


def test_a_module_is_run_as_by_the_interpreter(start: Any, tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("")
    (tmp_path / "package" / "__main__.py").write_text(ABOUT)
    expected = subprocess.run([sys.executable, "-m", "package", "-m"], cwd=tmp_path, capture_output=True, text=True)
    found, about = json.loads(start("run", "-m", "package", "-m")), json.loads(expected.stdout)
    assert (found.pop("registered"), about.pop("registered")) == (True, False)
    assert found == about


def test_what_cannot_be_run(start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no script 'none.py' and no command of that name" in failure("run", "none.py")
    (tmp_path / "bin").mkdir()
    for name, content in (("shell", "#!/bin/sh\n"), ("binary", "\x7fELF")):
        (tmp_path / "bin" / name).write_text(content)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for name in ("shell", "binary"):
        assert f"/bin/{name}' is no script in Python" in failure("run", name)
    for name in ("none", "none.at.all"):
        with pytest.raises(SystemExit, match=f"peft-s0: error: There is no module '{name}'"):
            start("run", "-m", name)
    command = tmp_path / "bin" / "command"
    command.write_text(f"#!{sys.executable}\n{ABOUT}")
    command.chmod(0o755)
    assert json.loads(start("run", "command", "x"))["argv"] == [str(command), "x"]


def test_errors_of_a_program_are_its_own(start: Any, tmp_path: Path) -> None:
    """Also those that a command would turn into one line, and an interrupt."""
    for error in ("ValueError", "KeyboardInterrupt"):
        (tmp_path / "script.py").write_text(f"raise {error}('mine')")
        with pytest.raises((ValueError, KeyboardInterrupt), match="mine"):
            start("run", "script.py")


ADAPTER_OF_A_TOOL = """
import multiprocessing, sys

def known(queue):
    queue.put("peft_s0" in sys.modules)

if __name__ == "__main__":
    from transformers import pipeline
    tool = pipeline("text-generation", model=sys.argv[1], tokenizer=sys.argv[2], device="cpu", dtype="float32")
    print(repr(tool("def f(x):", max_new_tokens=12, do_sample=False, return_full_text=False)[0]["generated_text"]))
    for method in ("fork", "spawn"):
        context = multiprocessing.get_context(method)
        queue = context.Queue()
        process = context.Process(target=known, args=(queue,))
        process.start()
        print(method, queue.get())
        process.join()
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model of the examples in float32, and an adapter that moves it."""
    folder = tmp_path_factory.mktemp("tiny")
    load_base().save_pretrained(folder / "base")
    load_tokenizer().save_pretrained(folder / "base")
    model = PeftModel(AutoModelForCausalLM.from_pretrained(folder / "base"), S0Config(task_type="CAUSAL_LM", alpha=1.0))
    for number, layer in enumerate(model.base_model.tuner_layers()):
        layer.s0_state["default"].weight.normal_(generator=torch.Generator().manual_seed(number))
    model.save_pretrained(folder / "adapter")
    return folder


def test_a_tool_that_loads_an_adapter_by_itself(tiny: Path, tmp_path: Path) -> None:
    """transformers' pipeline, from an adapter's folder; and where the registration reaches, as the help says."""
    (tmp_path / "tool.py").write_text(ADAPTER_OF_A_TOOL)
    run = subprocess.run(
        [*RUN, "run", "tool.py", str(tiny / "adapter"), str(tiny / "base")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    text, fork, spawn = run.stdout.splitlines()
    tokenizer = load_tokenizer()
    ids = tokenizer("def f(x):", return_tensors="pt").input_ids
    expected = []
    for model in (PeftModel.from_pretrained(load_base(), tiny / "adapter"), load_base()):
        out = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False)
        expected.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    assert text == repr(expected[0])
    assert expected[0] != expected[1]
    assert (fork, spawn) == ("fork True", "spawn False")


@pytest.mark.timeout(600)
def test_the_server_of_transformers(tiny: Path, tmp_path: Path) -> None:
    """`transformers serve` answers with the adapter; without `run` it knows no S0."""
    # It serves a folder that holds the base model's files and the adapter's together.
    both = tmp_path / "both"
    for part in ("base", "adapter"):
        shutil.copytree(tiny / part, both, dirs_exist_ok=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32", str(both)]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "peft_s0", "run", "-m", "transformers.cli.transformers", "serve", *options],
            cwd=tmp_path,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HOME": str(tmp_path / "home")},
        )
    body = {"model": str(both), "prompt": "def f(x):", "max_tokens": 12, "temperature": 0.0}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        text = json.loads(ask(request, server, tmp_path / "log"))["choices"][0]["text"]
    finally:
        server.kill()
        server.wait()
    tokenizer = load_tokenizer()
    ids = tokenizer("def f(x):", return_tensors="pt").input_ids
    expected = []
    for model in (PeftModel.from_pretrained(load_base(), tiny / "adapter"), load_base()):
        out = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False)
        expected.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    assert text == expected[0] != expected[1]


def ask(request: urllib.request.Request, server: subprocess.Popen[Any], log: Path) -> bytes:
    """A server's answer, once it listens."""
    while True:
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{error}: {log.read_text()[-3000:]}") from error
        except urllib.error.URLError:
            # Not yet: it is still importing.
            assert server.poll() is None, log.read_text()[-3000:]
            time.sleep(0.3)


TASK = """
task: made
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: ["\\n    return x", "\\n    x = x + 3"]
doc_to_target: 0
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.mark.timeout(600)
def test_the_evaluation_harness(tiny: Path, tmp_path: Path) -> None:
    """Its `peft=` is an adapter of S0; log-likelihoods and accuracy are those of the adapter loaded directly."""
    pytest.importorskip("lm_eval")
    prompts = [problem.prompt for problem in islice(problems("test"), 6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    (tmp_path / "made.yaml").write_text(TASK.format(rows=tmp_path / "rows.jsonl"))
    command = ["-m", "lm_eval", "--model", "hf", "--tasks", "made", "--include_path", str(tmp_path), "--device", "cpu"]
    command += ["--model_args", f"pretrained={tiny / 'base'},peft={tiny / 'adapter'},dtype=float32"]
    command += ["--batch_size", "3", "--log_samples", "--output_path", str(tmp_path / "out")]
    run = subprocess.run(
        [sys.executable, "-m", "peft_s0", "run", *command],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "HF_HOME": str(tmp_path / "home")},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    (samples,) = (tmp_path / "out").rglob("samples_made_*.jsonl")
    found = {
        row["doc"]["prompt"]: [float(response[0][0]) for response in row["resps"]]
        for row in map(json.loads, samples.read_text().splitlines())
    }
    (results,) = (tmp_path / "out").rglob("results_*.json")
    accuracy = json.loads(results.read_text())["results"]["made"]["acc,none"]

    tokenizer, choices = load_tokenizer(), ["\n    return x", "\n    x = x + 3"]
    adapted, plain = PeftModel.from_pretrained(load_base(), tiny / "adapter"), load_base()

    def likelihood(model: Any, prompt: str, choice: str) -> float:
        ids = tokenizer(prompt + choice, return_tensors="pt").input_ids
        start = len(tokenizer(prompt).input_ids)
        logs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        return float(logs.gather(1, ids[0, 1:, None])[start - 1 :].sum())

    assert found.keys() == set(prompts)
    expected = {prompt: [likelihood(adapted, prompt, choice) for choice in choices] for prompt in prompts}
    for prompt in prompts:
        assert found[prompt] == pytest.approx(expected[prompt], abs=1e-3)
    assert max(abs(expected[prompt][0] - likelihood(plain, prompt, choices[0])) for prompt in prompts) > 0.1
    assert accuracy == sum(first >= second for first, second in expected.values()) / len(prompts)


@pytest.mark.filterwarnings("ignore")  # of TRL, on models without names
def test_train(start: Any, tiny: Path, tmp_path: Path) -> None:
    rows = [{"prompt": problem.prompt, "completion": "\n    return x"} for problem in islice(problems("train"), 4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--model_name_or_path", tiny / "base", "--dataset_name", "rows.jsonl", "--output_dir", "out"]
    with torch.enable_grad():
        start("train", *options, "--use_cpu", "--max_steps", "1", "--s0_alpha", "0.5", "--report_to", "none")
    assert json.loads(call("inspect", tmp_path / "out", "--json").stdout)["alpha"] == 0.5
    assert all(0 < state.abs().max() < 1.1e-3 for state in states_of(tmp_path / "out").values())


def test_calibrate(tiny: Path, tmp_path: Path) -> None:
    """The losses are those of completions under each alpha, and the best alpha is saved."""
    rows = [{"prompt": problem.prompt, "completion": "\n    return x"} for problem in islice(problems("train"), 5)]
    data, out = tmp_path / "rows.jsonl", tmp_path / "out"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--grid", "0.1,1.0", "--batch-size", "2", "--base-model", tiny / "base"]
    found = json.loads(call("calibrate", tiny / "adapter", data, *options, "--json", "-o", out).stdout)
    tokenizer = load_tokenizer()
    model = PeftModel.from_pretrained(load_base(), tiny / "adapter")

    def loss(alpha: float) -> float:
        model.peft_config["default"].alpha = alpha
        total, count = 0.0, 0
        for row in rows:
            ids = tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token, return_tensors="pt").input_ids
            start = len(tokenizer(row["prompt"]).input_ids)
            logs = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[start - 1 :]
            total, count = total - float(logs.sum()), count + len(logs)
        return total / count

    tried = {trial["alpha"]: trial["value"] for trial in found["table"]}
    assert tried == pytest.approx({alpha: loss(alpha) for alpha in (0.0, 0.1, 1.0)}, rel=1e-4)
    assert found["best"] == min((0.1, 1.0), key=tried.get)
    assert S0Config.from_pretrained(out).alpha == found["best"]
    for name, state in states_of(tiny / "adapter").items():
        assert torch.equal(states_of(out)[name], state)
    assert f"'{out}' exists already" in failure("calibrate", tiny / "adapter", data, "-o", out)
    assert "takes numbers with commas" in call("calibrate", tiny / "adapter", data, "--grid", "a", code=2).stderr
    text = call("calibrate", tiny / "adapter", data, *options, "--plot", tmp_path / "alpha.png").stdout
    assert re.search(r"^ *0\.1 +\d", text, re.MULTILINE)
    assert (tmp_path / "alpha.png").read_bytes().startswith(b"\x89PNG")


def test_what_calibrate_refuses(tiny: Path, tmp_path: Path) -> None:
    """Before the model is loaded, let alone run."""
    data, base = tmp_path / "rows.jsonl", ["--base-model", tmp_path / "nowhere"]
    for content, message in (
        ("", "rows.jsonl' has no rows that can be read: it is empty"),
        ('{"prompt": ', "rows.jsonl' has no rows that can be read: JSON parse error"),
        ('{"prompt": "a", "answer": "b"}\n', r"have the fields \['prompt', 'answer'\], expected 'prompt' and 'compl"),
    ):
        data.write_text(content)
        result = call("calibrate", tiny / "adapter", data, *base, code=1)
        assert re.search(message, result.stderr.splitlines()[-1])
    plot = ["--plot", tmp_path / "none" / "alpha.png"]
    assert "none' to draw into" in failure("calibrate", tiny / "adapter", data, *base, *plot)
    assert "'foo' is not one of" in call("calibrate", tiny / "adapter", data, "--dtype", "foo", code=2).stderr


def test_calibrate_on_prompts_that_are_too_long(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "def f(x):", "completion": " return x"}\n')
    options = ["--max-length", "3", "--base-model", tiny / "base"]
    message = call("calibrate", tiny / "adapter", tmp_path / "rows.jsonl", *options, code=1).stderr.splitlines()[-1]
    assert "rows.jsonl' is longer than max_length=3 before its completion begins" in message


def test_what_was_calibrated_is_saved_before_it_is_drawn(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "def f(x):", "completion": " return x"}\n')
    options = ["--grid", "0.1", "--base-model", tiny / "base", "-o", tmp_path / "out", "--plot", tmp_path / "a.none"]
    result = call("calibrate", tiny / "adapter", tmp_path / "rows.jsonl", *options, code=1)
    assert "is not supported" in result.stderr.splitlines()[-1]
    assert re.search(r"^ *0\.1 +\d", result.stdout, re.MULTILINE)
    assert S0Config.from_pretrained(tmp_path / "out").alpha == 0.1


def test_a_vocabulary_that_was_resized(tiny: Path, tmp_path: Path) -> None:
    """PEFT saves its embeddings by itself. States are read without them, and the base model cannot take them."""
    base = AutoModelForCausalLM.from_pretrained(tiny / "base")
    base.resize_token_embeddings(base.config.vocab_size + 8, mean_resizing=False)
    model = get_peft_model(base, S0Config(rank=2, init_weights=1.0))
    with pytest.warns(UserWarning, match="as the embedding layer has been resized"):
        model.save_pretrained(tmp_path / "adapter")
    assert re.search(r"beside the states +.*embed_tokens\.weight", call("inspect", tmp_path / "adapter").stdout)
    assert "weight' beside its states" in failure("export", tmp_path / "adapter", "-o", tmp_path / "out")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "def f(x):", "completion": " return x"}\n')
    message = call("calibrate", tmp_path / "adapter", tmp_path / "rows.jsonl", code=1).stderr.splitlines()[-1]
    assert re.search(r"error: '.*adapter' does not fit the base model '.*base': .* size mismatch for .*embed", message)


def test_a_wheel_has_all_that_train_imports() -> None:
    """In a checkout the script finds what is beside it; in a wheel there is what pyproject.toml names."""
    listed = re.findall(r'^"(examples/.*)" = "peft_s0/(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert all(source == target for source, target in listed)
    places = [ROOT / source for source, _ in listed]
    files = [file for place in places for file in ([place] if place.is_file() else place.rglob("*.py"))]
    assert ROOT / "examples" / "sft.py" in files
    beside = {path.stem for path in (ROOT / "examples").iterdir()}
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            needed = {name.partition(".")[0] for name in names} & beside
            assert needed <= {place.stem for place in places}, file


def test_train_hands_on_its_options(start: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        start("train", "--", "--help")
    assert ended.value.code == 0
    assert "--s0_alpha" in capsys.readouterr().out
    with pytest.raises(ValueError, match="Name the data for some/model"):
        start("train", "--model_name_or_path", "some/model", "--use_cpu")


def test_adapters_on_the_hub(tmp_path: Path) -> None:
    """In processes that are not offline, and in one that has the cache alone."""
    QWEN.build().save_pretrained(tmp_path / "base")
    save(tmp_path / "theirs", QWEN)
    save_adapter(tmp_path / "low", QWEN, rank=2)
    script = """
import sys
import time
import urllib.error
import urllib.request
from typer.testing import CliRunner
from peft_s0_cli import app
for line in sys.stdin.read().splitlines():
    result = CliRunner().invoke(app, line.split())
    print(result.exit_code, result.output.splitlines()[-1])
"""
    lines = [
        "import them/states --revision main -b me/base -o adapter",
        "export adapter -o again",
        "import them/states --subfolder nowhere -b me/base -o other",
        "inspect me/low -b me/base",
        "diff me/low me/low -b me/base",
        "inspect me/none",
        "inspect me/low --revision v9",
    ]
    # Its base model has another architecture now, and the adapter names the revision that it is for.
    shutil.copytree(tmp_path / "low", tmp_path / "early")
    change_json(tmp_path / "early" / "adapter_config.json", base_model_name_or_path="me/changed", revision="v1")
    FALCON.build().save_pretrained(tmp_path / "changed")
    lines.append("inspect early")
    # One file of the second folder is not on the Hub, which the cache knows then.
    cached = ["inspect me/low --subfolder below -b me/base", "import them/states --subfolder bare -b me/base -o bare"]
    with Hub() as hub:
        repositories = {"them/states": "theirs", "me/base": "base", "me/low": "low", "me/changed": "changed"}
        for name, folder in repositories.items():
            hub.repositories[name] = Repository()
            hub.repositories[name].commit(contents(tmp_path / folder))
        hub.repositories["me/changed"].commit(contents(tmp_path / "base"), "v1")
        for name, folder, below in (("them/states", "theirs", "bare"), ("me/low", "low", "below")):
            files = {f"{below}/{file}": content for file, content in contents(tmp_path / folder).items()}
            hub.repositories[name].commit({file: files[file] for file in files if file != "bare/meta.json"})

        def run(offline: str, lines: list[str]) -> list[str]:
            environment = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": offline, "HF_HUB_DISABLE_XET": "1"}
            run = subprocess.run(
                [sys.executable, "-c", script],
                input="\n".join(lines),
                cwd=tmp_path,
                env={**os.environ, **environment, "HF_HOME": str(tmp_path / "home")},
                capture_output=True,
                text=True,
            )
            assert run.returncode == 0, run.stderr
            return run.stdout.splitlines()

        answers = run("0", [*lines, *cached])
        assert not any(request.endswith("/model.safetensors") for request in hub.requests)
        assert run("1", [cached[0], f"{cached[1]} --overwrite"]) == answers[len(lines) :]
    assert answers[0] == "0 adapter"
    assert answers[1] == "0 again"
    assert contents(tmp_path / "again") == contents(tmp_path / "theirs")
    assert S0Config.from_pretrained(tmp_path / "adapter").base_model_name_or_path == "me/base"
    assert answers[2].startswith("1 peft-s0: error: 'them/states' has no states.safetensors")
    assert answers[3].startswith("0 model.layers.2.linear_attn  4 x 16 x 8 ")
    assert answers[4] == "0 The same, in all of 3 layers."
    assert answers[5].startswith("1 peft-s0: error: Can't find 'adapter_config.json' at 'me/none'")
    assert answers[6].startswith("1 peft-s0: error: ")
    assert answers[7] == answers[3]
    assert answers[8] == answers[3]
    assert answers[9] == "0 bare"
