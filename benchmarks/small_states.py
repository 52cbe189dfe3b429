"""What smaller states cost: file size against quality, for ranks, ways of storing and subsets of layers.

python benchmarks/small_states.py [--seeds N] [--json FILE]

The first table measures files of an adapter for Qwen3.5-4B. The others tune the tiny model of the examples on the task
of its quickstart, with the quickstart's solutions and settings. There the whole state solves every held-out problem,
which ranks nothing; so each adapter is tuned for 10 steps as well as 20, and its loss is measured on verified solutions
of problems that it was not tuned on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from bank import build, states_file
from timing import environment, show

from miniature.base import load_base, load_tokenizer
from miniature.evaluate import HELD_OUT, answer
from miniature.sample import collect, own_solutions
from miniature.task import problems
from peft_s0 import S0Config, compress_adapter, recurrent_layers
from quickstart import SOLUTIONS, Solution, tune

STORAGES = ("float32", "bfloat16", "int8")
RANKS = (8, 4, 2, 1)
STEPS = (10, 20)
RATE, HIGH_RATE = 5e-3, 2e-2
"""The quickstart's learning rate, and one for factors, of which half start far from zero."""


def sizes() -> list[dict[str, Any]]:
    """Files of an adapter with the states of Qwen3.5-4B, 24 layers of [32, 128, 128], in megabytes."""
    base = build()
    layers = recurrent_layers(base)
    forms: dict[str, dict[str, Any]] = {
        "full": {},
        "full, first third of the layers": {"layers_to_transform": layers[: len(layers) // 3]},
        **{f"rank {rank}": {"rank": rank} for rank in RANKS},
    }
    rows = []
    for form, fields in forms.items():
        row: dict[str, Any] = {"Qwen3.5-4B": form}
        for storage in STORAGES:
            model = get_peft_model(base, S0Config(init_weights=1.0, storage=storage, **fields))
            row["parameters"] = f"{model.get_nb_trainable_parameters()[0]:,}"
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder)
                row[f"{storage}, MB"] = round(states_file(Path(folder)).stat().st_size / 1e6, 2)
            base = model.unload()
        rows.append(row)
    return rows


@torch.inference_mode()
def loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, solutions: list[Solution]) -> float:
    """Mean cross-entropy of the tokens of the solutions, in nats, the end of each included."""
    prompts = [tokenizer(problem.prompt)["input_ids"] for problem, _ in solutions]
    rows = [tokenizer(p.prompt + body)["input_ids"] + [tokenizer.eos_token_id] for p, body in solutions]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in rows])
    labels = torch.full_like(ids, -100)
    for label, prompt, row in zip(labels, prompts, rows, strict=True):
        label[len(prompt) : len(row)] = torch.tensor(row[len(prompt) :])
    mask = torch.arange(longest) < torch.tensor([len(row) for row in rows]).unsqueeze(1)
    return float(model.eval()(input_ids=ids, attention_mask=mask.long(), labels=labels).loss)


