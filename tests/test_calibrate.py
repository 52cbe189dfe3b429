"""Choosing alpha on held-out data: what is measured, what is taken, and that nothing else changes."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, Architecture
from datasets import Dataset
from matplotlib.figure import Figure
from peft import LoraConfig, PeftModel, get_peft_model
from test_alpha import alphas, by_layer, named_layers
from torch import Tensor, nn
from torch.utils.data import DataLoader
from trainers import mean_loss, token_rows
from transformers import AutoModelForCausalLM
from tuned import Tuned, tune

from peft_s0 import S0Config, StateBank, calibrate_alpha
from peft_s0.calibrate import Calibration

GRID = [0.2, 0.7, 1.5]


@pytest.fixture(autouse=True, scope="module")
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def calibrate(*args: Any, **kwargs: Any) -> Calibration:
    return calibrate_alpha(*args, **{"progress": False, **kwargs})


def collate(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """A padded batch, as transformers' collators make it."""
    length = max(len(row["input_ids"]) for row in rows)
    rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
    pads = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    return {
        name: torch.tensor([row[name] + [pad] * (length - len(row[name])) for row in rows])
        for name, pad in pads.items()
    }


def in_tensors(rows: Dataset) -> Dataset:
    return rows.with_format("torch")


def with_pads(rows: Dataset) -> list[dict[str, Any]]:
    """Rows as a tokenizer with padding=True makes them, labelled by TRL's mask."""
    return [
        {
            "text": "what it was",
            "input_ids": [0, 0, *row["input_ids"]],
            "attention_mask": [0, 0, *[1] * len(row["input_ids"])],
            "completion_mask": [0, 0, *(int(label != -100) for label in row["labels"])],
        }
        for row in rows
    ]


def unequal(rows: Dataset) -> Iterator[dict[str, Tensor]]:
    """An iterator, which can be read once, over batches of one, three and one row."""
    part = list(rows)
    return iter([collate(part[:1]), collate(part[1:4]), collate(part[4:])])


SOURCES: dict[str, Callable[[Dataset], Any]] = {
    "dataset": lambda rows: rows,
    "tensors": in_tensors,
    "list": list,
    "pads": with_pads,
    "unequal": unequal,
    "loader": lambda rows: DataLoader(list(rows), batch_size=2, shuffle=True, collate_fn=collate),
}


@pytest.mark.parametrize("source", SOURCES)
def test_loss_is_the_mean_over_tokens(tuned: Tuned, source: str, tmp_path: Path) -> None:
    """Of each row by itself, however they come in batches; and the alpha with the least is set and saved."""
    rows = token_rows(5)
    expected = [mean_loss(tuned.base, rows)]
    for alpha in GRID:
        tuned.model.set_alpha(alpha)
        expected.append(mean_loss(tuned.model, rows))
    assert len({round(loss, 3) for loss in expected}) == 4, "the alphas cannot be told apart"
    tuned.model.set_alpha(0.7)
    result = calibrate(tuned.model, SOURCES[source](rows), GRID, batch_size=2)
    assert result.metric == "loss"
    assert [trial.alpha for trial in result.table] == [0.0, *GRID]
    assert [trial.value for trial in result.table] == pytest.approx(expected, rel=1e-5)
    assert result.baseline == pytest.approx(expected[0], rel=1e-6)
    best = GRID[expected[1:].index(min(expected[1:]))]
    assert (result.best, result.value) == (best, min(trial.value for trial in result.table[1:]))
    assert [trial.chosen for trial in result.table] == [trial.alpha == best for trial in result.table]
    tuned.model.save_pretrained(tmp_path)
    assert S0Config.from_pretrained(tmp_path).alpha == best


# A random model is best left alone; that is what the warning says.
pytestmark = pytest.mark.filterwarnings("ignore:calibrate_alpha. no alpha is better than 0")


def test_rows_without_labels(tuned: Tuned) -> None:
    """Every token counts but the first, of which nothing is predicted."""
    rows = token_rows(3)
    whole = Dataset.from_dict({"input_ids": rows["input_ids"], "labels": rows["input_ids"]})
    result = calibrate(tuned.model, rows.remove_columns("labels"), [0.7])
    assert result.value == pytest.approx(mean_loss(tuned.model, whole), rel=1e-5)


