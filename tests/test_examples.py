"""The examples and the README's scripts."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, Architecture
from datasets import Dataset
from hub import TOKEN, Hub
from peft import PeftConfig, PeftModel
from safetensors.torch import load, load_file
from trainers import mean_loss
from trl import SFTConfig

from peft_s0 import S0Config

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
sys.path.insert(0, str(EXAMPLES))

import arguments  # noqa: E402
import calibrate  # noqa: E402
import dpo  # noqa: E402
import grpo  # noqa: E402
import miniature.evaluate  # noqa: E402
import quickstart  # noqa: E402
import sandbox  # noqa: E402
import sft  # noqa: E402
from miniature.base import load_base, load_tokenizer  # noqa: E402
from miniature.evaluate import HELD_OUT, complete  # noqa: E402
from miniature.execute import calls_and_values, passes  # noqa: E402
from miniature.task import Problem, problems  # noqa: E402


def problem() -> Problem:
    return next(problems("test"))


def right(problem: Problem) -> str:
    """A right program, from the problem's own answer at every input of a small range."""
    answers = {x: problem.answer(x) for x in range(-200, 200)}
    return f"def {problem.name}(x):\n    return {answers!r}[x]\n"


def test_right_and_wrong_programs() -> None:
    p = problem()
    wrong = f"def {p.name}(x):\n    return x + 12345\n"
    text = right(p).replace("return ", "return str(").replace("[x]", "[x])")
    assert passes([right(p), wrong, text, "x = 1"], [p.tests] * 4) == [True, False, False, False]


def test_tests_with_several_arguments_and_nested_values() -> None:
    program = "def pair(a, b=2):\n    return {'sum': [a + b, None]}\n"
    tests = [["assert pair(1, b=3) == {'sum': [4, None]}"], ["assert pair(-1) == {'sum': (1, None)}"]]
    wrong = ["assert pair(1) == {'sum': [4, None]}"]
    other_order = "def pair(a):\n    return {'b': {'d': a, 'c': 1}, 'a': 2}\n"
    equal = ["assert pair(3) == {'a': 2, 'b': {'c': 1, 'd': 3}}"]
    assert passes([*[program] * 3, other_order], [*tests, wrong, equal]) == [True, True, False, True]


@pytest.mark.parametrize(
    "test", ["total(3) == 12", "assert total(3)", "assert total(3) == f(2)", "assert f(1) == {1}", "assert f(", ""]
)
def test_a_test_that_cannot_be_read_is_quoted(test: str) -> None:
    with pytest.raises(
        ValueError, match=re.escape(f"'assert call == value' with a literal that JSON can write, got {test!r}")
    ):
        calls_and_values(["assert f(1) == 2", test])


def test_no_tests_are_not_passed() -> None:
    with pytest.raises(ValueError, match="at least one test"):
        passes(["x = 1"], [[]])


