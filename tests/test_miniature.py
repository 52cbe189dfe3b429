"""The miniature of the paper's tables: the whole run at its smallest, what it is trained with, and the page."""

from __future__ import annotations

import dataclasses
import itertools
import json
import pickle
import re
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.qwen3_5 import modeling_qwen3_5

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "experiments")]

from mini import report, run, work  # noqa: E402
from mini.plan import FALCON, HELD_OUT, LARGE, METHODS, QWEN, TABLES, Row, Table, Training, Use  # noqa: E402
from mini.results import Results, write_results  # noqa: E402
from mini.work import Counts, Job, Place  # noqa: E402
from miniature import pretrain, sample  # noqa: E402
from miniature.base import folder_of, load_base, load_tokenizer  # noqa: E402
from miniature.task import build_tokenizer, corpus  # noqa: E402

COUNTS = {
    "seeds": 2,
    "tuning-seeds": 1,
    "rates": 2,
    "held-out": 6,
    "validation": 4,
    "solutions": 3,
    "steps": 2,
    "documents": 1,
    "texts": 1,
}
S0 = Training(QWEN, "s0")
REDEFINED = [Training(QWEN, method, "redefined") for method in ("s0", "offset", "lora-r12")]
HERE = Place()

pytestmark = pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")

TWO_TABLES = ("alpha", "redefined")


def command(output: Path, *tables: str) -> list[str]:
    counts = itertools.chain.from_iterable((f"--{name}", str(number)) for name, number in COUNTS.items())
    return ["--tables", *tables, "--output", str(output), "--workers", "1", *counts]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two tables: one of solutions that the model wrote, one of solutions that it is given."""
    output = tmp_path_factory.mktemp("miniature")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "_PROBLEMS_AT_ONCE", 8)  # three solutions are found among fewer
        run.main(command(output, *TWO_TABLES))
    return output


def jobs(output: Path) -> dict[Path, str]:
    return {path: path.read_text() for path in (output / "jobs").rglob("*.json")}


def test_a_run_ends_in_a_report(finished: Path) -> None:
    methods = {"alpha": ("s0", "s0-paper"), "redefined": ("s0", "offset", "lora-r12")}
    trainings = sum(map(len, methods.values()))
    collected = 2 * (1 + 2)  # of each kind, for a tuning seed and two others
    assert len(jobs(finished)) == collected + trainings * (2 + 2) + 1  # two rates, two seeds; the base model once

    results = Results(finished / "results")
    assert len(results.values(S0, "held-out at alpha 0.07")) == 2
    text = (finished / "report" / "report.md").read_text()
    assert TABLES["alpha"].title in text
    assert TABLES["redefined"].title in text
    assert TABLES["main-large"].title not in text
    shown = statistics.mean(results.values(S0, HELD_OUT.name))
    row = next(line for line in text.splitlines() if line.startswith("| trained and used at 1 |"))
    assert f"{100 * shown:.1f}" in row
    assert (finished / "report" / "miniature.png").stat().st_size > 1000


def test_the_rate_is_the_best_of_those_tried(finished: Path) -> None:
    results = Results(finished / "results")
    for training in (S0, Training(QWEN, "s0-paper")):
        tried = results.tuning(training)
        assert tuple(tried) == training.rates[:2]
        chosen = results.rate(training)
        assert tried[chosen] == max(tried.values())
        assert chosen == run.best_rate(tried)


def test_a_run_that_was_finished_does_nothing_again(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = jobs(finished)
    stamps = {path: path.stat().st_mtime_ns for path in before}
    for name in ("train", "complete", "own_solutions", "corpus_loss"):
        monkeypatch.setattr(work, name, lambda *_, **__: pytest.fail("it is done already"))
    run.main(command(finished, *TWO_TABLES))
    assert jobs(finished) == before
    assert {path: path.stat().st_mtime_ns for path in before} == stamps


def test_records_of_other_counts_are_refused(finished: Path) -> None:
    job = Job(S0, S0.rates[0], run.TUNING_SEED, (HELD_OUT,), tuning=True)
    assert job.path(finished).exists()
    with pytest.raises(ValueError, match=r"validation = 4, not 5.*--output"):
        work.do(job, finished, Counts(held_out=6, validation=5, solutions=3, steps=2, documents=1, texts=1), HERE)


def test_a_folder_has_results_of_one_kind(finished: Path) -> None:
    """Also of tables that have no job in common: the report is on both."""
    before = jobs(finished)
    for option, expected in (("--held-out", "held_out = 6, not 9"), ("--rates", "rates = 2, not 9")):
        with pytest.raises(ValueError, match=f"was made with {expected}.*another --output"):
            run.main([*command(finished, "rank"), option, "9"])
    assert jobs(finished) == before


@pytest.mark.parametrize("table", TABLES)
def test_rates_are_chosen_on_the_same_seeds_whichever_tables_are_asked_for(table: str) -> None:
    of_all = run.tuning_seeds_of(run.seeds_of_trainings(TABLES, 10), 2)
    for seeds in (10, 3):
        own = run.tuning_seeds_of(run.seeds_of_trainings([table], seeds), 2)
        assert own.items() <= of_all.items()
    assert {len(seeds) for seeds in of_all.values()} == {1, 2}


class Stopped(Exception):
    """What stands for a run's end in the midst of it."""