def test_a_first_token_behind_pads_does_not_count(tuned: Tuned) -> None:
    """Nothing predicts it, as nothing predicts that of a row without pads."""
    rows = list(token_rows(3))
    longest = max(len(row["input_ids"]) for row in rows) + 2
    padded = {"input_ids": [], "attention_mask": [], "labels": []}
    for row in rows:
        pads = longest - len(row["input_ids"])
        padded["input_ids"].append([0] * pads + row["input_ids"])
        padded["attention_mask"].append([0] * pads + [1] * len(row["input_ids"]))
        padded["labels"].append([-100] * pads + row["input_ids"])
    batch = {name: torch.tensor(values) for name, values in padded.items()}
    whole = Dataset.from_list([{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in rows])
    result = calibrate(tuned.model, [batch], [0.7])
    assert result.value == pytest.approx(mean_loss(tuned.model, whole), rel=1e-5)


def scored(values: dict[float, float]) -> Callable[[PeftModel], float]:
    """A score that is known for each alpha."""
    return lambda model: values[model.peft_config["default"].alpha]


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("values", "best"),
    [
        ({0.0: 1.0, 0.1: 2.0, 1.0: 5.0, 2.0: 4.0}, 1.0),
        # A collapse is never taken, not even where it looks best.
        ({0.0: 1.0, 0.1: 2.0, 1.0: NAN, 2.0: INF}, 0.1),
        ({0.0: NAN, 0.1: NAN, 1.0: -3.0, 2.0: NAN}, 1.0),
        # The middle of a plateau; of two, the lower.
        ({0.0: 0.0, 0.1: 1.0, 0.5: 1.0, 1.0: 1.0, 2.0: 0.5}, 0.5),
        ({0.0: 0.0, 0.1: 0.0, 0.5: 1.0, 1.0: 1.0, 2.0: 0.5}, 0.5),
        ({0.0: 0.0, 0.1: 1.0, 0.5: 1.0, 1.0: 1.0, 2.0: 1.0}, 0.5),
    ],
    ids=str,
)
def test_which_is_taken(tuned: Tuned, values: dict[float, float], best: float) -> None:
    result = calibrate(tuned.model, scored(values), [alpha for alpha in values if alpha])
    assert result.best == tuned.model.peft_config["default"].alpha == best
    assert [trial.value for trial in result.table] == pytest.approx(list(values.values()), nan_ok=True)


def test_zero_is_taken_only_if_it_is_in_the_grid(tuned: Tuned) -> None:
    values = {0.0: 3.0, 0.5: 2.0, 1.0: 1.0}
    with pytest.warns(
        UserWarning, match="no alpha is better than 0, whose score is 3; that of the best is 2. On these"
    ):
        assert calibrate(tuned.model, scored(values), [0.5, 1.0]).best == 0.5
    for grid in ([1, 0, 0.5], torch.tensor([1, 0, 0.5])):
        result = calibrate(tuned.model, scored(values), grid)
        assert result.best == 0.0
        assert [trial.alpha for trial in result.table] == [0.0, 0.5, 1.0]


def test_the_grid_by_default(architecture: Architecture) -> None:
    """Around the alpha of the adapter, with the family's; and what an adapter has layer by layer."""
    family, seen = {"qwen3_5": 0.07, "falcon_h1": 0.65}[architecture.name], []

    def score(model: PeftModel) -> float:
        seen.append(alphas(model))
        return float(seen[-1] == pytest.approx([0.3, *[1.0] * (architecture.states - 1)], rel=1e-6))

    model = tune(architecture, alpha=None).model
    table = calibrate(model, lambda model: 1.0).table
    assert [trial.alpha for trial in table] == pytest.approx(
        [0.0, *(factor * family for factor in (0.25, 0.5, 0.7, 1.0, 1.4, 2.0, 4.0))], rel=5e-3
    )
    model = tune(architecture, alpha=1.0, alpha_pattern={r"layers\.0\..*": 0.3}).model
    result = calibrate(model, score)
    assert {trial.alpha for trial in result.table} == {0.0, family, 0.25, 0.5, 0.7, 1.0, 1.4, 2.0, 4.0, None}
    assert len(seen) == 10
    assert alphas(model) == seen[-1] == pytest.approx(list(result.best.values()), rel=1e-6)
    assert "by layer" in str(result)