@pytest.mark.timeout(600)
def test_quickstart(tmp_path: Path) -> None:
    """The whole story, as a newcomer runs it, in a folder of his own."""
    run = subprocess.run(
        [sys.executable, str(EXAMPLES / "quickstart.py"), "--output", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    results = json.loads((tmp_path / "results.json").read_text())
    methods = results["methods"]
    assert methods["S0"]["pass@1"] > methods["base"]["pass@1"] + 0.3
    assert results["pass@1 in a fresh process"] == methods["S0"]["pass@1"]
    for name in ("right", "one-line"):
        assert (tmp_path / name / "adapter_model.safetensors").stat().st_size < 60_000
    assert (tmp_path / "quickstart.png").read_bytes().startswith(b"\x89PNG")
    tasks = results["tasks"]
    assert tasks["one-line"]["right in one line"] > tasks["right"]["right in one line"]


def test_base_model_is_small_and_real() -> None:
    folder = EXAMPLES / "models" / "tiny-qwen3.5"
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 3_000_000
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["Qwen3_5ForCausalLM"]


# The scripts that read as TRL's own. First as they come, on the tiny model, with fewer steps.


def command(script: str, *options: str) -> list[str]:
    return [sys.executable, str(EXAMPLES / script), *options]


def run(script: str, folder: Path, *options: str, **environment: str) -> str:
    process = subprocess.run(
        command(script, "--output_dir", str(folder), *options),
        capture_output=True,
        text=True,
        cwd=folder.parent,
        env={**os.environ, **environment},
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout


def check_tiny(folder: Path, output: str) -> None:
    """The states have moved, more problems are solved, the figures are those of the programs, the adapter is saved."""
    states = load_file(folder / "adapter_model.safetensors")
    assert len(states) == 3
    assert all(state.dtype == torch.float32 and state.abs().max() > 1e-3 for state in states.values())

    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in answers] == [problem.prompt for problem in HELD_OUT]
    tests = [problem.tests for problem in HELD_OUT]
    rates = {}
    for when in ("before", "after"):
        verdicts = [row[f"{when} passes"] for row in answers]
        assert verdicts == passes([row["prompt"] + row[when] for row in answers], tests)
        rates[when] = sum(verdicts) / len(verdicts)
    assert f"{rates['before']:.1%} without the adapter, {rates['after']:.1%} with it" in output
    assert rates["after"] > rates["before"] + 0.2

    saved = PeftModel.from_pretrained(load_base(), folder)
    assert complete(saved, load_tokenizer(), [row["prompt"] for row in answers]) == [row["after"] for row in answers]


def history(folder: Path, quantity: str) -> list[float]:
    """What the trainer logged at each step."""
    last = max(folder.glob("checkpoint-*"), key=lambda checkpoint: int(checkpoint.name.partition("-")[2]))
    log = json.loads((last / "trainer_state.json").read_text())["log_history"]
    return [entry[quantity] for entry in log if quantity in entry]


SFT = ("--max_steps", "7", "--learning_rate", "2e-2", "--save_steps", "2", "--save_total_limit", "9")


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def sft_run(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of sft.py that nothing stops and that pushes its adapter."""
    folder = tmp_path_factory.mktemp("sft") / "output"
    environment = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
    environment["HF_HOME"] = str(folder.parent / "home")
    return folder, run("sft.py", folder, *SFT, "--push_to_hub", "--hub_model_id", "me/tiny", **environment)


def test_sft(sft_run: tuple[Path, str]) -> None:
    check_tiny(*sft_run)
    losses = history(sft_run[0], "loss")
    assert len(losses) == 7
    assert losses[-1] < 0.8 * losses[0]


def test_what_sft_pushes(sft_run: tuple[Path, str], hub: Hub) -> None:
    files = hub.repositories["me/tiny"].files()
    pushed, saved = load(files["adapter_model.safetensors"]), load_file(sft_run[0] / "adapter_model.safetensors")
    assert pushed.keys() == saved.keys()
    assert all(torch.equal(pushed[name], saved[name]) for name in saved)
    assert b"import peft_s0" in files["README.md"]


def test_sft_goes_on_where_it_was_stopped(sft_run: tuple[Path, str], tmp_path: Path) -> None:
    folder, log = tmp_path / "output", tmp_path / "log"
    checkpoint = folder / "checkpoint-2"
    with log.open("w") as file:
        process = subprocess.Popen(
            command("sft.py", "--output_dir", str(folder), *SFT), stdout=file, stderr=file, cwd=tmp_path
        )
        while not (checkpoint / "trainer_state.json").exists():
            assert process.poll() is None, log.read_text()[-3000:]
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        assert process.wait() != 0
    assert "KeyboardInterrupt" in log.read_text()
    assert not (folder / "adapter_model.safetensors").exists()

    # A mark in what the checkpoint remembers shows that the second run did not begin anew.
    memory = json.loads((checkpoint / "trainer_state.json").read_text())
    memory["log_history"][0]["loss"] = 123.0
    (checkpoint / "trainer_state.json").write_text(json.dumps(memory))
    run("sft.py", folder, *SFT, "--resume_from_checkpoint", str(checkpoint))
    assert history(folder, "loss") == [123.0, *history(sft_run[0], "loss")[1:]]
    resumed, whole = (load_file(place / "adapter_model.safetensors") for place in (folder, sft_run[0]))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def main(script: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    """A script in this process, which has imported what it needs."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", "--output_dir", str(folder), *options])
    script.main()


@pytest.mark.filterwarnings("ignore")  # of TRL, on models without names
def test_grpo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--max_steps", "8", "--learning_rate", "2e-2", "--num_generations", "4"]
    folder = tmp_path / "output"
    main(grpo, folder, monkeypatch, *options, "--per_device_train_batch_size", "48")
    check_tiny(folder, capsys.readouterr().out)
    rewards = history(folder, "reward")
    assert len(rewards) == 8
    assert sum(rewards[-2:]) > sum(rewards[:2]) + 0.4


@pytest.mark.filterwarnings("ignore")  # of TRL, on models without names
def test_dpo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "output"
    main(dpo, folder, monkeypatch, "--max_steps", "8", "--learning_rate", "1e-2")
    check_tiny(folder, capsys.readouterr().out)
    margins = history(folder, "rewards/margins")
    assert margins[0] == 0
    assert margins[-1] > 0.05


@pytest.mark.filterwarnings("ignore")  # as the script does it
def test_calibrate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The script with few problems, solutions and steps: what it writes is what it says and what it saves."""
    monkeypatch.setattr(miniature.evaluate, "HELD_OUT", HELD_OUT[:8])
    monkeypatch.setattr(quickstart, "SOLUTIONS", 6)
    monkeypatch.setattr(calibrate, "SOLUTIONS", 6)
    monkeypatch.setattr(calibrate, "PROBLEMS", 8)
    monkeypatch.setattr(calibrate, "GRID", [0.5, 4.0])
    monkeypatch.setattr(sys, "argv", ["calibrate.py", "--output", str(tmp_path)])
    calibrate.main()
    output = capsys.readouterr().out
    tested = json.loads((tmp_path / "tested.json").read_text())
    assert all(re.search(rf"{re.escape(name)} .*{rate}", output) for name, (_, rate) in tested.items())
    layered = json.loads((tmp_path / "loss-layer-by-layer.json").read_text())
    best = layered["best"] if isinstance(layered["best"], dict) else {"": layered["best"]}
    config = S0Config.from_pretrained(tmp_path / "states")
    assert {config.alpha, *config.alpha_pattern.values()} == {*best.values()}
    assert config.train_alpha == 1.0
    losses = json.loads((tmp_path / "loss.json").read_text())["table"]
    assert losses[2]["value"] != losses[1]["value"] < losses[0]["value"]
    assert (tmp_path / "alpha.png").read_bytes().startswith(b"\x89PNG")


# Then on other models, with data from a file, and the paper's recipe but for what would take too long.

PROBLEMS = list(islice(problems("train"), 4))
ROWS: dict[str, list[dict[str, Any]]] = {
    "sft": [{"prompt": problem.prompt, "completion": "\n    return x"} for problem in PROBLEMS],
    "dpo": [{"prompt": problem.prompt, "chosen": "\n    return x", "rejected": "\n    pass"} for problem in PROBLEMS],
    # Of what a random model adds to these, some is a comment and some breaks the program.
    "grpo": [{"prompt": f"def f(x):\n    return {k} #", "tests": [f"assert f(0) == {k}"]} for k in range(2, 6)],
}
OPTIONS = {
    "sft": [],
    "dpo": [],
    "grpo": ["--gradient_accumulation_steps", "2", "--max_completion_length", "32"],
}


@pytest.fixture
def files(architecture: Architecture, tmp_path: Path) -> Path:
    """A folder with a random model and a file of rows for each script."""
    architecture.build(0).save_pretrained(tmp_path / "model")
    load_tokenizer().save_pretrained(tmp_path / "model")
    for name, rows in ROWS.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.mark.filterwarnings("ignore")  # of TRL, on models without names
@pytest.mark.parametrize("script", [sft, dpo, grpo], ids=lambda script: script.__name__)
def test_the_paper_recipe_on_a_model_and_a_file(
    script: Any,
    architecture: Architecture,
    files: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name, folder = script.__name__, files / "output"
    sandbox._warn_once.cache_clear()
    options = ["--model_name_or_path", str(files / "model"), "--dataset_name", str(files / f"{name}.jsonl")]
    main(script, folder, monkeypatch, *options, "--use_cpu", "--max_steps", "2", *OPTIONS[name])

    states = load_file(folder / "adapter_model.safetensors")
    assert states
    for state in states.values():
        assert state.dtype == torch.float32
        assert 0 < state.abs().max() < 2.1e-3  # Adam at 1e-3, two steps
    config = PeftConfig.from_pretrained(folder)
    assert config.alpha == {"qwen3_5": 0.07, "falcon_h1": 0.65}[architecture.name]
    assert config.l2_lambda == 5e-4
    training = torch.load(folder / "training_args.bin", weights_only=False)
    assert (training.learning_rate, training.lr_scheduler_type, training.max_grad_norm) == (1e-3, "constant", 1.0)
    assert training.model_init_kwargs["dtype"] == "bfloat16"
    assert training.bf16
    if name != "grpo":
        assert training.gradient_accumulation_steps == len(ROWS[name])
    if name == "grpo":
        assert 0 < history(folder, "reward")[0] < 1
    # Without the callback, engines that shard and fp16 refuse the penalty.
    assert len(history(folder, "s0/penalty")) == 2
    assert ("programs that a model writes are run" in capsys.readouterr().err) == (name == "grpo")
    assert not (folder / "answers.jsonl").exists()


@pytest.mark.filterwarnings("ignore")  # of TRL, on models without names
def test_a_mixture_of_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its routers are frozen, and TRL, which would add a loss of theirs, does not find those of Granite-4."""
    next(row for row in ARCHITECTURES if row.name == "granitemoehybrid").build().save_pretrained(tmp_path / "model")
    load_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS["sft"]))
    options = ["--model_name_or_path", str(tmp_path / "model"), "--dataset_name", str(tmp_path / "rows.jsonl")]
    main(sft, tmp_path / "output", monkeypatch, *options, "--use_cpu", "--max_steps", "1")
    assert len(history(tmp_path / "output", "loss")) == 1