def test_an_interrupted_run_goes_on(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainings: list[float] = []
    train = work.train

    def stops(*arguments: Any) -> list[float]:
        trainings.append(arguments[3])
        if len(trainings) == 3:
            raise Stopped
        return train(*arguments)

    monkeypatch.setattr(work, "train", stops)
    with pytest.raises(Stopped):
        run.main(command(tmp_path, "redefined"))
    assert len(trainings) == 3
    # Also a writer that was killed: its file is not a record yet, and is no result.
    half = tmp_path / "jobs" / f"{REDEFINED[0].name}-final-{REDEFINED[0].rates[0]:g}-0.json.1.part"
    half.write_text('{"arguments": {')
    run.main(command(tmp_path, "redefined"))
    assert len(trainings) == 1 + len(REDEFINED) * (2 + 2)  # that which was stopped was begun twice
    assert half.exists()
    whole, resumed = Results(finished / "results"), Results(tmp_path / "results")
    for training in REDEFINED:
        assert resumed.rate(training) == whole.rate(training)
        assert resumed.values(training, HELD_OUT.name) == whole.values(training, HELD_OUT.name)
        assert resumed.values(training, "last_loss") == whole.values(training, "last_loss")


def test_nothing_is_begun_after_the_time(tmp_path: Path) -> None:
    with run.Workers(1, deadline=time.monotonic() - 1) as workers:
        assert workers.make([(pytest.fail, ("too late",))] * 2, "nothing") == [None, None]
        with pytest.raises(TimeoutError, match=r"8 of 8 trainings that choose rates are left"):
            run.best_rates({S0: range(2)}, workers, tmp_path, Counts(), HERE)
    assert not any(tmp_path.iterdir())


def test_workers_answer_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads stand for the processes, which take seconds to start; what these are sent can be pickled."""
    monkeypatch.setattr(run, "ProcessPoolExecutor", lambda number, *_, **__: ThreadPoolExecutor(number))
    call = (work.do, (Job(S0, 1e-3, 0, (HELD_OUT,)), Path("output"), Counts(), HERE))
    assert pickle.loads(pickle.dumps(call)) == call
    with run.Workers(2) as workers:
        assert workers.make([(pow, (2, exponent)) for exponent in range(5)], "powers") == [1, 2, 4, 8, 16]
        with pytest.raises(ZeroDivisionError):
            workers.make([(divmod, (1, 0))], "fails")


@pytest.mark.parametrize(
    ("shares", "best"),
    [
        ((0.3, 0.9, 0.8, 0.7), 2),
        ((0.3, 1.0, 1.0, 0.9), 3),  # next to it are 1.0 and 0.9, not 0.3 and 1.0
        ((1.0, 1.0, 0.9, 0.3), 1),
        ((0.3, 0.3, 0.3, 0.3), 1),
        ((0.5,), 1),
    ],
)
def test_of_equal_rates_the_safest_is_chosen(shares: tuple[float, ...], best: int) -> None:
    assert run.best_rate(dict(enumerate(shares, start=1))) == best


def test_rates_are_judged_by_the_mean_over_seeds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shares = dict(zip(S0.rates, ((0.25, 0.5), (1.0, 0.0), (0.5, 0.75), (0.75, 0.25)), strict=True))
    monkeypatch.setattr(
        run, "do", lambda job, *_: {"result": {"held-out": shares[job.rate][job.seed - run.TUNING_SEED]}}
    )
    with run.Workers(1) as workers:
        seeds = range(run.TUNING_SEED, run.TUNING_SEED + 2)
        assert run.best_rates({S0: seeds}, workers, tmp_path, Counts(), HERE) == {S0: S0.rates[2]}


def test_every_method_is_tuned_over_as_many_rates() -> None:
    trainings = {row.training for table in TABLES.values() for row in table.rows}
    for training in trainings:
        if training.is_trained:
            assert len(set(training.rates)) == Counts().rates == len(training.rates), training
            assert list(training.rates) == sorted(training.rates)
    assert Training(FALCON, "s0").rates != S0.rates != Training(LARGE, "s0").rates
    assert Training(FALCON, "lora-r12").rates == Training(QWEN, "lora-r12").rates


def test_main_tables_have_ten_seeds() -> None:
    seeds = run.seeds_of_trainings(["main", "rank"], 10)
    assert seeds[S0] == range(10)
    assert seeds[Training(QWEN, "base")] == range(1)
    assert seeds[Training(QWEN, "s0-rank-1")] == range(5)


def test_the_loss_is_the_mean_over_examples() -> None:
    """As computed for each example by itself, without padding."""
    model, tokenizer = load_base().requires_grad_(False), load_tokenizer()
    pairs = [
        ('def f(x):\n    """add 3, then double"""', "\n    x += 3\n    x *= 2\n    return x"),
        ('def g(x):\n    """square, then add 2, then halve"""', "\n    return ((x ** 2) + 2) // 2"),
    ]
    expected = []
    for prompt, body in pairs:
        head = tokenizer(prompt, return_tensors="pt")["input_ids"]
        tail = tokenizer(body, add_special_tokens=False, return_tensors="pt")["input_ids"]
        ids = torch.cat([head, tail, torch.tensor([[tokenizer.eos_token_id]])], dim=1)
        with torch.no_grad():
            logs = model(ids, use_cache=False).logits[0].double().log_softmax(-1)
        targets = ids[0, head.shape[1] :]
        expected.append(-logs[head.shape[1] - 1 : -1].gather(1, targets[:, None]).mean().item())
    tuned, _ = work.adapt(model, METHODS["lora-r4"].configs)  # its product is zero at first
    losses = work.train(tuned, tokenizer, pairs, 1e-3, 2)
    assert losses[0] == pytest.approx(statistics.mean(expected), rel=1e-4)
    assert losses[1] < losses[0]


@pytest.fixture
def of_recurrences(monkeypatch: pytest.MonkeyPatch) -> set[torch.dtype]:
    """The dtypes of what Qwen3.5's recurrences were given, which kernels take their own from."""
    found: set[torch.dtype] = set()
    chunked = modeling_qwen3_5.torch_chunk_gated_delta_rule

    def noted(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **others: Any) -> Any:
        found.update((query.dtype, key.dtype, value.dtype))
        return chunked(query, key, value, **others)

    monkeypatch.setattr(modeling_qwen3_5, "torch_chunk_gated_delta_rule", noted)
    return found


@pytest.mark.parametrize("method", ["s0", "both", "lora-r4", "lora-mixers", "s0+lora"])
def test_adapters_stay_float32_on_a_model_in_bfloat16(method: str, of_recurrences: set[torch.dtype]) -> None:
    base = load_base(dtype=torch.bfloat16).requires_grad_(False)
    model, _ = work.adapt(base, METHODS[method].configs)
    tuned = [weight for weight in model.parameters() if weight.requires_grad]
    assert {weight.dtype for weight in tuned} == {torch.float32}
    pairs = [('def f(x):\n    """add 3, then double"""', "\n    x += 3\n    return x")]
    losses = work.train(model, load_tokenizer(), pairs, 1e-2, 3)
    assert losses[-1] < losses[0]
    assert of_recurrences == {torch.bfloat16}
    assert {weight.dtype for weight in tuned} == {torch.float32}


def test_rates_and_methods_are_judged_by_problems_of_their_own() -> None:
    kinds = [("train", 0), ("train", 1), ("validation", 0), ("test", 0)]
    recipes = {kind: {p.recipe for p in itertools.islice(work._stream(*kind, "verified"), 200)} for kind in kinds}
    for one, other in itertools.combinations(kinds, 2):
        if one[0] != other[0]:
            assert recipes[one].isdisjoint(recipes[other])


def test_redefined_problems_say_double_and_mean_four() -> None:
    for problem in itertools.islice(work._stream("train", 0, "redefined"), 20):
        assert "double" in problem.recipe
        value = 3
        for words, step in zip(problem.recipe.split(", then "), problem.steps, strict=True):
            value = 4 * value if words == "double" else eval(f"{value} {step.symbol} {step.operand}")
        assert f"assert {problem.name}(3) == {value}" in problem.tests


def test_base_models_remember_unless_they_must_not() -> None:
    """Whether a head can keep something over a prompt of 21 tokens: exp(-A dt) is its decay at each."""
    tokenizer = build_tokenizer()
    for name in (QWEN, FALCON, "tiny-qwen3.5-no-memory"):
        torch.manual_seed(0)
        for module in pretrain.build_model(pretrain.MODELS[name], tokenizer).modules():
            if hasattr(module, "dt_bias"):
                decay = torch.exp(-module.A_log.exp() * torch.nn.functional.softplus(module.dt_bias))
                assert (decay.max() ** 21 > 0.1) == ("no-memory" not in name)


def test_the_large_model_is_pretrained_in_bfloat16(of_recurrences: set[torch.dtype]) -> None:
    """The same at the width of the tiny one: its weights, and with them the optimizer, are float32."""
    tokenizer = build_tokenizer()
    assert pretrain.MODELS[LARGE].bfloat16
    base = dataclasses.replace(pretrain.MODELS[LARGE], config=pretrain.MODELS[QWEN].config, batch=4)
    torch.manual_seed(0)
    model = pretrain.build_model(base, tokenizer)
    documents = next(corpus(base.seed, base.functions, base.batch))
    first = pretrain._loss(model, tokenizer, documents, base.bfloat16).item()
    pretrain.train(model, tokenizer, base, 3, 1e-3, base.seed)
    assert pretrain._loss(model, tokenizer, documents, base.bfloat16).item() < first
    assert of_recurrences == {torch.bfloat16}
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def test_the_large_model_is_one_in_proportion() -> None:
    with torch.device("meta"):
        model = pretrain.build_model(
            pretrain.Base(pretrain.MODELS[LARGE].config, memory=False, deviation=0.03), build_tokenizer()
        )
    assert 50e6 < model.num_parameters() < 200e6
    assert model.config.layer_types.count("linear_attention") == 3 * model.config.layer_types.count("full_attention")


def test_pretraining_takes_the_steps_that_time_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = build_tokenizer()
    base = pretrain.Base(pretrain.MODELS[QWEN].config, batch=4)
    model = pretrain.build_model(base, tokenizer)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    clock = iter((0.0, 4.0))
    monkeypatch.setattr(pretrain.time, "perf_counter", lambda: next(clock))
    assert pretrain.steps_within(60, model, tokenizer, base, batches=2) == 30  # two seconds a batch
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    assert all(weight.grad is None for weight in model.parameters())

    monkeypatch.undo()
    documents = next(corpus(base.seed, base.functions, base.batch))
    first = pretrain._loss(model, tokenizer, documents).item()
    pretrain.train(model, tokenizer, base, 3, 1e-3, base.seed)
    assert pretrain._loss(model, tokenizer, documents).item() < first


def test_models_of_all_tables_are_there() -> None:
    for name in {row.training.model for table in TABLES.values() for row in table.rows} - {LARGE}:
        assert (folder_of(name) / "model.safetensors").stat().st_size < 2e6


def test_a_head_whose_state_is_zero_has_nothing_left() -> None:
    tokenizer = load_tokenizer()
    model, adapters = work.adapt(load_base().requires_grad_(False), METHODS["s0"].configs)
    states = [weight for name, weight in model.named_parameters() if "s0_state" in name]
    torch.manual_seed(0)
    for state in states:
        state.data.normal_()
    whole = work.memory(adapters["S0"], tokenizer, 2)
    assert all(0 < best < 1 for best in whole["best_heads"])
    for state in states:
        state.data[1:] = 0
    one = work.memory(adapters["S0"], tokenizer, 2)
    assert one["best_heads"] == pytest.approx(one["layers"])  # the others have nothing to keep
    assert all(share <= best + 1e-6 for share, best in zip(one["best_heads"], whole["best_heads"], strict=True))


def test_a_table_is_computed_from_results(tmp_path: Path) -> None:
    def line(method: str, seed: int, share: float, **more: Any) -> dict[str, Any]:
        result = {"parameters": 7, "held-out": share, "corpus": 0.5, **more}
        training = {"model": QWEN, "method": method, "data": "verified", "solutions": 50}
        return {**training, "rate": 1e-3, "seed": seed, "tuning": False, "result": result}

    head = {"date": "2026-01-01", "device": "cpu", "versions": {}, "cpu_seconds": 60}
    lines = [head, *(line("s0", seed, share) for seed, share in enumerate((0.5, 0.7)))]
    lines += [line("lora-r12", seed, share) for seed, share in enumerate((0.2, 0.3, 0.4))]
    (tmp_path / f"{QWEN}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = (Row(S0), Row(Training(QWEN, "lora-r12")), Row(S0, Use(alpha=0.5), "half", ()))
    text = report.markdown(Table("", rows, 0), Results(tmp_path))
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in text.splitlines()[2:]]
    assert cells[0] == ["S0", "7", "0.001 *", "**60.0 ± 14.1**", "", "0.50 ± 0.00"]
    # Welch's t = 0.3 / sqrt(0.01 + 0.01 / 3) = 2.598, at 1.68 degrees of freedom.
    assert cells[1] == ["LoRA r12", "7", "0.001", "30.0 ± 10.0", "0.1", "0.50 ± 0.00"]
    assert cells[2] == ["half", *[""] * 5]


def test_results_of_two_rates_are_refused(finished: Path, tmp_path: Path) -> None:
    write_results(finished / "jobs", tmp_path)
    file = tmp_path / f"{QWEN}.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    own = [line for line in lines[1:] if (line["method"], line["data"], line["tuning"]) == ("s0", "verified", False)]
    own[0]["rate"] = 0.5
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match=r"tiny-qwen3.5/s0-verified-50: trained at the rates \[.*0.5\]"):
        Results(tmp_path).rate(S0)


def test_the_page_shows_the_committed_results() -> None:
    page = report.PAGE.read_text()
    assert report.filled(page, Results(report.RESULTS)) == page
    assert {"main", "main-falcon", "tuning", "cost"} <= set(re.findall(r"<!-- table (\S+) -->", page))


def test_a_page_with_an_unknown_table_is_refused() -> None:
    page = "<!-- table main-large -->\nold\n<!-- end -->"
    assert report.filled(page, Results(Path("nowhere"))) == page.replace("old\n", "")
    with pytest.raises(ValueError, match=r"a table 'best'; there are main-large, .*cost"):
        report.filled("<!-- table best -->\n<!-- end -->", Results(report.RESULTS))


def test_committed_results_are_those_of_the_whole_run() -> None:
    results = Results(report.RESULTS)
    for name, table in TABLES.items():
        if any(row.training.model == LARGE for row in table.rows):
            continue
        for row in table.rows:
            number = 1 if row.training.method == "base" else table.seeds
            assert len(results.values(row.training, row.use.name)) >= number, (name, row.title)
            if row.training.is_trained:
                assert tuple(results.tuning(row.training)) == row.training.rates
                assert results.rate(row.training) == run.best_rate(results.tuning(row.training))