def test_a_score_that_samples(tuned: Tuned) -> None:
    """Each alpha gets the same random numbers, and the caller's are as they were."""
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    result = calibrate(tuned.model, lambda model: torch.rand(3)[2], GRID)
    assert len({trial.value for trial in result.table}) == 1
    assert torch.equal(torch.rand(2), expected)


def test_a_score_by_generating(tuned: Tuned) -> None:
    """In evaluation mode and without gradients, with the alpha of use and not that of training."""
    ids, base, seen = tuned.ids(4, 6), tuned.base, []
    tuned.model.peft_config["default"].train_alpha = 1.0
    tuned.model.peft_config["default"].normalize = True
    arguments = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    expected = base.generate(input_ids=ids, **arguments)

    def score(model: PeftModel) -> float:
        assert not model.training
        assert not torch.is_grad_enabled()
        seen.append(float(next(iter(named_layers(model).values())).effective_state("default").norm()))
        return float((model.generate(input_ids=ids, **arguments) != expected).float().mean())

    tuned.model.train()
    with torch.enable_grad():
        result = calibrate(tuned.model, score, [1.0, 30.0])
    assert seen == pytest.approx([0.0, 1.0, 30.0], rel=1e-5)
    assert result.baseline == 0.0
    assert result.best == 30.0
    assert tuned.model.training


def snapshot(model: PeftModel) -> dict[str, Any]:
    """All that a calibration may touch."""
    return {
        "modes": [module.training for module in model.modules()],
        "trained": [parameter.requires_grad for parameter in model.parameters()],
        "active": model.base_model.active_adapter,
        "configs": {name: config.to_dict() for name, config in model.peft_config.items()},
        "alphas": alphas(model),
        "random": torch.get_rng_state().tolist(),
    }


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("after", [0, 2, 5])
def test_interrupted(tuned: Tuned, error: type[BaseException], after: int) -> None:
    """Whenever it is, the model is as it was: modes, adapters, what is trained, alphas, random numbers."""
    tuned.model.add_adapter("second", S0Config(alpha=0.6, init_weights=1.0))
    tuned.model.set_alpha(by_layer(tuned.model))
    tuned.model.base_model.set_adapter(["default", "second"])
    tuned.model.set_requires_grad("second", requires_grad=False)
    tuned.model.train()
    next(iter(named_layers(tuned.model).values())).eval()
    before, calls = snapshot(tuned.model), []
    for adapter in ("default", "second"):

        def score(model: PeftModel) -> float:
            if len(calls) == after:
                raise error("stopped")
            calls.append(torch.rand(1))
            model.train()
            return 1.0

        with pytest.raises(error, match="stopped"):
            calibrate(tuned.model, score, GRID, adapter_name=adapter, per_layer=1)
        assert snapshot(tuned.model) == before
        calls.clear()


def test_an_adapter_that_is_not_active(tuned: Tuned) -> None:
    """It is while it is calibrated, alone; only its alpha is another afterwards."""
    tuned.model.add_adapter("second", S0Config(alpha=0.6, init_weights=1.0, inference_mode=False))
    before, rows = snapshot(tuned.model), token_rows(3)
    result = calibrate(tuned.model, rows, GRID, adapter_name="second")
    before["configs"]["second"]["alpha"] = result.best
    assert snapshot(tuned.model) == before
    tuned.model.set_adapter("second")
    assert mean_loss(tuned.model, rows) == pytest.approx(result.value, rel=1e-5)


def target(model: PeftModel, wanted: list[float]) -> float:
    """A score whose best is known layer by layer."""
    return -sum((alpha - best) ** 2 for alpha, best in zip(alphas(model), wanted, strict=True))


