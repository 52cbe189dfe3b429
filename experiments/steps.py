"""The steps of every experiment: collect solutions, train an adapter, evaluate it. What is done is not repeated."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from math import comb
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import PrinterCallback, set_seed
from trl import SFTConfig, SFTTrainer

import answers
import harness
import records
from answers import GREEDY, Answer, Sampling, Student, load_student
from methods import Training, recipe
from peft_s0 import S0Callback, S0Config
from peft_s0.training import average_over_examples
from tasks import TASKS, Part, Row, Task, load

SAMPLES = 16
"""How often a training problem is tried, at most; one solution that passes is kept."""

KS = (1, 5, 10)
"""For which k pass@k is estimated."""

MAX_LENGTH = 2048
"""Tokens of a training example."""


@dataclass
class Bench:
    """One task on one model, and where its files are.

    Args:
        model_name: A folder or a name on the Hub.
        label: The model's name in the files.
        task: The task.
        output: The folder for all files.
        data: A folder of local problems, or None for the Hub.
        databases: Spider's.
        device, dtype, batch_size, new_tokens: How the model is run.
        problems: The most training problems and the most held-out problems that are used; None for all.
    """

    model_name: str
    label: str
    task: Task
    output: Path
    data: Path | None = None
    databases: Path | None = None
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    batch_size: int = 16
    new_tokens: int | None = None
    problems: int | None = None
    _rows: dict[str, list[Row]] = field(default_factory=dict)
    _base: Student | None = None

    @property
    def folder(self) -> Path:
        """Where its files are."""
        return self.output / self.label / self.task.name

    @property
    def settings(self) -> dict[str, Any]:
        """What figures depend on, but for device and batch size, which change rounding and what is drawn for a seed."""
        return {
            "model": self.model_name,
            "task": self.task.name,
            "data": None if self.data is None else str(self.data),
            "dtype": str(self.dtype).removeprefix("torch."),
            "new_tokens": self.new_tokens or self.task.new_tokens,
            "problems": self.problems,
        }

    def rows(self, split: str) -> list[Row]:
        """The problems of a split."""
        if split not in self._rows:
            self._rows[split] = load(self.task, split, self.data, self.databases)
        return self._rows[split]

    def places(self, part: Part) -> list[int]:
        """Where the problems of a part are in its split."""
        return part.indices(len(self.rows(part.split)))[: self.problems]

    def base(self) -> Student:
        """The frozen model, loaded afresh when an adapter has been put on it."""
        if self._base is None:
            self._base = load_student(self.model_name, self.dtype, self.device, self.batch_size, self.new_tokens)
        return self._base

    def take_base(self) -> Student:
        """The frozen model, to be changed by who takes it."""
        student, self._base = self.base(), None
        return student

    def close(self) -> None:
        """Frees the model's memory."""
        self._base = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def answer(
        self, student: Student, part: Part, places: Sequence[int], sampling: Sampling, seed: int
    ) -> list[Answer]:
        """One graded answer to each of some problems of a part."""
        if self.task.harness:
            return harness.answer(student, self.task, part.split, places, sampling, seed, self.data)
        return answers.answer(student, self.task, self.rows(part.split), places, sampling, seed, self.databases)


def collect(
    bench: Bench, seed: int, samples: int = SAMPLES, sampling: Sampling = answers.PAPER
) -> list[dict[str, Any]]:
    """Solutions that the frozen model itself writes and that pass: at most one a problem, the first of its samples."""
    path = bench.folder / f"solutions-{seed}.json"
    arguments = {**bench.settings, "seed": seed, "samples": samples, **asdict(sampling)}
    record = records.done(path, arguments)
    if record is None:
        start, student, part = time.perf_counter(), bench.base(), bench.task.train
        unsolved, solved = bench.places(part), {}
        problems = len(unsolved)
        for sample in range(samples):
            if not unsolved:
                break
            for given in bench.answer(student, part, unsolved, sampling, seed * samples + sample):
                if given.passed:
                    solved[given.problem] = given.completion
            unsolved = [problem for problem in unsolved if problem not in solved]
        rows = bench.rows(part.split)
        solutions = [
            {
                "problem": problem,
                "prompt": student.prompt(bench.task, rows[problem]),
                "completion": solved[problem],
            }
            for problem in sorted(solved)
        ]
        result = {"solutions": solutions, "problems": problems, "seconds": time.perf_counter() - start}
        record = records.write(path, arguments, result, bench.device)
    return record["result"]["solutions"]


