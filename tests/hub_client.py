"""What the tests of the Hub run in processes of their own, in which huggingface_hub talks to the server on loopback.

It reads its endpoint, token and offline mode once, on import; the tests' own process is offline.
"""

from __future__ import annotations

import re
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch
from architectures import MAIN, Architecture, mixers
from huggingface_hub import HfApi, hf_hub_download
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.utils import logging

import peft_s0
from peft_s0 import S0Config

torch.set_num_threads(1)
logging.set_verbosity_error()

ROWS: dict[str, Architecture] = {row.name: row for row in MAIN}
IDS = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: nn.Module) -> np.ndarray:
    """Logits of some tokens."""
    return model.eval()(IDS).logits.numpy()


def build(row: str, base: str | None = None) -> nn.Module:
    """A base model, the same in each process; by name from the Hub, if one is given."""
    model = ROWS[row].build() if base is None else AutoModelForCausalLM.from_pretrained(base)
    return model.requires_grad_(False).eval()


def tune(row: str, seed: int, base: str | None = None, adapter_name: str = "default", **config: Any) -> PeftModel:
    """The base model with random states."""
    model = build(row, base)
    torch.manual_seed(seed)
    config = {"alpha": 0.7, "init_weights": 1.0, **config}
    return get_peft_model(model, S0Config(**config), adapter_name=adapter_name).eval()


def push_base(row: str, repo_id: str) -> np.ndarray:
    """A base model that has a name on the Hub."""
    model = build(row)
    model.push_to_hub(repo_id)
    return logits(model)


def save_base(row: str, folder: Path) -> None:
    """A base model in a folder."""
    build(row).save_pretrained(folder)


def push_plain(row: str, repo_id: str) -> None:
    """A model without an adapter."""
    peft_s0.push_to_hub(build(row), repo_id)


def push_card(repo_id: str, content: str) -> None:
    """A model card alone."""
    HfApi().upload_file(path_or_fileobj=content.encode(), path_in_repo="README.md", repo_id=repo_id)


def push(
    row: str, repo_id: str, seed: int, how: str = "peft", tuned: dict[str, Any] | None = None, **options: Any
) -> np.ndarray:
    """Push a tuned model in one of several ways; its logits."""
    model = tune(row, seed, **tuned or {})
    if how == "peft":
        model.push_to_hub(repo_id, **options)
    elif how == "s0":
        peft_s0.push_to_hub(model, repo_id, **options)
    elif how == "transformers":
        model = build(row)
        torch.manual_seed(seed)
        model.add_adapter(S0Config(alpha=0.7, init_weights=1.0))
        model.push_to_hub(repo_id, **options)
    return logits(model)


def push_folder(row: str, repo_id: str, seed: int, folder: Path) -> np.ndarray:
    """Save, and upload what was saved as it is."""
    model = tune(row, seed)
    model.save_pretrained(folder)
    HfApi().create_repo(repo_id)
    HfApi().upload_folder(repo_id=repo_id, folder_path=folder)
    return logits(model)


def push_with_a_trainer(row: str, repo_id: str, folder: Path, base: str) -> np.ndarray:
    """What `Trainer` pushes, without any training."""
    model = tune(row, 3, base)
    arguments = TrainingArguments(output_dir=str(folder), hub_model_id=repo_id, report_to=[])
    Trainer(model, arguments).push_to_hub()
    return logits(model)


def tag(repo_id: str, name: str) -> None:
    """Give the main branch's last commit a name."""
    HfApi().create_tag(repo_id, tag=name)


def load(row: str, repo_id: str, **options: Any) -> np.ndarray:
    return logits(PeftModel.from_pretrained(build(row), repo_id, **options))


def load_second(row: str, repo_id: str, **options: Any) -> np.ndarray:
    """Beside an adapter that is there."""
    model = tune(row, 99)
    model.load_adapter(repo_id, "second", **options)
    model.set_adapter("second")
    return logits(model)


def load_auto(row: str, repo_id: str, **options: Any) -> np.ndarray:
    return logits(AutoPeftModelForCausalLM.from_pretrained(repo_id, **options))


def load_auto_with_transformers(row: str, repo_id: str, **options: Any) -> np.ndarray:
    return logits(AutoModelForCausalLM.from_pretrained(repo_id, **options))


def load_with_transformers(row: str, repo_id: str, **options: Any) -> np.ndarray:
    model = build(row)
    model.load_adapter(repo_id, adapter_kwargs=options)
    return logits(model)


def config(repo_id: str) -> dict[str, Any]:
    return S0Config.from_pretrained(repo_id).to_dict()


def refusal(row: str, repo_id: str, how: str = "load", **options: Any) -> tuple[str, str, bool, str]:
    """What loading ends in.

    Returns:
        Type and traceback of the error; whether nothing is left of the adapter on the base model; and what a call of
        the base model ends in: "True" for its own logits, or an error.
    """
    model = build(row)
    try:
        if how == "load":
            PeftModel.from_pretrained(model, repo_id, **options)
        else:
            model.load_adapter(repo_id, adapter_kwargs=options)
    except Exception as error:
        untouched = not any(hasattr(mixer, "s0") or mixer._forward_hooks for mixer in mixers(model))
        try:
            used = str(np.array_equal(logits(model), logits(build(row))))
        except RuntimeError as use:
            used = str(use)
        return type(error).__name__, traceback.format_exc(), untouched, used
    raise AssertionError(f"{repo_id} was loaded")


def follow_the_card(repo_id: str, revision: str = "main") -> np.ndarray:
    """Run the example in a repository's model card as it stands there; logits of the model it ends with."""
    card = Path(hf_hub_download(repo_id, "README.md", revision=revision)).read_text()
    (example,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names: dict[str, Any] = {}
    exec(example, names)
    return logits(names["model"])