@pytest.mark.filterwarnings("ignore")  # of TRL, on models without names
@pytest.mark.parametrize("over_examples", [False, True])
def test_what_the_loss_is_averaged_over(
    architecture: Architecture, files: Path, monkeypatch: pytest.MonkeyPatch, over_examples: bool
) -> None:
    """Of completions of different lengths, in one step, with a state that is still zero: the base model's losses."""
    rows = [
        {"prompt": row["prompt"], "completion": row["completion"] + " + 1" * 3 * k} for k, row in enumerate(ROWS["sft"])
    ]
    (files / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--model_name_or_path", str(files / "model"), "--dataset_name", str(files / "sft.jsonl")]
    options += ["--use_cpu", "--max_steps", "1", "--dtype", "float32", "--bf16", "False"]
    main(sft, files / "output", monkeypatch, *options, *(["--average_over_examples"] if over_examples else []))

    tokenizer, model = load_tokenizer(), architecture.build(0)
    examples = []
    for row in rows:
        prompt, whole = (tokenizer(text)["input_ids"] for text in (row["prompt"], row["prompt"] + row["completion"]))
        whole = [*whole, tokenizer.eos_token_id]
        examples.append({"input_ids": [whole], "labels": [[-100] * len(prompt) + whole[len(prompt) :]]})
    lengths = [len(example["labels"][0]) - example["labels"][0].count(-100) for example in examples]
    losses = [mean_loss(model, Dataset.from_dict(example)) for example in examples]
    over_tokens = sum(loss * length for loss, length in zip(losses, lengths, strict=True)) / sum(lengths)
    means = [over_tokens, sum(losses) / len(losses)]
    assert means[0] != pytest.approx(means[1], rel=1e-3)
    assert history(files / "output", "loss") == [pytest.approx(means[over_examples], rel=1e-5)]


def test_programs_in_answers() -> None:
    answer = "So:\n```python\nx = 1\n```\nor rather\n```python\ndef f(x):\n    return '```'\n```\nDone."
    rewards = grpo.passes_tests(
        prompts=["def f(x):", [{"role": "user", "content": "f"}], [{"role": "user", "content": "f"}]],
        completions=[
            " return '```'",
            [{"role": "assistant", "content": answer}],
            [{"role": "assistant", "content": "I cannot."}],
        ],
        tests=[["assert f(0) == '```'"]] * 3,
        completion_ids=None,
    )
    assert rewards == [1.0, 1.0, 0.0]


def parse(monkeypatch: pytest.MonkeyPatch, *options: str) -> tuple[Any, ...]:
    monkeypatch.setattr(sys, "argv", ["sft.py", *options])
    threads = torch.get_num_threads()
    try:
        return arguments.parse_arguments(SFTConfig, sft.RECIPE, sft.TINY)
    finally:
        torch.set_num_threads(threads)


def as_option(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict) else str(value)


def test_every_field_is_an_option(monkeypatch: pytest.MonkeyPatch) -> None:
    own = {field.name for field in dataclasses.fields(S0Config)} - {f.name for f in dataclasses.fields(PeftConfig)}
    assert {field.name for field in dataclasses.fields(arguments.S0Arguments)} == {f"s0_{name}" for name in own}
    *_, s0 = parse(monkeypatch, "--s0_alpha", "none")
    assert s0.config() == S0Config(task_type="CAUSAL_LM")
    values: dict[str, Any] = {
        "target_modules": ["mixer", "a.b"],
        "exclude_modules": ["x"],
        "layers_to_transform": [0, 2],
        "layers_pattern": ["layers"],
        "modules_to_save": ["lm_head"],
        "trainable_token_indices": [1, 2],
        "init_weights": 0.5,
        "init_prompt": None,
        "tokenizer_name_or_path": "somebody/tokenizer",
        "alpha": 0.3,
        "alpha_pattern": {"layers.0.linear_attn": 0.5},
        "learn_alpha": False,
        "train_alpha": 1.0,
        "normalize": True,
        "l2_lambda": 0.0,
        "variant": "initial",
        "rank": 3,
        "storage": "int8",
    }
    assert values.keys() == own
    prompt = {"init_weights": "prompt", "init_prompt": "Be brief.", "train_alpha": None, "normalize": False}
    for given in (values, {**values, **prompt}):
        options = [
            option
            for name, value in given.items()
            if value is not None
            for option in (f"--s0_{name}", *map(as_option, value if isinstance(value, list) else [value]))
        ]
        *_, s0 = parse(monkeypatch, *options)
        assert s0.config() == S0Config(task_type="CAUSAL_LM", **given)


@pytest.mark.parametrize(("given", "expected"), [("linear_attn", {"linear_attn"}), (r".*\.mamba", r".*\.mamba")])
def test_names_and_regular_expressions(monkeypatch: pytest.MonkeyPatch, given: str, expected: Any) -> None:
    *_, s0 = parse(monkeypatch, "--s0_target_modules", given, "--s0_init_weights", "False")
    assert s0.config().target_modules == expected
    assert s0.config().init_weights is False


def test_a_file_of_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The model decides on the defaults wherever it is named; the command line goes before the file."""
    rows = [{"prompt": "a", "completion": "b"}] * 7
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = tmp_path / "options.yaml"
    file.write_text(
        "model_name_or_path: some/model\nuse_cpu: true\nmax_steps: 3\nper_device_train_batch_size: 2\n"
        "s0_target_modules: .*mamba\ns0_trainable_token_indices: {embed_tokens: [1]}\n"
        f"datasets:\n  - path: json\n    data_files: {tmp_path / 'rows.jsonl'}\n"
    )
    script, training, model, mixture, s0 = parse(monkeypatch, "--config", str(file), "--max_steps", "4")
    assert (model.model_name_or_path, training.max_steps, training.learning_rate) == ("some/model", 4, 1e-3)
    assert training.model_init_kwargs["dtype"] == "bfloat16"
    assert (s0.config().target_modules, s0.config().alpha) == (".*mamba", None)
    assert s0.config().trainable_token_indices == {"embed_tokens": [1]}
    data = arguments.load_data(script, mixture)["train"]
    arguments.step_over_all(training, data)
    assert (len(data), training.gradient_accumulation_steps) == (7, 4)
    with pytest.raises(ValueError, match="--gradient_accumulation_steps"):
        arguments.step_over_all(parse(monkeypatch)[1], data.to_iterable_dataset())


@pytest.mark.parametrize(
    ("options", "steps"),
    [([], 20), (["--num_train_epochs", "3"], -1), (["--num_train_epochs", "3", "--max_steps", "20"], 20)],
)
def test_epochs(monkeypatch: pytest.MonkeyPatch, options: list[str], steps: int) -> None:
    """They count where they are asked for, unless steps are, too; transformers would take the recipe's steps."""
    training = parse(monkeypatch, *options)[1]
    assert (training.max_steps, training.num_train_epochs) == (steps, 3)


def test_splits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A file has one to train on; a folder may have one to evaluate on as well."""
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": name, "completion": "b"}) + "\n")
    options = ["--model_name_or_path", "some/model", "--use_cpu", "--eval_strategy", "steps", "--eval_steps", "5"]
    for source, found in ((tmp_path / "train.jsonl", ["train"]), (tmp_path, ["train", "test"])):
        script, training, _, mixture, _ = parse(monkeypatch, *options, "--dataset_name", str(source))
        data = arguments.load_data(script, mixture)
        assert sorted(data) == sorted(found)
        if "test" in found:
            arguments.check_splits(script, training, data)
            assert data["test"]["prompt"] == ["test"]
        else:
            with pytest.raises(ValueError, match=r"no split 'test', found \['train'\].*--dataset_test_split"):
                arguments.check_splits(script, training, data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--use_peft"], "--use_peft is LoRA"),
        (["--model_name_or_path", "some/model", "--use_cpu"], "Name the data for some/model: --dataset_name"),
        (["--s0_alhpa", "1"], "--s0_alhpa"),
    ],
)
def test_options_that_make_no_sense(monkeypatch: pytest.MonkeyPatch, options: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(monkeypatch, *options)


@pytest.mark.parametrize(
    ("row", "message"),
    [({"prompt": "a"}, "tests"), ({"prompt": "a", "tests": ["f(1) == 2"]}, "must read 'assert call == value'")],
)
def test_grpo_refuses_data_without_tests(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    options = ["--model_name_or_path", "no/model", "--use_cpu", "--dataset_name", str(tmp_path / "rows.jsonl")]
    monkeypatch.setattr(sys, "argv", ["grpo.py", *options])
    with pytest.raises(ValueError, match=message):
        grpo.main()


def readme_scripts() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


@pytest.mark.filterwarnings("ignore")  # as a user sees them, who has asked for no errors
def test_the_scripts_of_the_readme_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they stand there, but for the model, which is the tiny one, and for the CPU."""
    tune, use = readme_scripts()
    model = str(EXAMPLES / "models" / "tiny-qwen3.5")
    rows = [{"prompt": "def f(x):", "completion": " return x"}, {"prompt": "def g(x):", "completion": " return x * x"}]
    (tmp_path / "solutions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 8))
    tune = tune.replace("Qwen/Qwen3.5-4B", model).replace("bf16=True", "bf16=True, use_cpu=True, report_to='none'")
    again = tune.replace('"my-task"', '"other-task"')
    use = use.replace("Qwen/Qwen3.5-4B", model)
    monkeypatch.chdir(tmp_path)
    for script in (tune, again, use):
        exec(script, {})
    assert (tmp_path / "my-task" / "adapter_model.safetensors").exists()
