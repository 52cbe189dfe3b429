"""Batched generation and pass@k."""

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from miniature.execute import passes
from miniature.task import Problem


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
    return bodies, passes(problems, [prompt + body for prompt, body in zip(prompts, bodies, strict=True)])


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