def tokens_of(student: Student, solution: dict[str, Any]) -> dict[str, list[int]]:
    """A solution's tokens as generation saw them, its end included, and labels for the completion alone."""
    prompt = student.prompt_ids(solution["prompt"])
    completion = student.tokenizer(solution["completion"], add_special_tokens=False)["input_ids"]
    completion = [*completion, student.tokenizer.eos_token_id]
    return {"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion}


def train(bench: Bench, training: Training, seed: int) -> Path:
    """An adapter, trained with TRL: the mean over examples, all of them in each step.

    Raises:
        ValueError: If there are fewer solutions than the training asks for, or none.
    """
    folder = bench.folder / "adapters" / f"{training.name}-{seed}"
    arguments = {**bench.settings, **asdict(training), "seed": seed}
    if records.done(folder / "training.json", arguments) is not None:
        return folder
    solutions = collect(bench, seed)
    wanted = training.solutions or len(solutions)
    if not solutions or len(solutions) < wanted:
        raise ValueError(
            f"{bench.task.name}: {training.name} needs {wanted or 'some'} solutions, but {bench.model_name} has found "
            f"{len(solutions)} with seed {seed}."
        )
    # Which ones is chance, and the smaller sets are in the larger ones.
    solutions = random.Random(seed).sample(solutions, len(solutions))[:wanted]
    student = bench.take_base()
    set_seed(seed)
    made = recipe(training, student.model)
    model = get_peft_model(student.model, made.config)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(folder),
            max_steps=made.steps,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=len(solutions),
            learning_rate=made.learning_rate,
            lr_scheduler_type="constant",
            optim="adamw_torch",
            weight_decay=0.0,
            max_grad_norm=made.max_grad_norm,
            max_length=MAX_LENGTH,
            seed=seed,
            bf16=bench.dtype == torch.bfloat16,
            use_cpu=bench.device == "cpu",
            gradient_checkpointing=bench.device != "cpu",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([tokens_of(student, solution) for solution in solutions]),
        processing_class=student.tokenizer,
        callbacks=[S0Callback()] if isinstance(made.config, S0Config) else None,
    )
    trainer.remove_callback(PrinterCallback)  # the losses are in the record
    average_over_examples(trainer)
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    model.save_pretrained(folder)
    result = {
        "trainable_parameters": model.get_nb_trainable_parameters()[0],
        "solutions": len(solutions),
        "learning_rate": made.learning_rate,
        "steps": made.steps,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "seconds": seconds,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if bench.device.startswith("cuda") else None,
    }
    records.write(folder / "training.json", arguments, result, bench.device)
    return folder


def tuned(bench: Bench, adapter: Path, alpha: float | None) -> Student:
    """The model with a saved adapter; of S0, at another alpha if there is one."""
    student = bench.take_base()
    config = PeftConfig.from_pretrained(adapter)
    if alpha is not None:
        config.alpha = alpha
    student.model = PeftModel.from_pretrained(student.model, adapter, config=config).eval()
    return student


def pass_at(k: int, samples: int, passed: int) -> float:
    """Chance that one of k is right, drawn without putting back from so many samples of which so many passed.

    The unbiased estimator of Chen et al., "Evaluating Large Language Models Trained on Code" (2021), equation 1.
    """
    return 1.0 - comb(samples - passed, k) / comb(samples, k)


def result_path(bench: Bench, training: Training, seed: int, alpha_in_use: float | None, samples: int) -> Path:
    """Where the evaluation of a training is."""
    use = f"@{alpha_in_use}" if alpha_in_use is not None else ""
    return bench.folder / "results" / f"{training.name}{use}{f'-pass{samples}' if samples else ''}-{seed}.json"


def evaluate(
    bench: Bench,
    training: Training,
    seed: int,
    alpha_in_use: float | None = None,
    samples: int = 0,
    make: Callable[[Bench, Training, int], Path] = train,
) -> dict[str, Any]:
    """Greedy pass@1 on the held-out problems, or pass@k from so many samples of each.

    Args:
        bench: Task and model.
        training: What was trained; "base" is the frozen model.
        seed: Of the solutions, of the training and of the samples.
        alpha_in_use: For S0: the scale of the states, if it is not the one that the adapter was saved with.
        samples: Of each problem; 0 for the greedy answer.
        make: Gives the adapter, trained if need be.
    """
    path = result_path(bench, training, seed, alpha_in_use, samples)
    sampling = answers.PAPER if samples else GREEDY
    arguments = {
        **bench.settings,
        **asdict(training),
        "seed": seed,
        "alpha_in_use": alpha_in_use,
        "samples": samples,
        **asdict(sampling),
    }
    record = records.done(path, arguments)
    if record is not None:
        return record
    adapter = None if training.method == "base" else make(bench, training, seed)
    student = bench.base() if adapter is None else tuned(bench, adapter, alpha_in_use)
    start, part = time.perf_counter(), bench.task.held_out
    places = bench.places(part)
    rounds = [
        bench.answer(student, part, places, sampling, seed * max(samples, 1) + number)
        for number in range(max(samples, 1))
    ]
    passed = {place: sum(given[number].passed for given in rounds) for number, place in enumerate(places)}
    ks = [k for k in KS if k <= max(samples, 1)]
    result = {
        **{f"pass@{k}": sum(pass_at(k, len(rounds), right) for right in passed.values()) / len(places) for k in ks},
        "problems": len(places),
        "passed": {str(place): right for place, right in passed.items()},
        "answers": [{"problem": given.problem, "completion": given.completion} for given in rounds[0]],
        "seconds": time.perf_counter() - start,
    }
    return records.write(path, arguments, result, bench.device)


def bench_of(task: str, **settings: Any) -> Bench:
    """A bench by the name of its task."""
    return Bench(task=TASKS[task], **settings)