@pytest.mark.parametrize("passes", [1, 3])
def test_layer_by_layer(architecture: Architecture, passes: int, tmp_path: Path) -> None:
    """Half, twice or none of what a layer has, as often as there are passes, while it gets better."""
    wanted = [0.0, 2.0, 1.0][: architecture.states] if passes == 1 else [4.0, 0.5, 1.0][: architecture.states]
    model, calls = tune(architecture).model, []

    def score(model: PeftModel) -> float:
        calls.append(alphas(model))
        return target(model, wanted)

    result = calibrate(model, score, [0.5, 1.0], per_layer=passes)
    assert list(result.best) == list(named_layers(model))
    assert list(result.best.values()) == pytest.approx(wanted, rel=1e-6)
    assert alphas(model) == pytest.approx(wanted, rel=1e-6)
    assert result.value == pytest.approx(0.0, abs=1e-9)
    assert len(calls) == len(result.table) == 3 + 3 * passes * architecture.states
    assert [trial.layer for trial in result.table[:3]] == [None] * 3
    kept = [trial for trial in result.table if trial.chosen and trial.layer]
    assert {trial.layer for trial in kept} == {name for name, alpha in result.best.items() if alpha != 1.0}
    model.save_pretrained(tmp_path)
    assert alphas(PeftModel.from_pretrained(architecture.build(), tmp_path)) == alphas(model)
    assert calibrate(model, lambda model: target(model, wanted), [1.0], per_layer=9).value <= result.value


def test_a_pass_without_a_change_is_the_last(tuned: Tuned) -> None:
    """And what is no better is not taken."""
    result = calibrate(tuned.model, lambda model: 1.0, [1.0], per_layer=5)
    assert result.best == 1.0
    assert tuned.model.peft_config["default"].alpha_pattern == {}
    assert len(result.table) == 2 + 3 * tuned.architecture.states


def test_progress_says_how_many_there_will_be(tuned: Tuned, capsys: pytest.CaptureFixture[str]) -> None:
    calibrate_alpha(tuned.model, lambda model: 1.0, GRID, per_layer=2)
    shown = capsys.readouterr().err
    assert f"/{4 + 6 * tuned.architecture.states} [" in shown
    assert "alpha of 'default'" in shown
    calibrate_alpha(tuned.model, lambda model: 1.0, GRID, progress=False)
    assert capsys.readouterr().err == ""


def test_a_compiled_model_is_compiled_twice() -> None:
    """Once for its alphas as they are first, once for any, though single layers change alone later."""
    tuned = tune(next(row for row in ARCHITECTURES if row.name == "falcon_h1"))
    ids, graphs = tuned.ids(2, 9), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def score(model: nn.Module) -> float:
        return float(model(ids, use_cache=False).logits.square().mean())

    torch._dynamo.reset()
    compiled = torch.compile(tuned.model, backend=backend, fullgraph=True)
    found = calibrate(compiled, score, [0.5, 1.0], per_layer=1)
    assert len(graphs) == 2
    torch._dynamo.reset()
    tuned.model.set_alpha(0.7)
    expected = calibrate(tuned.model, score, [0.5, 1.0], per_layer=1)
    assert [trial.value for trial in found.table] == pytest.approx([t.value for t in expected.table], rel=1e-5)
    assert found.best == expected.best


def test_all_collapse(tuned: Tuned) -> None:
    before = snapshot(tuned.model)
    with pytest.raises(
        ValueError, match=r"the score is not finite for any alpha \(0.2: nan, 0.7: nan, 1.5: nan\). Try"
    ):
        calibrate(tuned.model, lambda model: NAN, GRID)
    assert snapshot(tuned.model) == before


LABELLED = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}


