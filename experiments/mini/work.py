"""One job: the solutions of a seed, or a training and its measurements. Each leaves one record, and is not repeated."""

from __future__ import annotations

import copy
import os
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import get_peft_config, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import records
from methods import FAMILIES
from mini.plan import METHODS, Training, Use
from miniature.base import folder_of, load_base, load_tokenizer
from miniature.evaluate import complete
from miniature.execute import passes
from miniature.sample import own_solutions
from miniature.task import EOS, Problem, corpus, problems, stepwise
from peft_s0 import analysis, state_from_prompt

Solution = tuple[str, str]
"""A prompt and its completion."""

_KNOWN: dict[tuple[str, Problem], bool] = {}


@dataclass(frozen=True)
class Counts:
    """How much is done.

    Args:
        seeds: Of every figure, for solutions and first values.
        tuning_seeds: Others, that learning rates are chosen on.
        rates: Of each method's learning rates, how many are tried.
        held_out: Problems that methods are judged on.
        validation: Problems that rates are chosen on.
        solutions: The most that are trained on.
        steps: The most steps.
        documents: Batches of the corpus whose loss is taken.
        texts: Prompts that memory is measured on.
    """

    seeds: int = 10
    tuning_seeds: int = 2
    rates: int = 4
    held_out: int = 266
    validation: int = 64
    solutions: int = 50
    steps: int = 50
    documents: int = 1
    texts: int = 8


@dataclass(frozen=True)
class Place:
    """Where it is done.

    Args:
        device: That of the model; several processes may share it.
        dtype: That of the frozen weights. What is trained stays float32.
    """

    device: str = "cpu"
    dtype: str = "float32"


@dataclass(frozen=True)
class Job:
    """One training at one rate and seed, and what is measured then.

    Args:
        training: What is trained.
        rate: The learning rate; None where nothing is trained.
        seed: Of solutions and first values.
        uses: What is measured.
        tuning: Whether it is to choose the rate: then on validation problems.
    """

    training: Training
    rate: float | None
    seed: int
    uses: tuple[Use, ...]
    tuning: bool = False

    def path(self, folder: Path) -> Path:
        """Of its record."""
        part = "tuning" if self.tuning else "final"
        rate = "" if self.rate is None else f"-{self.rate:g}"
        return folder / "jobs" / f"{self.training.name}-{part}{rate}-{self.seed}.json"


def arguments_of(job: Job, counts: Counts, place: Place) -> dict[str, Any]:
    """What a record of a job depends on."""
    method = METHODS[job.training.method]
    steps = min(method.steps, counts.steps)
    return {**asdict(job), "configs": list(method.configs), "steps": steps, "dtype": place.dtype, **_sizes(counts)}


def _sizes(counts: Counts) -> dict[str, int]:
    names = ("held_out", "validation", "solutions", "documents", "texts")
    return {name: getattr(counts, name) for name in names}


