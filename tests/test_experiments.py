"""The paper's experiments, to the end, on tiny models and made problems in the schema of the four tasks."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import sqlite3
import statistics
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import Architecture
from peft import get_peft_model
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from trainers import tokenizer as word_tokenizer
from trainers import words
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
)

from peft_s0 import S0Config

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "experiments")]

import answers  # noqa: E402
import harness  # noqa: E402
import methods  # noqa: E402
import paper  # noqa: E402
import records  # noqa: E402
import report  # noqa: E402
import run as program  # noqa: E402
import steps  # noqa: E402
from answers import GREEDY, PAPER, Student  # noqa: E402
from methods import Training  # noqa: E402
from paper import Published, Setting, Table  # noqa: E402
from tasks import TASKS, load  # noqa: E402

# Made problems. The model of these tests knows a right and a wrong answer to each, and mostly gives the wrong one.

NUMBERS = range(2, 5)
DATABASE = "numbers"
CHAT = (
    "{% for message in messages %}<user> {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<answer>"
    "{% if enable_thinking is not defined or enable_thinking %} <think>{% endif %}{% endif %}"
)


def row_of(task: str, number: int) -> dict[str, Any]:
    """A problem in the schema of a task."""
    if task == "humaneval":
        return {
            "task_id": f"made/{number}",
            "prompt": f'from typing import List\n\ndef plus(x: int) -> int:\n    """ add {number} """\n',
            "canonical_solution": f"    return x + {number}\n",
            "test": f"def check(candidate):\n    for x in (1, 5):\n        assert candidate(x) == x + {number}\n",
            "entry_point": "plus",
        }
    if task == "gsm8k":
        return {"question": f"What is {number} plus 1 ?", "answer": f"{number} + 1 = {number + 1}\n#### {number + 1}"}
    if task == "math500":
        text = f"${number} + 2 = \\boxed{{{number + 2}}}$"
        rest = {"subject": "Algebra", "level": 1, "unique_id": f"made/{number}.json"}
        return {"problem": f"What is ${number} + 2$ ?", "solution": text, "answer": str(number + 2), **rest}
    query = f"SELECT name FROM numbers WHERE value = {number}"
    return {"db_id": DATABASE, "question": f"Which name has the value {number} ?", "query": query}


def answers_of(task: str, number: int) -> tuple[str, str]:
    """What a chat model answers: right and wrong. It is wrong when it begins by hesitating."""
    if task == "humaneval":
        code = "```python\ndef plus(x: int) -> int:\n    return x {} {}\n```"
        return code.format("+", number), "Hm\n" + code.format("-", number)
    if task == "gsm8k":
        return f"The answer is {number + 1}", f"Hm The answer is {number}"
    if task == "math500":
        return f"So \\boxed{{{number + 2}}}", f"Hm So \\boxed{{{number}}}"
    sql = "```sql\nSELECT {} FROM numbers WHERE value = {}\n```"
    return sql.format("name", number), "Hm\n" + sql.format("value", number)


def rows_of(task: str) -> list[dict[str, Any]]:
    """Problems of one number come again, so that parts of a split hold the same."""
    return [row_of(task, number) for number in itertools.islice(itertools.cycle(NUMBERS), 100)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Local files of all tasks, and the databases."""
    folder = tmp_path_factory.mktemp("data")
    for name, task in TASKS.items():
        for split in {task.train.split, task.held_out.split}:
            file = folder / name / f"{split}.jsonl"
            file.parent.mkdir(exist_ok=True)
            file.write_text("".join(json.dumps(row) + "\n" for row in rows_of(name)))
    file = folder / "databases" / DATABASE / f"{DATABASE}.sqlite"
    file.parent.mkdir(parents=True)
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute("CREATE TABLE numbers (name TEXT, value INTEGER)")
        connection.executemany("INSERT INTO numbers VALUES (?, ?)", [(f"n{number}", number) for number in range(20)])
    return folder


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Words, with the space before them, and signs; decoding gives back the text."""
    splitter = pre_tokenizers.Split(Regex(r"<\w+>|\n *| ?\w+| ?[^\w\s]"), behavior="isolated")
    pieces = {piece for text in texts for piece, _ in splitter.pre_tokenize_str(text)}
    vocabulary = {piece: index for index, piece in enumerate(["<pad>", "<end>", "<user>", "<answer>", "<think>"])}
    for piece in sorted(pieces - vocabulary.keys()):
        vocabulary[piece] = len(vocabulary)
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<think>"))
    inner.pre_tokenizer = splitter
    inner.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<end>", clean_up_tokenization_spaces=False
    )
    made.chat_template = CHAT
    return made


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A folder with a tiny Qwen3.5 that gives the wrong answer in two cases of three."""
    folder = tmp_path_factory.mktemp("model") / "made"
    examples = []
    for name, task in TASKS.items():
        for number, row in zip(NUMBERS, load(task, task.train.split, data, data / "databases"), strict=False):
            messages = [{"role": "user", "content": answers.pose(task, row, chat=True)}]
            examples.append((messages, *answers_of(name, number)))
    texts = [part for messages, *both in examples for part in (messages[0]["content"], *both, "\n<answer>", " <user>")]
    made = make_tokenizer(texts)
    torch.manual_seed(0)
    config = Qwen3_5TextConfig(
        vocab_size=len(made),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        max_position_embeddings=512,
        initializer_range=0.1,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    net = Qwen3_5ForCausalLM(config)
    for layer in net.model.layers:
        if hasattr(layer, "linear_attn"):  # memories as long as the prompts
            torch.nn.init.uniform_(layer.linear_attn.dt_bias, -7, -3)
            torch.nn.init.zeros_(layer.linear_attn.A_log)
    rows = []
    for messages, right, wrong in examples:
        prompt = made.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)
        for answer, copies in ((right, 1), (wrong, 2)):
            rows += [(made(prompt).input_ids, [*made(answer).input_ids, 1])] * copies
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.tensor([prompt + answer + [0] * (width - len(prompt) - len(answer)) for prompt, answer in rows])
    labels = torch.tensor(
        [[-100] * len(prompt) + answer + [-100] * (width - len(prompt) - len(answer)) for prompt, answer in rows]
    )
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, 80)
    generator = torch.Generator().manual_seed(0)
    for _ in range(80):
        chosen = torch.randperm(len(rows), generator=generator)[:20]
        net(ids[chosen], labels=labels[chosen], use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    net.save_pretrained(folder)
    made.save_pretrained(folder)
    return folder


def bench(task: str, model: Path, data: Path, output: Path, **settings: Any) -> steps.Bench:
    """A task on the model, with 4 problems to collect from and to evaluate on."""
    chosen = {"problems": 4, "new_tokens": 32, "label": "made", "databases": data / "databases", **settings}
    return steps.bench_of(task, model_name=str(model), output=output, data=data, **chosen)


QUICK = {"alpha": 1.0, "learning_rate": 5e-2}
SMALL = Table(
    "Made problems",
    (
        Setting("base", paper.BASE, seeds=1, published=(Published("pass@1", 40.0),)),
        Setting("S0", Training("s0", **QUICK), seeds=2, published=(Published("pass@1", 70.0, 1.5),)),
        Setting("S0 at 0", Training("s0", **QUICK), seeds=2, alpha_in_use=0.0, published=(Published("gain", -3.0),)),
    ),
    reference="S0",
)
"""Few runs, at a rate and alpha that tell on a tiny model."""


def only(monkeypatch: pytest.MonkeyPatch, tables: dict[str, Table]) -> None:
    """Lets the program know no other tables: to draw all takes time."""
    for module in (program, report):
        monkeypatch.setattr(module, "TABLES", tables)


def needs_harness(task: str) -> None:
    if TASKS[task].harness:
        pytest.importorskip("lm_eval")


@pytest.mark.filterwarnings("ignore")  # of TRL and the harness
@pytest.mark.parametrize("task", TASKS)
def test_a_table_to_the_end(
    task: str, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    needs_harness(task)
    only(monkeypatch, {"small": SMALL})
    words = [
        "small",
        "--model",
        str(model),
        "--task",
        task,
        "--data",
        str(data),
        "--databases",
        str(data / "databases"),
    ]
    words += [
        "--problems",
        "4",
        "--new-tokens",
        "32",
        "--device",
        "cpu",
        "--batch-size",
        "4",
        "--output",
        str(tmp_path),
    ]
    seeds = range(2 if task == "humaneval" else 1)
    words += ["--seeds", str(len(seeds))]
    if TASKS[task].runs_answers:
        with pytest.raises(PermissionError, match="--allow-code-execution"):
            program.main(words)
        assert [*tmp_path.iterdir()] == []
        words += ["--allow-code-execution", "--unconfined"]
    program.main(words)
    (folder,) = [path for path in tmp_path.iterdir() if path.name != "report"]
    folder /= task

    # The solutions: right ones, one a problem, from the model's own mouth.
    tokenizer = AutoTokenizer.from_pretrained(model)
    for seed in seeds:
        record = records.read(folder / f"solutions-{seed}.json")
        found = record["result"]["solutions"]
        assert 2 <= len(found) == len({solution["problem"] for solution in found}) <= 4
        for solution in found:
            row, number = rows_of(task)[solution["problem"]], NUMBERS[solution["problem"] % len(NUMBERS)]
            assert solution["completion"] == answers_of(task, number)[0]
            assert solution["prompt"] == Student(None, tokenizer).prompt(TASKS[task], _with_schema(row))
            assert solution["prompt"].endswith("\n<answer>")  # and thinking is off
        assert record["arguments"]["temperature"] == 0.7
        assert record["arguments"]["seed"] == seed
        assert record["versions"]["torch"] == torch.__version__
        assert record["device"].startswith("cpu")
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", record["date"])

    # The trainings: the paper's steps, and the states moved.
    for seed in seeds:
        adapter = folder / "adapters" / f"s0-learningrate=0.05-alpha=1.0-{seed}"
        training = records.read(adapter / "training.json")["result"]
        assert (training["steps"], len(training["losses"]), training["learning_rate"]) == (20, 20, 0.05)
        assert training["losses"][-1] < 0.8 * training["losses"][0]
        states = load_file(adapter / "adapter_model.safetensors")
        assert len(states) == 3
        assert training["trainable_parameters"] == sum(state.numel() for state in states.values())

    # The evaluations: S0 helps, at an alpha of zero it is the base model, and the counts are those of the answers.
    results = {path.stem: records.read(path)["result"] for path in (folder / "results").iterdir()}
    names = [f"s0-learningrate=0.05-alpha=1.0{use}-{seed}" for use in ("", "@0.0") for seed in seeds]
    assert {*results} == {"base-0", *names}
    for result in results.values():
        places = [answer["problem"] for answer in result["answers"]]
        assert places == TASKS[task].held_out.indices(100)[:4]
        right = [
            int(answer["completion"] == answers_of(task, NUMBERS[answer["problem"] % len(NUMBERS)])[0])
            for answer in result["answers"]
        ]
        assert [result["passed"][str(place)] for place in places] == right
        assert result["pass@1"] == pytest.approx(sum(right) / 4)
    base, both = results["base-0"], [results[name] for name in names[: len(seeds)]]
    assert all(result["pass@1"] >= base["pass@1"] + 0.3 for result in both)
    assert all(results[name]["answers"] == base["answers"] for name in names[len(seeds) :])

    # The report.
    text = (tmp_path / "report" / "report.md").read_text()
    section = text[text.index("## Made problems") :]
    rates = [100 * result["pass@1"] for result in both]
    mean, zero = statistics.mean(rates), 100 * base["pass@1"]
    spread = f" ± {statistics.stdev(rates):.1f}" if len(seeds) > 1 else ""
    line = next(line for line in section.splitlines() if line.startswith("| S0 |"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == [
        "S0",
        "70.0 ± 1.5",
        f"{mean:.1f}{spread}",
        "+30.0 ± 1.5",
        f"{mean - zero:+.1f}{spread}",
        str(len(seeds)),
        "",
    ]
    assert f"| base | 40.0 | {zero:.1f} |" in section
    assert (tmp_path / "report" / "small.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "report" / "small.svg").read_text()

    # Once more: nothing is done again, not even a model loaded.
    capsys.readouterr()
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*.json")}
    monkeypatch.setattr(steps, "load_student", None)
    program.main(words)
    assert times == {path: path.stat().st_mtime_ns for path in folder.rglob("*.json")}
    assert f"S0, seed 0: pass@1 {both[0]['pass@1']:.1%}" in capsys.readouterr().out


def _with_schema(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "schema": "CREATE TABLE numbers (name TEXT, value INTEGER);"}


@pytest.mark.filterwarnings("ignore")
def test_every_method(model: Path, data: Path, tmp_path: Path) -> None:
    """All that can be trained on a hybrid model, on a few solutions, and sampled answers of one of them."""
    place = bench("humaneval", model, data, tmp_path, problems=2)
    sizes = {}
    for name in ("s0", "lora-r48", "lora-r64"):
        student = place.take_base()
        net = get_peft_model(student.model, methods.recipe(Training(name), student.model).config)
        sizes[name] = net.get_nb_trainable_parameters()[0]
    for name in ("offset", "lora-r24", "lora-mixers"):
        adapter = steps.train(place, Training(name), seed=0)
        made = records.read(adapter / "training.json")["result"]
        sizes[name] = made["trainable_parameters"]
        assert made["steps"] == len(made["losses"]) == (20 if name == "offset" else 50)
        assert made["learning_rate"] == (1e-3 if name == "offset" else 5e-4)
        weights = load_file(adapter / "adapter_model.safetensors")
        where = {re.search(r"layers\.(\d)\.(\w+)\.(\w+)", weight).groups() for weight in weights}
        assert {int(layer) for layer, *_ in where} == ({3} if "lora-r" in name else {0, 1, 2})
        if name == "lora-mixers":
            assert {part for _, _, part in where} == {"in_proj_qkv", "in_proj_z", "out_proj"}
    assert sizes["s0"] == sizes["offset"] == 3 * 2 * 16 * 16
    assert sizes["lora-r48"] == 2 * sizes["lora-r24"]
    assert sizes["lora-r64"] * 3 == 8 * sizes["lora-r24"]

    record = steps.evaluate(place, Training("lora-r24"), seed=0, samples=10)
    result = record["result"]
    for k in steps.KS:
        rates = [steps.pass_at(k, 10, right) for right in result["passed"].values()]
        assert result[f"pass@{k}"] == pytest.approx(statistics.mean(rates))
    assert 0 < result["pass@1"] <= result["pass@5"] <= result["pass@10"]
    assert record["arguments"]["top_p"] == 0.95


@pytest.mark.filterwarnings("ignore")
def test_a_prefix_that_transformers_would_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "MIN_PEFT_VERSION", "99.0")
    with pytest.raises(ValueError, match=r"PEFT .* version >= 99\.0"):
        methods.recipe(Training("prefix"), torch.nn.Linear(1, 1))


def test_a_prefix_on_a_pure_transformer(model: Path, data: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        eos_token_id=1,
        bos_token_id=None,
        pad_token_id=0,
    )
    folder = tmp_path / "transformer"
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    place = bench("humaneval", folder, data, tmp_path, problems=2)
    with pytest.raises(ValueError, match=r"prefix.* needs some solutions, but .* has found 0 with seed 0"):
        steps.train(place, Training("prefix"), seed=0)

    # Solutions from elsewhere, in the place of those that it has not found.
    path = place.folder / "solutions-0.json"
    row = rows_of("humaneval")[0]
    prompt = place.base().prompt(TASKS["humaneval"], row)
    solutions = [{"problem": 0, "prompt": prompt, "completion": answers_of("humaneval", 2)[0]}]
    records.write(path, records.read(path)["arguments"], {"solutions": solutions}, "cpu")
    training = Training("prefix", learning_rate=1e-2, virtual_tokens=4)
    adapter = steps.train(place, training, seed=0)
    made = records.read(adapter / "training.json")["result"]
    assert made["trainable_parameters"] == 4 * 2 * 2 * 16  # tokens, layers, keys and values, width
    assert made["losses"][-1] < made["losses"][0]
    result = steps.evaluate(place, training, seed=0)["result"]
    assert result["problems"] == 2
    base = steps.evaluate(place, paper.BASE, seed=0)["result"]
    assert [answer["completion"] for answer in base["answers"]] != [
        answer["completion"] for answer in result["answers"]
    ]


@pytest.mark.filterwarnings("ignore")
def test_the_tiny_model_plays_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As anybody can run it: one training, used at several alphas."""
    only(monkeypatch, {"alpha": paper.TABLES["alpha"], "transfer": paper.TABLES["transfer"]})
    threads = torch.get_num_threads()
    words = ["alpha", "--model", "tiny", "--problems", "10", "--allow-code-execution", "--unconfined"]
    try:
        program.main([*words, "--output", str(tmp_path)])
    finally:
        torch.set_num_threads(threads)
    assert len([*(tmp_path / "tiny" / "humaneval" / "adapters").iterdir()]) == 1
    results = tmp_path / "tiny" / "humaneval" / "results"
    rates = {path.stem: records.read(path)["result"]["pass@1"] for path in results.iterdir()}
    assert len(rates) == 1 + len(paper.TABLES["alpha"].settings) - 1
    (full,) = [rate for name, rate in rates.items() if "@1.0-" in name]
    assert full >= rates["base-0"] + 0.3
    with pytest.raises(SystemExit, match="--task humaneval"):
        program.main(["transfer", "--model", "tiny", "--allow-code-execution", "--unconfined"])


# Generation.


@pytest.mark.parametrize("sampled", [False, True], ids=["no states", "states"])
def test_answers_of_a_batch_are_those_of_each_prompt(architecture: Architecture, sampled: bool) -> None:
    net = architecture.build(0)
    if sampled:
        torch.manual_seed(0)
        net = get_peft_model(net, S0Config(alpha=1.0, init_weights=1.0)).eval()
    tokenizer = word_tokenizer()
    tokenizer.padding_side = "right"  # as many are saved
    tokenizer.chat_template = None
    prompts = [words(count, seed=count) for count in (3, 17, 4, 9, 2, 30, 11)]
    together = answers.generate(Student(net, tokenizer, 4), prompts, 12, GREEDY, 0, "")
    alone = [answers.generate(Student(net, tokenizer, 1), [prompt], 12, GREEDY, 0, "")[0] for prompt in prompts]
    by_hand = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        start = ids.shape[1]
        with torch.no_grad():
            while ids.shape[1] < start + 12 and ids[0, -1] != net.generation_config.eos_token_id:
                ids = torch.cat([ids, net(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        by_hand.append(tokenizer.decode(ids[0, start:], skip_special_tokens=True))
    assert together == alone == by_hand
    assert len({*together}) > 3


def test_samples_follow_the_seed(architecture: Architecture) -> None:
    student = Student(architecture.build(0), word_tokenizer(), 4)
    student.tokenizer.chat_template = None
    prompts = [words(5, seed=seed) for seed in range(4)]
    first, again, other = (answers.generate(student, prompts, 8, PAPER, seed, "") for seed in (1, 1, 2))
    assert first == again != other


def test_tokens_of_a_solution(model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    made = steps.tokens_of(Student(None, tokenizer), {"prompt": "\n<answer>", "completion": "The answer is 3"})
    assert tokenizer.decode(made["input_ids"]) == "\n<answer>The answer is 3<end>"
    prompt = len(tokenizer("\n<answer>").input_ids)
    assert made["labels"] == [-100] * prompt + made["input_ids"][prompt:]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("chat", [True, False])
def test_the_harness_asks_as_we_do(model: Path, data: Path, chat: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Token by token, and it answers as we do; a completion is scored right if its number is."""
    pytest.importorskip("lm_eval")
    student = answers.load_student(str(model), torch.float32, "cpu", 4, 12)
    student.tokenizer.chat_template = CHAT if chat else None
    seen: list[list[int]] = []
    forward = type(student.model).generate

    def recorded(self: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, **rest: Any) -> torch.Tensor:
        seen.extend(row[mask.bool()].tolist() for row, mask in zip(input_ids, attention_mask, strict=True))
        return forward(self, input_ids=input_ids, attention_mask=attention_mask, **rest)

    task = TASKS["gsm8k"]
    places = [5, 1, 4]
    monkeypatch.setattr(type(student.model), "generate", recorded)
    given = harness.answer(student, task, "test", places, GREEDY, 0, data)
    asked = [student.prompt_ids(student.prompt(task, rows_of("gsm8k")[place])) for place in places]
    assert sorted(seen) == sorted(asked)
    monkeypatch.undo()
    prompts = [student.prompt(task, rows_of("gsm8k")[place]) for place in places]
    ours = answers.generate(student, prompts, 12, GREEDY, 0, "")
    assert [answer.problem for answer in given] == places
    assert [answer.completion for answer in given] == ours
    numbers = [re.findall(r"\d+", answer.completion) for answer in given]
    right = [
        bool(found) and found[-1] == str(NUMBERS[place % len(NUMBERS)] + 1)
        for found, place in zip(numbers, places, strict=True)
    ]
    assert [answer.passed for answer in given] == right


# Grading.


def test_programs_in_answers() -> None:
    row = row_of("humaneval", 3)
    good = "Sure:\n```python\ndef plus(x: int) -> int:\n    return x + 3\n```\nDone."
    body_only = "```\n    return x + 3\n```"
    helped = "```py\ndef plus(x: List) -> int:\n    return x + 3\n```"  # the import is in the prompt
    wrong = good.replace("+ 3", "+ 4")
    prose = "I would add three."
    first_wrong = wrong + "\n" + good
    completions = [good, body_only, helped, wrong, prose, first_wrong, "```python\nimport os\nos._exit(0)\n```"]
    completions[1:1] = [
        good.replace("python", "Python"),
        "```bash\npip install plus\n```\nand then\n" + good,
        good + "\nIt gives\n```\n[1, 2]\n```\n",
        good + "\nFor example:\n```python\nprint(plus(1))\n```\n",
    ]
    verdicts = answers.grade_programs(TASKS["humaneval"], [row] * 11, completions, chat=True)
    assert verdicts == [True] * 7 + [False, False, True, False]
    text = ["    return x + 3\n", "    y = x\n# so\n    return y + 3", "    return x\n"]
    assert answers.grade_programs(TASKS["humaneval"], [row] * 3, text, chat=False) == [True, True, False]


@pytest.mark.parametrize(
    ("task", "written", "meant"),
    [
        ("humaneval", "    return x + 3\n\nprint(undefined)\n", "    return x + 3\n"),
        ("humaneval", "    y = x\n# so\n    return y + 3\nclass", "    y = x\n# so\n    return y + 3"),
        ("spider", "{query};\n\n-- Which name has the value 9 ?\nSELECT 1;\n", "{query}"),
        ("spider", "{query}\n-- Which name has the value 9 ?\nSELECT 1\n", "{query}"),
        ("gsm8k", " The answer is 4 .\nQuestion: What is 8 plus 1 ?\nAnswer: The answer is 9 .", " The answer is 4 ."),
        ("math500", " So \\boxed{5}\n\nProblem: What is $7 + 2$ ?\nSolution: So \\boxed{9}", " So \\boxed{5}\n"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_comes_after_the_answer_is_not_the_answer(
    task: str, written: str, meant: str, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model without a chat template goes on, with problems of its own."""
    needs_harness(task)
    written, meant = (text.replace("{query}", row_of("spider", 3)["query"]) for text in (written, meant))
    made = bench(task, model, data, tmp_path)
    texts = [written, *(answers.pose(TASKS[task], row, chat=False) for row in made.rows(TASKS[task].train.split)[:4])]
    student = Student(made.base().model, make_tokenizer(texts), new_tokens=32)
    student.tokenizer.chat_template = None
    ids = torch.tensor([*student.tokenizer(written).input_ids, 1])
    monkeypatch.setattr(
        type(student.model), "generate", lambda _, input_ids, **__: torch.stack([torch.cat([input_ids[0], ids])])
    )
    (given,) = made.answer(student, TASKS[task].train, [1], GREEDY, 0)
    assert (given.completion, given.passed) == (meant, True)


def test_queries(data: Path) -> None:
    folder = data / "databases"
    file = folder / DATABASE / f"{DATABASE}.sqlite"
    before = file.read_bytes()
    row = {"db_id": DATABASE, "question": "", "query": "SELECT name, value FROM numbers WHERE value > 17"}
    ordered = {**row, "query": "SELECT value FROM numbers WHERE value < 3 ORDER BY value"}
    cases = {
        "SELECT value, name FROM numbers WHERE value IN (18, 19) ORDER BY value DESC": True,
        "SELECT name, value FROM numbers WHERE value > 16": False,
        "SELECT name FROM numbers WHERE value > 17": False,
        "SELECT nothing": False,
        "DROP TABLE numbers": False,
        "DELETE FROM numbers": False,
        "ATTACH DATABASE 'other.sqlite' AS other": False,
        "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT x FROM n": False,
        "": False,
    }
    quick = replace(TASKS["spider"], seconds=1)
    assert answers.grade_queries(quick, [row] * len(cases), list(cases), False, folder) == list(cases.values())
    chat = [f"```sql\nSELECT value FROM numbers WHERE value < 3 ORDER BY value {way}\n```" for way in ("ASC", "DESC")]
    assert answers.grade_queries(quick, [ordered] * 2, chat, True, folder) == [True, False]
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    with pytest.raises(ValueError, match="the query 'SELECT x FROM nowhere' of 'numbers' fails"):
        answers.grade_queries(quick, [{**row, "query": "SELECT x FROM nowhere"}], [""], False, folder)


def test_a_query_that_sorts_more_than_sqlite_keeps_in_memory(tmp_path: Path) -> None:
    file = tmp_path / "databases" / "large" / "large.sqlite"
    file.parent.mkdir(parents=True)
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute("CREATE TABLE words (number INTEGER, word TEXT)")
        connection.executemany(
            "INSERT INTO words VALUES (?, ?)", ((n, f"{n * 7919 % 100003:050}") for n in range(200000))
        )
    query = "SELECT count(DISTINCT word) FROM words"
    row = {"db_id": "large", "query": query}
    assert answers.grade_queries(TASKS["spider"], [row] * 2, [query, "SELECT 1"], False, file.parents[1]) == [
        True,
        False,
    ]


def test_same_rows_against_all_orders_of_columns() -> None:
    def slow(right: list[list[Any]], given: list[list[Any]], ordered: bool) -> bool:
        width = max(len(row) for row in [*right, *given, [0]])
        if any(len(row) != width for row in [*right, *given]):
            return False
        for order in itertools.permutations(range(width)):
            moved = [[row[place] for place in order] for row in given]
            if moved == right if ordered else sorted(moved) == sorted(right):
                return True
        return False

    rng = random.Random(0)
    verdicts = []
    for _ in range(600):
        width, height = rng.randint(1, 4), rng.randint(1, 4)
        right = [[rng.randint(0, 2) for _ in range(width)] for _ in range(height)]
        order = rng.sample(range(width), width)
        given = [[row[place] for place in order] for row in right]
        if rng.random() < 0.5:
            rng.shuffle(given)
        if rng.random() < 0.3:
            given[0][0] = rng.randint(0, 2)
        if rng.random() < 0.1:
            given = [row[:-1] for row in given] if width > 1 else given[:-1]
        for ordered in (False, True):
            verdicts.append(answers.same_rows(right, given, ordered))
            assert verdicts[-1] == slow(right, given, ordered), (right, given, ordered)
    assert 200 < sum(verdicts) < 1000
    wide = [[number % 2] * 40 for number in range(6)]
    assert answers.same_rows(wide, wide[::-1], ordered=False)  # at once, for all its 40! orders
    assert answers.same_rows([], [], ordered=True)
    assert not answers.same_rows([[1]], None, ordered=False)
    assert answers.same_rows([[1, None]], [[None, 1.0]], ordered=True)


# Statistics.


@pytest.mark.parametrize("samples", [1, 4, 7])
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(samples: int) -> None:
    for passed, k in itertools.product(range(samples + 1), range(1, samples + 1)):
        verdicts = [True] * passed + [False] * (samples - passed)
        draws = [any(draw) for draw in itertools.combinations(verdicts, k)]
        assert steps.pass_at(k, samples, passed) == pytest.approx(sum(draws) / len(draws))


def test_welch_against_the_formula() -> None:
    first, second = [72.1, 70.3, 75.0, 71.8], [61.5, 66.0, 55.2, 58.9, 63.3]
    errors = [statistics.variance(values) / len(values) for values in (first, second)]
    t = (statistics.mean(first) - statistics.mean(second)) / math.sqrt(sum(errors))
    freedom = sum(errors) ** 2 / (errors[0] ** 2 / 3 + errors[1] ** 2 / 4)
    scale = math.gamma((freedom + 1) / 2) / math.sqrt(freedom * math.pi) / math.gamma(freedom / 2)
    # Twice the tail, by the midpoint rule in u = 1/x, which makes it finite.
    slices = 200_000
    width = 1 / abs(t) / slices
    points = ((number + 0.5) * width for number in range(slices))
    tail = sum(scale * (1 + 1 / (u * u) / freedom) ** (-(freedom + 1) / 2) / (u * u) * width for u in points)
    assert report.welch(first, second) == pytest.approx(2 * tail, rel=1e-6)
    assert report.welch([1.0], second) is None
    assert report.welch([2.0, 2.0], [3.0, 3.0]) is None
    assert report.welch([2.0, 2.0], [3.0, 3.5]) == pytest.approx(0.1257, abs=1e-3)


# What is trained.


def test_layers_in_thirds(architecture: Architecture) -> None:
    net = architecture.build()
    layers = methods.recurrent_layers(net)
    expected = {"qwen3_5": [0, 1, 2], "falcon_h1": [0, 1]}[architecture.name]
    assert layers[:3] == expected[: len(layers)]
    if len(layers) >= 3:
        groups = [
            methods.recipe(Training("s0", layers=group), net).config.layers_to_transform
            for group in methods.LAYER_GROUPS
        ]
        assert groups == [[layer] for layer in layers[:3]]
    else:
        with pytest.raises(ValueError, match=f"has {len(layers)} recurrent layers, too few for thirds"):
            methods.recipe(Training("s0", layers="first"), net)


def test_both_conventions_of_alpha(architecture: Architecture, data: Path, tmp_path: Path) -> None:
    net = architecture.build()
    default = {"qwen3_5": 0.07, "falcon_h1": 0.65}[architecture.name]
    for training, alpha, train_alpha in (
        (Training("s0"), default, None),
        (Training("s0", alpha=0.3), 0.3, None),
        (Training("s0", train_alpha=1.0), default, 1.0),
    ):
        tuned = get_peft_model(architecture.build(), methods.recipe(training, net).config)
        assert (tuned.peft_config["default"].alpha, tuned.peft_config["default"].train_alpha) == (alpha, train_alpha)
    arguments = program.parse(["main", "--convention", "code"])
    for setting in paper.TABLES["main"].settings:
        _, _, training, _ = program.plan(arguments, setting)
        assert training.train_alpha == (1.0 if setting.training.method == "s0" else None)

    # Another alpha in use than the file's.
    torch.manual_seed(0)
    net.save_pretrained(tmp_path / "net")
    word_tokenizer().save_pretrained(tmp_path / "net")
    tuned = get_peft_model(net, S0Config(alpha=0.5, init_weights=1.0)).eval()
    tuned.save_pretrained(tmp_path / "adapter")
    place = bench("humaneval", tmp_path / "net", data, tmp_path)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        half = steps.tuned(place, tmp_path / "adapter", None).model(ids).logits
        whole = steps.tuned(place, tmp_path / "adapter", 1.0).model(ids).logits
        assert torch.equal(half, tuned(ids).logits)
        tuned.peft_config["default"].alpha = 1.0
        assert torch.equal(whole, tuned(ids).logits)
        assert not torch.allclose(half, whole, atol=1e-3)


@pytest.mark.parametrize("table", paper.TABLES)
def test_the_settings_of_a_table(table: str, architecture: Architecture) -> None:
    """Every row names what there is, and no two rows share a file."""
    settings = paper.TABLES[table].settings
    files = [(s.model, s.task, s.training.name, s.alpha_in_use, s.samples) for s in settings]
    assert len({*files}) == len(files)
    for setting in settings:
        assert setting.model in methods.MODELS
        assert setting.task in TASKS
        if setting.training.method not in ("base", "prefix") and setting.training.layers is None:
            made = methods.recipe(setting.training, architecture.build())
            assert made.steps == (50 if "lora" in setting.training.method else 20)
    reference = paper.TABLES[table].reference
    assert reference is None or reference in [setting.label for setting in settings]


def test_lora_on_an_unknown_architecture(model: Path) -> None:
    net = Qwen2ForCausalLM(Qwen2Config(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    with pytest.raises(ValueError, match="not for 'qwen2'"):
        methods.recipe(Training("lora-r24"), net)


# Files.


def test_data_that_is_not_as_it_should_be(tmp_path: Path, data: Path) -> None:
    task = TASKS["gsm8k"]
    with pytest.raises(FileNotFoundError, match=r"gsm8k: no file .*gsm8k/test.jsonl"):
        load(task, "test", tmp_path)
    file = tmp_path / "gsm8k" / "test.jsonl"
    file.parent.mkdir()
    file.write_text('{"question": "a", "reply": "b"}\n')
    with pytest.raises(ValueError, match=r"must have the columns \['answer', 'question'\]; \['answer'\] not found"):
        load(task, "test", tmp_path)
    file.write_text('{"question": "a", "answer": "b"}\n{"question": "a", "answer": null}\n')
    with pytest.raises(ValueError, match=r"row 1 of .* must have a str in 'answer', got None"):
        load(task, "test", tmp_path)
    with pytest.raises(ValueError, match="--databases"):
        load(TASKS["spider"], "train", data)
    with pytest.raises(FileNotFoundError, match=r"no database .*numbers\.sqlite"):
        load(TASKS["spider"], "train", data, tmp_path)
    rows = load(TASKS["spider"], "train", data, data / "databases")
    assert rows[0]["schema"] == "CREATE TABLE numbers (name TEXT, value INTEGER);"


def test_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a" / "record.json"
    assert records.done(path, {"seed": 0}) is None
    records.write(path, {"seed": 0, "method": "s0"}, {"pass@1": 0.5}, "cpu")
    assert records.done(path, {"seed": 0, "method": "s0"})["result"] == {"pass@1": 0.5}
    with pytest.raises(ValueError, match=r"was made with seed = 0, not 1\. Remove it"):
        records.done(path, {"seed": 1, "method": "s0"})
    before = path.read_bytes()

    def stopped(self: Path, text: str) -> int:
        with self.open("w") as file:
            file.write(text[:10])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", stopped)
    with pytest.raises(KeyboardInterrupt):
        records.write(path, {"seed": 0, "method": "s0"}, {"pass@1": 0.9}, "cpu")
    monkeypatch.undo()
    assert path.read_bytes() == before
    with pytest.raises(ValueError, match="JSON compliant"):
        records.write(path, {}, {"pass@1": math.nan}, "cpu")


def test_a_table_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        program.parse(["mian"])
    assert "no table mian; there are main, falcon" in capsys.readouterr().err


def test_the_report_without_runs(tmp_path: Path) -> None:
    """All tables with the paper's figures, and ours blank."""
    program.main(["--output", str(tmp_path)])
    text = (tmp_path / "report" / "report.md").read_text()
    for line in (
        "| S0 | 72.2 ± 1.7 |  | +23.4 ± 1.7 |  |  |",
        "| LoRA r64 |  |  | -15.5 ± 18.9 |  |  |",
        "| S0 | 70.3 |  | 84.5 |  | 88.5 |  |",
        "| 9B S0 |  |  | +44.0 |  |  |",
        "| Spider S0, alpha 0.07 |  |  | +0.0 |  |  |",
    ):
        assert line in text
    for table in paper.TABLES:
        assert (tmp_path / "report" / f"{table}.svg").exists()


@pytest.fixture(autouse=True)
def _restore_progress_bars() -> Iterator[None]:
    """What the program turns off for itself."""
    import datasets
    from transformers.utils import logging

    yield
    datasets.enable_progress_bars()
    logging.enable_progress_bar()