@pytest.mark.parametrize(
    ("data", "arguments", "error", "message"),
    [
        (5, {}, TypeError, "data must be a function score.* or an iterable of batches or rows, got int"),
        (LABELLED, {}, TypeError, "got dict"),
        ([], {}, TypeError, "dicts with input_ids and labels, but it gives nothing"),
        (["text"], {}, TypeError, "but it gives str"),
        ([{"text": "a"}], {}, TypeError, r"but it gives \['text'\]"),
        ([{"input_ids": torch.ones(1, 3)}], {}, ValueError, r"a batch has no labels, only \['input_ids'\]"),
        (
            [{"input_ids": torch.full((1, 3), 5), "labels": torch.ones(1)}],
            {},
            ValueError,
            r"shape \[1\], the logits \[",
        ),
        (
            [{**LABELLED, "position_ids": [0, 1, 2]}],
            {},
            ValueError,
            r"rows have \['position_ids'\], which is not known",
        ),
        ([{**LABELLED, "labels": [5]}], {}, ValueError, "a row has 3 tokens and 1 labels"),
        ([{**LABELLED, "labels": [5, -100, -100]}], {}, ValueError, "no token has a label: all are -100, or first"),
        ([LABELLED], {"batch_size": 0}, ValueError, "batch_size must be an integer >= 1, got 0"),
        ([LABELLED], {"grid": []}, ValueError, "the grid is empty"),
        ([LABELLED], {"grid": [0.1, -1]}, ValueError, "an alpha of the grid must be a finite number >= 0, got -1"),
        ([LABELLED], {"grid": [NAN]}, ValueError, "an alpha of the grid must be"),
        ([LABELLED], {"per_layer": -1}, ValueError, "per_layer must be a number of passes >= 0, got -1"),
        ([LABELLED], {"adapter_name": "other"}, ValueError, r"Unknown adapter 'other'; this model has \['default'\]"),
        ([{name: [row, row[:2]] for name, row in LABELLED.items()}], {}, TypeError, "must be a tensor .*, got a list"),
        (lambda model: "good", {}, TypeError, "the score must be a number, got str"),
        (lambda model: None, {}, TypeError, "the score must be a number, got NoneType"),
    ],
)
def test_bad_input(tuned: Tuned, data: Any, arguments: dict, error: type[Exception], message: str) -> None:
    before = snapshot(tuned.model)
    with pytest.raises(error, match=message):
        calibrate(tuned.model, data, **{"grid": [0.5], **arguments})
    assert snapshot(tuned.model) == before


def test_models_that_have_nothing_to_calibrate(tuned: Tuned, tmp_path: Path) -> None:
    for model in (
        tuned.base,
        get_peft_model(tuned.architecture.build(), LoraConfig(target_modules=["q_proj"])),
        tuned.model.base_model,
    ):
        with pytest.raises(TypeError, match="calibrate_alpha needs a PEFT model with S0 adapters, got"):
            calibrate(model, [LABELLED])
    with tuned.model.disable_adapter(), pytest.raises(RuntimeError, match="while adapters are disabled"):
        calibrate(tuned.model, [LABELLED])
    tuned.model.save_pretrained(tmp_path)
    bank = StateBank(tuned.model, capacity=1)
    bank.add("task", tmp_path)
    with bank.use(["task"]), pytest.raises(RuntimeError, match="or a StateBank is used"):
        calibrate(tuned.model, [LABELLED])


@pytest.fixture
def result(tuned: Tuned) -> Calibration:
    return calibrate(tuned.model, scored({0.0: 0.25, 0.05: 0.5, 1.0: 0.75, 2.0: NAN}), [0.05, 1.0, 2.0])


def test_the_table(result: Calibration, tuned: Tuned) -> None:
    assert str(result).splitlines() == [
        "alpha   score",
        "    0  0.2500  without states",
        " 0.05  0.5000",
        "    1  0.7500  chosen",
        "    2     nan  not finite",
    ]
    name = next(iter(named_layers(tuned.model)))
    layered = calibrate(tuned.model, lambda model: target(model, [0.0, 1.0, 1.0][: tuned.architecture.states]), [1.0])
    assert "layer" not in str(layered)
    wanted = [0.0, 1.0, 1.0][: tuned.architecture.states]
    layered = calibrate(tuned.model, lambda model: target(model, wanted), [1.0], per_layer=1)
    assert str(layered).splitlines()[0].split() == ["alpha", "score", "layer"]
    assert [line.split() for line in str(layered).splitlines()][3][2:] == ["chosen", name]


