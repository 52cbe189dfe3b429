"""What a prompt cache of no tokens makes of mlx-lm, against the naive recurrence that starts from the states."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import torch
from architectures import ARCHITECTURES
from mlx_lm.generate import batch_generate, stream_generate
from mlx_lm.models.cache import load_prompt_cache, make_prompt_cache, save_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoTokenizer
from tuned import tune

from on_mlx.conftest import EXAMPLES, ROWS, Case, save_for_mlx
from peft_s0 import S0Config
from peft_s0.export.mlx import MLX_LM, SUPPORTED, write_cache

from miniature.base import FOLDER, load_base, load_tokenizer  # isort: skip

MakeCase = Callable[..., Case]
TOLERANCE = 1e-4  # of the states' effect


@pytest.mark.parametrize("chunks", [[12], [1] * 12, [5, 1, 6]], ids=str)
def test_logits(case: Case, tmp_path: Path, chunks: list[int]) -> None:
    """In one piece, token by token, and in pieces."""
    file = write_cache(case.tuned.model, tmp_path / "task.safetensors", dtype="float32")
    ids = case.tuned.ids(1, 12)
    expected, effect = case.tuned.expected(ids), case.tuned.effect(ids)
    assert effect > 0.3
    with torch.no_grad():
        base = case.tuned.base(ids, use_cache=False).logits
    assert float((case.logits(ids) - base).abs().max()) < TOLERANCE * effect, "the base models differ"
    cache = load_prompt_cache(str(file))
    found = torch.cat([case.logits(part, cache) for part in ids.split(chunks, dim=1)], dim=1)
    assert float((found - expected).abs().max()) < TOLERANCE * effect


def test_states_of_some_layers(make_case: MakeCase, tmp_path: Path) -> None:
    """The others start from zero, as in the base model; low rank and alpha are multiplied out."""
    for name, layers in (("qwen3_5", [1]), ("nemotron_h", [3])):
        case = make_case(name, layers_to_transform=layers, rank=2, alpha=0.9)
        file = write_cache(case.tuned.model, tmp_path / f"{name}.safetensors", dtype="float32")
        ids = case.tuned.ids(1, 9)
        found = case.logits(ids, load_prompt_cache(str(file)))
        assert float((found - case.tuned.expected(ids)).abs().max()) < TOLERANCE * case.tuned.effect(ids)


def test_the_file_is_as_mlx_lm_writes_it(case: Case, tmp_path: Path) -> None:
    """Array by array, and what metadata says of them: loaded and written again, it is the same."""
    file = write_cache(case.tuned.model, tmp_path / "own.safetensors", dtype="float32", model="folder")
    cache, metadata = load_prompt_cache(str(file), return_metadata=True)
    assert metadata == {"model": "folder", "tokenizer_config": "{}"}
    save_prompt_cache(str(tmp_path / "theirs.safetensors"), cache, metadata)
    with safe_open(file, "np") as own, safe_open(tmp_path / "theirs.safetensors", "np") as theirs:
        assert own.metadata() == {name: said for name, said in theirs.metadata().items() if name != "format"}
        assert sorted(own.keys()) == sorted(theirs.keys())
        for name in own.keys():  # noqa: SIM118 - no dict
            ours, other = own.get_tensor(name), theirs.get_tensor(name)
            assert (ours.shape, ours.dtype) == (other.shape, other.dtype)
            assert (ours == other).all()
    assert [type(one) for one in cache] == [type(one) for one in make_prompt_cache(case.model)]


def test_a_saved_adapter_gives_the_same_file(make_case: MakeCase, folders: dict[str, Path], tmp_path: Path) -> None:
    case = make_case("falcon_h1")
    case.tuned.model.save_pretrained(tmp_path / "adapter")
    files = [
        write_cache(case.tuned.model, tmp_path / "live.safetensors"),
        write_cache(tmp_path / "adapter", tmp_path / "saved.safetensors", base_model=case.tuned.base),
    ]
    arrays = [load_file(file) for file in files]
    assert arrays[0].keys() == arrays[1].keys()
    assert all(torch.equal(arrays[0][name], arrays[1][name]) for name in arrays[0])
    assert any(array.any() for array in arrays[0].values())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_models_dtype_stays(make_case: MakeCase, folders: dict[str, Path], tmp_path: Path, dtype: str) -> None:
    """Zeros of another dtype would turn all that follows into theirs."""
    # Not those with experts, which mlx runs on a CPU in float32 alone.
    for name in ("qwen3_5", "falcon_h1", "mamba2", "nemotron_h"):
        case = make_case(name)
        case.model.set_dtype(getattr(mx, dtype))
        file = write_cache(case.tuned.model, tmp_path / f"{name}.safetensors", dtype=dtype)
        ids = case.tuned.ids(1, 9)
        cache = load_prompt_cache(str(file))
        logits = case.model(mx.array(ids.numpy()), cache=cache)
        assert logits.dtype == case.model(mx.array(ids.numpy())).dtype == getattr(mx, dtype)
        found = torch.tensor(logits.astype(mx.float32).tolist())
        difference = (found - case.tuned.expected(ids)).norm() / (case.logits(ids) - case.tuned.expected(ids)).norm()
        assert difference < 0.2, name


@dataclasses.dataclass
class Tiny:
    """The examples' model in mlx-lm, with two tasks."""

    folder: Path
    model: Any
    tokenizer: Any
    files: dict[str, Path]
    answers: dict[str, list[str]]


PROMPTS = ["def f(x):", "def g(x):\n    return", "def total(x):", "def run(x):\n    x"]