class Trial:
    """One seed: its solutions, and what is measured on the held-out ones."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.seed, self.folder = seed, folder
        torch.manual_seed(seed)
        self.tokenizer, self.base = load_tokenizer(), load_base()
        solutions = own_solutions(self.base, self.tokenizer, problems("train", seed))
        self.solutions = collect(solutions, SOLUTIONS, f"seed {seed}: solutions")
        self.held_out = collect(solutions, 2 * SOLUTIONS, f"seed {seed}: held-out solutions")

    def measure(self, model: PreTrainedModel, name: str) -> dict[str, Any]:
        """Loss on held-out solutions, greedy pass@1 on held-out problems, and the programs."""
        given = answer(model, self.tokenizer, f"seed {self.seed}: {name}")
        return {
            "loss": loss(model, self.tokenizer, self.held_out),
            "pass@1": given.rates["right"],
            "bodies": given.bodies,
        }

    def run(self) -> Iterator[dict[str, Any]]:
        """A row for each adapter, number of steps and way of storing it."""
        yield {"form": "base", "steps": 0, "storage": "", "parameters": 0, **self.measure(self.base, "base")}
        layers = recurrent_layers(self.base)
        forms: dict[str, tuple[float, dict[str, Any]]] = {"full": (RATE, {})}
        forms |= {f"rank {rank}": (RATE, {"rank": rank}) for rank in RANKS}
        forms |= {f"rank {rank}, rate {HIGH_RATE:g}": (HIGH_RATE, {"rank": rank}) for rank in RANKS}
        for place, layer in (("first", layers[0]), ("middle", layers[len(layers) // 2]), ("last", layers[-1])):
            forms[f"full, {place} layer"] = (RATE, {"layers_to_transform": [layer]})
        for steps in STEPS:
            for form, (rate, fields) in forms.items():
                folder = self.folder / f"{self.seed}-{steps}-{form}"
                config = S0Config(alpha=1.0, l2_lambda=5e-4, **fields)
                model, cost = tune(self.tokenizer, self.solutions, config, rate, steps, folder, self.seed)
                each = steps == max(STEPS) and rate == RATE and "layers_to_transform" not in fields
                storages = STORAGES if each else STORAGES[:1]
                yield from self.stored(model, folder, form, steps, cost["trainable parameters"], storages)
                if form == "full":
                    for rank in RANKS:
                        yield self.cut(model, rank, steps)

    def stored(
        self, model: PeftModel, folder: Path, form: str, steps: int, parameters: float, storages: tuple[str, ...]
    ) -> Iterator[dict[str, Any]]:
        """A trained adapter, and what it is when it was stored and loaded."""
        exact = self.measure(model, f"{form}, {steps} steps")
        for storage in storages:
            name = f"{form}, {steps} steps, {storage}"
            config = model.peft_config["default"]
            model.peft_config["default"] = replace(config, storage=storage)
            model.save_pretrained(folder / storage)
            model.peft_config["default"] = config
            measured = exact
            if storage != "float32":
                measured = self.measure(PeftModel.from_pretrained(load_base(), folder / storage), name)
            same = sum(a == b for a, b in zip(measured["bodies"], exact["bodies"], strict=True))
            size = states_file(folder / storage).stat().st_size
            values = {"parameters": parameters, "bytes": size, "same programs": same}
            yield {"form": form, "steps": steps, "storage": storage, **values, **measured}

    def cut(self, model: PeftModel, rank: int, steps: int) -> dict[str, Any]:
        """The whole state, trained, cut to a rank."""
        errors = compress_adapter(model, "default", rank, "cut")
        model.set_adapter("cut")
        measured = self.measure(model, f"full, {steps} steps, cut to rank {rank}")
        parameters = sum(weight.numel() for name, weight in model.named_parameters() if ".cut." in name)
        model.set_adapter("default")
        model.delete_adapter("cut")
        values = {"parameters": parameters, "errors": errors}
        return {"form": f"full, cut to rank {rank}", "steps": steps, "storage": "float32", **values, **measured}


def by_seed(rows: list[dict[str, Any]], key: str, shown: str) -> str:
    """A figure of each seed."""
    return " / ".join(format(row[key], shown) for row in rows)


def tables(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Quality of each adapter, and what storing it does, with the figures of all seeds."""
    groups: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["form"], row["steps"], row["storage"]), []).append(row)
    quality, storage = [], []
    for form in dict.fromkeys(row["form"] for row in rows):
        line: dict[str, Any] = {"state": form}
        for steps in STEPS:
            group = groups.get((form, steps, "float32"), groups.get((form, 0, ""), []))
            line["parameters"] = f"{group[0]['parameters']:,}"
            line[f"loss, {steps} steps"] = f"{statistics.mean(row['loss'] for row in group):.3f}"
            line[f"pass@1, {steps} steps, %"] = by_seed(
                [{"pass@1": 100 * row["pass@1"]} for row in group], "pass@1", ".1f"
            )
        quality.append(line)
        if (form, max(STEPS), STORAGES[-1]) not in groups:
            continue
        for kind in STORAGES:
            group = groups[form, max(STEPS), kind]
            exact = groups[form, max(STEPS), "float32"]
            changes = [{"change": row["loss"] - other["loss"]} for row, other in zip(group, exact, strict=True)]
            storage.append(
                {
                    "state": form,
                    "storage": kind,
                    "file, kB": round(group[0]["bytes"] / 1e3, 1),
                    "loss, change": by_seed(changes, "change", "+.5f"),
                    "pass@1, %": by_seed([{"pass@1": 100 * row["pass@1"]} for row in group], "pass@1", ".1f"),
                    f"same programs of {len(HELD_OUT)}": by_seed(group, "same programs", "d"),
                }
            )
    return quality, storage


def main() -> None:
    """Measure, print the tables, and write the figures to a file if one is given."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="of problems, samples and adapters: 0, 1, ...")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    files = sizes()
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for seed in range(options.seeds) for row in Trial(seed, Path(folder)).run()]
    for table in (files, *tables(rows)):
        print()
        show(table)
    conditions = environment()
    versions = ", ".join(f"{name} {number}" for name, number in conditions["versions"].items())
    print(f"\nSeeds 0 to {options.seeds - 1}; {conditions['date']}, {conditions['cpu']}; {versions}.")
    if options.json:
        figures = [{key: value for key, value in row.items() if key != "bodies"} for row in rows]
        report = {"conditions": conditions, "sizes": files, "rows": figures}
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