def cpu_seconds() -> float:
    """Of this process and of those that it has waited for: the programs that were run."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


@cache
def _tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer()  # the same for all models


@cache
def _base(name: str, place: Place) -> PreTrainedModel:
    return load_base(folder_of(name), getattr(torch, place.dtype)).requires_grad_(False).to(place.device)


def _for_validation(problem: Problem) -> bool:
    """A fifth of the training split, by a hash as the splits themselves: solutions are never collected from it."""
    return zlib.crc32(problem.recipe.encode()) // 10 % 5 == 0


def _redefined(problem: Problem) -> Problem:
    """The same words, but "double" means to multiply by four."""
    steps = (replace(step, operand=4) if step.words == "double" else step for step in problem.steps)
    return Problem(problem.name, tuple(steps))


def _stream(split: str, seed: int, data: str, lengths: range = range(3, 5)) -> Iterator[Problem]:
    """Problems of a split; "validation" is a part of "train"."""
    is_validation = split == "validation"
    for problem in problems("train" if is_validation else split, seed, lengths):
        if split != "test" and _for_validation(problem) != is_validation:
            continue
        if data != "redefined":
            yield problem
        elif any(step.words == "double" for step in problem.steps):
            yield _redefined(problem)


def solutions(model: str, data: str, seed: int, folder: Path, counts: Counts, place: Place) -> list[Solution]:
    """The solutions of a seed, collected if need be; with fewer, the first ones are used."""
    path = folder / "jobs" / model / f"solutions-{data}-{seed}.json"
    arguments = {"model": model, "data": data, "seed": seed, "solutions": counts.solutions}
    record = records.done(path, arguments)
    if record is None:
        start = cpu_seconds()
        torch.manual_seed(seed)
        stream = _stream("train", seed, data)
        if data == "redefined":
            found = ((problem, stepwise(problem)) for problem in stream)
        else:
            found = own_solutions(_base(model, place), _tokenizer(), stream, only_failed=False)
        pairs = [[problem.prompt, body] for problem, body in islice(found, counts.solutions)]
        result = {"solutions": pairs, "cpu_seconds": cpu_seconds() - start}
        record = records.write(path, arguments, result, place.device)
    return [(prompt, body) for prompt, body in record["result"]["solutions"]]


def _verdicts(programs: list[str], asked: list[Problem]) -> list[bool]:
    """Which programs are right; the same program for the same problem, as most methods write it, is run once."""
    new = {key: None for key in zip(programs, asked, strict=True) if key not in _KNOWN}
    if new:
        verdicts = passes([program for program, _ in new], [problem.tests for _, problem in new])
        _KNOWN.update(zip(new, verdicts, strict=True))
    return [_KNOWN[key] for key in zip(programs, asked, strict=True)]


def adapt(base: PreTrainedModel, configs: tuple[dict[str, Any], ...]) -> tuple[PreTrainedModel, dict[str, nn.Module]]:
    """A copy of the model with adapters on it; and the PeftModel of each, by its type."""
    model = copy.deepcopy(base)
    family = FAMILIES[model.config.model_type.removesuffix("_text")]
    adapters = {}
    for fields in configs:
        config = {**fields, "task_type": "CAUSAL_LM"}
        if config["peft_type"] == "LORA":
            config["target_modules"] = list(getattr(family, config["target_modules"]))
        kind = config["peft_type"]
        with warnings.catch_warnings():
            # A second method is meant to be on the model, and so are norms of a class that PEFT does not know.
            warnings.filterwarnings("ignore", "Already found a `peft_config`|Unsupported layer type", UserWarning)
            adapters[kind] = get_peft_model(model, get_peft_config(config), adapter_name=kind)
    return model, adapters


def train(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: list[Solution], rate: float, steps: int
) -> list[float]:
    """The paper's training: Adam at a constant rate, all solutions in each step, the mean over them, clipping at 1.

    What it optimises is what requires gradients. The penalty on states is in their gradients already.

    Returns:
        The loss at each step.
    """
    ids, mask, labels = (tensor.to(model.device) for tensor in _batch(tokenizer, pairs))
    tuned = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.Adam(tuned, lr=rate)
    model.train()
    losses = []
    for _ in range(steps):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        of_tokens = nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")
        loss = (of_tokens.sum(dim=1) / (labels[:, 1:] != -100).sum(dim=1)).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(tuned, 1.0)
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


def _batch(tokenizer: PreTrainedTokenizerBase, pairs: list[Solution]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and labels [solutions, longest], padded on the right; the loss is on completions and their ends."""
    heads = [tokenizer(prompt)["input_ids"] for prompt, _ in pairs]
    tails = [tokenizer(body + EOS, add_special_tokens=False)["input_ids"] for _, body in pairs]
    rows = [torch.tensor(head + tail) for head, tail in zip(heads, tails, strict=True)]
    marked = [torch.tensor([-100] * len(head) + tail) for head, tail in zip(heads, tails, strict=True)]
    pad = nn.utils.rnn.pad_sequence
    mask = pad([torch.ones_like(row) for row in rows], batch_first=True)
    return (
        pad(rows, batch_first=True, padding_value=tokenizer.pad_token_id),
        mask,
        pad(marked, batch_first=True, padding_value=-100),
    )


