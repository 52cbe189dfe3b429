"""The tiny frozen model of the examples."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

FOLDER = Path(__file__).resolve().parents[1] / "models" / "tiny-qwen3.5"


def load_base() -> PreTrainedModel:
    """The model. It is stored in half precision, which a CPU is slow at."""
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)


def load_tokenizer() -> PreTrainedTokenizerBase:
    """Its tokenizer."""
    return AutoTokenizer.from_pretrained(FOLDER)
