"""Batched generation, greedy answers to the held-out problems, and pass@k."""

import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from miniature.execute import passes
from miniature.task import Problem, is_one_line, problems

HELD_OUT = list(islice(problems("test"), 266))


@torch.inference_mode()
def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    temperature: float = 0.0,
    batch_size: int = 128,
    description: str | None = None,
) -> list[str]:
    """One completion for each prompt.

    Prompts of different lengths share a batch and are padded on the left.

    Args:
        model: The model, or a PeftModel around it.
        tokenizer: Its tokenizer.
        prompts: What to complete.
        temperature: 0 for greedy decoding, otherwise the sampling temperature; the sampler is torch's global one.
        batch_size: Prompts to a batch.
        description: Label of the progress bar; without one there is no bar.
    """
    model.eval()
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    completions = []
    starts = range(0, len(prompts), batch_size)
    for start in tqdm(starts, desc=description, disable=description is None, unit="batch"):
        batch = tokenizer(
            prompts[start : start + batch_size], padding=True, padding_side="left", return_tensors="pt"
        ).to(model.device)
        sequences = model.generate(**batch, max_new_tokens=32, **sampling)
        new_tokens = sequences[:, batch["input_ids"].shape[1] :]
        completions += tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
    return completions


def solve(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[Problem],
    temperature: float = 0.0,
    description: str | None = None,
) -> tuple[list[str], list[bool]]:
    """One program for each problem, and whether it is right when run."""
    prompts = [problem.prompt for problem in problems]
    bodies = complete(model, tokenizer, prompts, temperature, description=description)
    programs = [prompt + body for prompt, body in zip(prompts, bodies, strict=True)]
    return bodies, passes(programs, [problem.tests for problem in problems])


@dataclass
class Answers:
    """Greedy answers to the held-out problems, and which of them are right."""

    bodies: list[str]
    verdicts: list[bool]

    @property
    def rates(self) -> dict[str, float]:
        """Greedy pass@1, and the share of problems solved by a single `return`."""
        in_one_line = [
            right and is_one_line(problem.prompt + body)
            for problem, body, right in zip(HELD_OUT, self.bodies, self.verdicts, strict=True)
        ]
        return {"right": sum(self.verdicts) / len(HELD_OUT), "right in one line": sum(in_one_line) / len(HELD_OUT)}


def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> Answers:
    """Lets a model answer the held-out problems."""
    return Answers(*solve(model, tokenizer, HELD_OUT, description=f"{name}, held-out problems"))


def compare(model: PeftModel, tokenizer: PreTrainedTokenizerBase, folder: str) -> None:
    """Shows what an adapter has changed in the answers to the held-out problems; `answers.jsonl` gets all of them."""
    with model.disable_adapter():
        before = answer(model, tokenizer, "without adapter")
    after = answer(model, tokenizer, "with adapter")
    with Path(folder, "answers.jsonl").open("w") as file:
        for row in zip(HELD_OUT, before.bodies, before.verdicts, after.bodies, after.verdicts, strict=True):
            problem, *values = row
            names = ("before", "before passes", "after", "after passes")
            file.write(json.dumps({"prompt": problem.prompt, **dict(zip(names, values, strict=True))}) + "\n")
    rates = f"{before.rates['right']:.1%} without the adapter, {after.rates['right']:.1%} with it"
    print(f"Greedy pass@1 on {len(HELD_OUT)} held-out problems: {rates}. The programs are in {folder}/answers.jsonl.")


def pass_at(
    k: int,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[Problem],
    description: str | None = None,
) -> float:
    """Share of the problems with a right program among k: the greedy one for k = 1, else sampled at temperature 1."""
    tries = [problem for problem in problems for _ in range(k)]
    _, verdicts = solve(model, tokenizer, tries, temperature=0.0 if k == 1 else 1.0, description=description)
    return sum(any(verdicts[start : start + k]) for start in range(0, len(verdicts), k)) / len(problems)