@torch.inference_mode()
def corpus_loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batches: int) -> float:
    """Mean loss of the tokens of documents that the pretraining has not seen."""
    losses = []
    for documents in islice(corpus(seed=10_000), batches):
        inputs = tokenizer(documents, padding=True, padding_side="right", return_tensors="pt").to(model.device)
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        losses.append(model(**inputs, labels=labels, use_cache=False).loss.item())
    return sum(losses) / len(losses)


def memory(adapter: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: int) -> dict[str, Any]:
    """How much of each layer's state is left at the end of a prompt, and of the head of it that keeps most."""
    prompts = [problem.prompt for problem in islice(problems("test", lengths=range(4, 5)), 16 * texts)]
    lengths = [len(ids) for ids in tokenizer(prompts)["input_ids"]]
    usual = max(set(lengths), key=lengths.count)
    chosen = [prompt for prompt, length in zip(prompts, lengths, strict=True) if length == usual][:texts]
    found = analysis.memory(adapter, tokenizer, chosen, positions=[usual])
    # A state that has stayed zero, as no gradient reaches it, has no share that is left: nothing of it is.
    layers = np.nan_to_num(found.survival[:, :, 0]).mean(axis=0)
    heads = [np.nan_to_num(each[:, :, 0]).mean(axis=0).max() for each in found.heads]
    return {"tokens": usual, "layers": [*map(float, layers)], "best_heads": [*map(float, heads)]}


def do(job: Job, folder: Path, counts: Counts, place: Place) -> dict[str, Any]:
    """Trains and measures, unless the record is there."""
    path, arguments = job.path(folder), arguments_of(job, counts, place)
    record = records.done(path, arguments)
    if record is not None:
        return record
    training, method, tokenizer = job.training, METHODS[job.training.method], _tokenizer()
    pairs: list[Solution] = []
    if training.method != "base":
        pairs = solutions(training.model, training.data, job.seed, folder, counts, place)[: training.solutions]
    start = cpu_seconds()
    torch.manual_seed(job.seed)
    model, adapters = adapt(_base(training.model, place), method.configs)
    result: dict[str, Any] = {"parameters": sum(w.numel() for w in model.parameters() if w.requires_grad)}
    if job.rate is not None:
        losses = train(model, tokenizer, pairs, job.rate, min(method.steps, counts.steps))
        result.update(first_loss=losses[0], last_loss=losses[-1], training_cpu_seconds=cpu_seconds() - start)
    context = "".join(prompt + body + EOS for prompt, body in pairs[:2])
    if training.method == "prompt-state":
        state_from_prompt(model, tokenizer, context)
    if training.method != "prompt":
        context = ""
    for use in job.uses:
        result[use.name] = _measure(job, use, model, adapters.get("S0"), context, counts)
    result["cpu_seconds"] = cpu_seconds() - start
    return records.write(path, arguments, result, place.device)


def _measure(
    job: Job, use: Use, model: PreTrainedModel, adapter: nn.Module | None, context: str, counts: Counts
) -> Any:
    tokenizer = _tokenizer()
    if use.what == "corpus":
        return corpus_loss(model, tokenizer, counts.documents)
    if use.what == "memory":
        return memory(adapter, tokenizer, counts.texts)
    lengths = range(5, 8) if use.what == "long" else range(3, 5)
    split, number = ("validation", counts.validation) if job.tuning else ("test", counts.held_out)
    asked = list(islice(_stream(split, 0, job.training.data, lengths), number))
    before = None if use.alpha is None else adapter.peft_config["S0"].alpha
    if use.alpha is not None:
        adapter.set_alpha(use.alpha)
    prompts = [problem.prompt for problem in asked]
    bodies = complete(model, tokenizer, [context + prompt for prompt in prompts], batch_size=len(prompts))
    if use.alpha is not None:
        adapter.set_alpha(before)
    verdicts = _verdicts([prompt + body for prompt, body in zip(prompts, bodies, strict=True)], asked)
    return sum(verdicts) / len(verdicts)