def test_as_json(result: Calibration, tmp_path: Path) -> None:
    result.save(tmp_path / "alpha.json")
    content = json.loads((tmp_path / "alpha.json").read_text())
    assert content == json.loads(result.to_json())
    assert {name: content[name] for name in ("adapter", "metric", "best", "value", "baseline")} == {
        "adapter": "default",
        "metric": "score",
        "best": 1.0,
        "value": 0.75,
        "baseline": 0.25,
    }
    assert content["table"][2] == {"alpha": 1.0, "value": 0.75, "layer": None, "chosen": True}
    assert content["table"][3]["value"] is None


def test_a_picture(result: Calibration, tuned: Tuned, tmp_path: Path) -> None:
    result.plot(tmp_path / "alpha.png")
    assert (tmp_path / "alpha.png").read_bytes().startswith(b"\x89PNG")
    axes = Figure().subplots()
    assert result.plot(axes) is axes
    lines = {line.get_label(): line for line in axes.lines}
    assert [list(point) for point in lines["one alpha for all layers"].get_xydata()] == [[0.05, 0.5], [1.0, 0.75]]
    assert list(lines["not finite"].get_xdata()) == [2.0]
    assert list(lines["alpha 0"].get_ydata()) == [0.25, 0.25]
    assert [list(point) for point in lines["chosen"].get_xydata()] == [[1.0, 0.75]]
    assert (axes.get_xscale(), axes.get_xlabel(), axes.get_ylabel()) == ("log", "alpha", "score")
    wanted = [2.0, 1.0, 1.0][: tuned.architecture.states]
    layered = calibrate(tuned.model, lambda model: target(model, wanted), [1.0], per_layer=1)
    lines = {line.get_label(): line for line in layered.plot().lines}
    assert lines["chosen, layer by layer"].get_ydata()[0] == pytest.approx(0.0, abs=1e-9)


def test_a_picture_of_alpha_0_alone(tuned: Tuned, tmp_path: Path) -> None:
    found = calibrate(tuned.model, scored({0.0: 0.25}), [0.0])
    found.plot(tmp_path / "alpha.png")
    assert (tmp_path / "alpha.png").read_bytes().startswith(b"\x89PNG")
    axes = found.plot()
    lines = {line.get_label(): line for line in axes.lines}
    assert len(lines["one alpha for all layers"].get_xdata()) == 0
    assert list(lines["alpha 0"].get_ydata()) == [0.25, 0.25]


def test_without_matplotlib(result: Calibration, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"Calibration.plot needs matplotlib: pip install matplotlib"):
        result.plot("alpha.png")


def test_the_scripts_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they stand there, but for the model, which is the tiny one."""
    root = Path(__file__).resolve().parent.parent
    page = (root / "docs" / "alpha.md").read_text()
    loss, score, alone = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    tiny = str(root / "examples" / "models" / "tiny-qwen3.5")
    torch.manual_seed(0)
    get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny), S0Config(init_weights=1.0, learn_alpha=True)
    ).save_pretrained(tmp_path / "my-task")
    rows = [{"prompt": "def f(x):", "completion": " return x"}, {"prompt": "def g(x):", "completion": " return x * x"}]
    (tmp_path / "held-out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    variables: dict[str, Any] = {"prompts": ["def f(x):", "def g(x):"], "passes": lambda answer: len(answer) % 2}
    exec(loss.replace("Qwen/Qwen3.5-4B", tiny), variables)
    assert (tmp_path / "alpha.png").exists()
    assert len(variables["result"].table) == 9
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), "my-task")
    assert alphas(loaded) == alphas(variables["model"])
    exec(score, variables)
    assert [trial.alpha for trial in variables["result"].table] == [0.0, 0.03, 0.07, 0.15, 0.3]
    exec(alone, variables)
    assert variables["model"].get_nb_trainable_parameters()[0] == 3