def complete(model: Any, tokenizer: Any, prompts: list[str]) -> list[str]:
    """Greedy answers of transformers, one row at a time."""
    answers = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=32, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        answers.append(tokenizer.decode(tokens, skip_special_tokens=True))
    return answers


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder = tmp_path_factory.mktemp("tiny")
    save_for_mlx(load_base(), folder / "model", model_type="qwen3_5")
    load_tokenizer().save_pretrained(folder / "model")
    # Read by the name of the model's type, as mlx-lm does: it is another one then, and the same for both.
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    files, answers = {}, {"base": complete(load_base(), tokenizer, PROMPTS)}
    for seed, task in enumerate(("first", "second")):
        torch.manual_seed(seed)
        model = get_peft_model(load_base(), S0Config(alpha=2.0, init_weights=1.0)).eval()
        files[task] = write_cache(model, folder / f"{task}.safetensors", dtype="float32", model=str(folder / "model"))
        model.save_pretrained(folder / task)
        answers[task] = complete(model, tokenizer, PROMPTS)
    assert all(len({answers[task][i] for task in answers}) == 3 for i in range(len(PROMPTS)))
    return Tiny(folder, load(str(folder / "model"))[0], TokenizerWrapper(tokenizer), files, answers)


def test_answers(tiny: Tiny) -> None:
    """Greedy, one after another, with a fresh cache each."""
    for i, prompt in enumerate(PROMPTS):
        for task, expected in tiny.answers.items():
            cache = None if task == "base" else load_prompt_cache(str(tiny.files[task]))
            parts = stream_generate(tiny.model, tiny.tokenizer, prompt, max_tokens=32, prompt_cache=cache)
            assert "".join(part.text for part in parts) == expected[i]


def test_several_tasks_in_a_batch(tiny: Tiny) -> None:
    tasks = ["first", "second", "second", "first"]
    prompts = [tiny.tokenizer.encode(prompt) for prompt in PROMPTS]
    caches = [load_prompt_cache(str(tiny.files[task])) for task in tasks]
    found = batch_generate(tiny.model, tiny.tokenizer, prompts, prompt_caches=caches, max_tokens=32)
    assert found.texts == [tiny.answers[task][i] for i, task in enumerate(tasks)]


def test_the_command_line_of_mlx_lm(tiny: Tiny) -> None:
    command = [sys.executable, "-m", "mlx_lm", "generate", "--model", str(tiny.folder / "model")]
    command += ["--prompt-cache-file", str(tiny.files["first"]), "--ignore-chat-template"]
    command += ["--prompt", PROMPTS[0], "--max-tokens", "32", "--temp", "0", "--verbose", "False"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.strip() == tiny.answers["first"][0].strip()


def test_the_page(tiny: Tiny, tmp_path: Path) -> None:
    """Its scripts run as they stand there, on the tiny model."""
    page = (EXAMPLES.parent / "docs" / "mlx.md").read_text()
    scripts = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert len(scripts) == 2
    for script in scripts:
        script = script.replace("Qwen/Qwen3.5-4B", str(FOLDER)).replace("mlx-qwen3.5-4b", str(tiny.folder / "model"))
        script = script.replace('"my-task"', repr(str(tiny.folder / "first"))).replace('"bfloat16"', '"float32"')
        run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
        assert run.returncode == 0, run.stderr[-3000:]
    model = PeftModel.from_pretrained(load_base(), tiny.folder / "first").eval()
    assert run.stdout.strip() == complete(model, tiny.tokenizer._tokenizer, ["def f(x):"])[0].strip()


def test_what_is_refused(make_case: MakeCase, tmp_path: Path) -> None:
    def refuses(message: str, adapter: Any, **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            write_cache(adapter, tmp_path / "none.safetensors", **options)
        assert not list(tmp_path.glob("none*"))

    model = make_case("qwen3_5").tuned.model
    refuses("dtype must be one of .*, got 'int8'", model, dtype="int8")
    refuses(r"call eval\(\) first", make_case("mamba2").tuned.model.train())
    refuses("has variant 'both'", make_case("qwen3_5", variant="both").tuned.model)
    lora = get_peft_model(ROWS["falcon_h1"].build(), LoraConfig(target_modules=["q_proj"])).eval()
    refuses("no S0 adapter 'default'", lora)
    for row in ARCHITECTURES:
        if row.name in ("olmo_hybrid", "bamba", "kimi_linear", "jamba"):
            refuses(r"is for a \w+ForCausalLM. States can be exported to mlx-lm for Qwen3Next, ", tune(row).model)
        if row.name == "mamba2":
            refuses("a Mamba2ForCausalLM whose heads share keys in 2 groups. mlx-lm .* normalises", tune(row).model)
    write_cache(model, tmp_path / "there.safetensors")
    with pytest.raises(FileExistsError, match="exists"):
        write_cache(model, tmp_path / "there.safetensors")
    write_cache(model, tmp_path / "there.safetensors", overwrite=True)


def test_supported_is_what_is_tested() -> None:
    classes = {type(row.build()).__name__.removesuffix("ForCausalLM") for row in ROWS.values()}
    assert classes == set(SUPPORTED)
    assert importlib.metadata.version("mlx-lm") == MLX_LM


def test_a_state_in_another_order_shows(make_case: MakeCase, tmp_path: Path) -> None:
    """What these tests would miss if keys and values were as long as each other and the state were symmetric."""
    case = make_case("qwen3_5")
    file = write_cache(case.tuned.model, tmp_path / "task.safetensors", dtype="float32")
    cache = load_prompt_cache(str(file))
    cache[0][1] = cache[0][1][:, ::-1]
    ids = case.tuned.ids(1, 9)
    found = case.logits(ids, cache)
    assert float((found - case.tuned.expected(ids)).abs().max()) > 0.1 * case.tuned.effect(ids)
