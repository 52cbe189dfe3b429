"""The tiny frozen models: that of the examples, and those of experiments/mini."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

_EXAMPLES = Path(__file__).resolve().parents[1]
FOLDER = _EXAMPLES / "models" / "tiny-qwen3.5"


def folder_of(name: str) -> Path:
    """Where a model is kept. That of the examples is with them; the package holds it, too, but not the others."""
    return FOLDER if name == FOLDER.name else _EXAMPLES.parent / "experiments" / "mini" / "models" / name


def load_base(folder: Path = FOLDER, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model. It is stored in half precision, which a CPU is slow at."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def load_tokenizer(folder: Path = FOLDER) -> PreTrainedTokenizerBase:
    """Its tokenizer."""
    return AutoTokenizer.from_pretrained(folder)
