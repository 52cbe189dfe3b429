"""Choosing an adapter's alpha by held-out data in a file."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer  # type: ignore[attr-defined]

from peft_s0.calibrate import Calibration, calibrate_alpha
from peft_s0.config import load_config
from peft_s0.convert import ADAPTER_FILES
from peft_s0.files import new_folder
from peft_s0.skeleton import base_of

# The fields of a row that TRL makes tokens of, any of these; the last are its tokens.
_FIELDS = ({"prompt", "completion"}, {"messages"}, {"conversations"}, {"text"}, {"input_ids"})


def calibrate(
    adapter: str,
    data: str,
    split: str,
    base_model: str | None,
    grid: Sequence[float] | None,
    per_layer: int,
    batch_size: int,
    max_length: int,
    dtype: str,
    trust_remote_code: bool,
    options: dict[str, Any],
) -> tuple[PeftModel, Calibration]:
    """Load an adapter and its base model, and choose alpha by the loss on completions.

    Returns:
        The model, with the alpha that was chosen, and what was tried.

    Raises:
        ValueError: for an adapter that names no base model or does not fit it, for data without rows, with other fields
            or of prompts that are too long, and see `calibrate_alpha`.
    """
    config = load_config(adapter, **options)
    examples = _load(data, split)
    base_model, revision = (base_model, "main") if base_model else base_of(adapter, config)
    how: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision}
    base = AutoModelForCausalLM.from_pretrained(base_model, dtype=dtype, device_map="auto", **how)
    tokenizer = AutoTokenizer.from_pretrained(base_model, **how)
    try:
        model = PeftModel.from_pretrained(base, adapter, **options)
    except RuntimeError as error:
        # torch's words for weights beside the states, such as the embeddings of a vocabulary that was resized.
        raise ValueError(f"'{adapter}' does not fit the base model '{base_model}': {error}") from error
    rows = _tokenized(model, tokenizer, examples, max_length)
    if not len(rows):
        raise ValueError(f"Every row of '{data}' is longer than max_length={max_length} before its completion begins.")
    return model, calibrate_alpha(model, rows, grid, per_layer=per_layer, batch_size=batch_size)


def _load(data: str, split: str) -> Dataset:
    """The rows of a file or of a dataset on the Hub.

    Raises:
        ValueError: if there are none that can be read, or none that TRL makes tokens of.
    """
    try:
        if Path(data).suffix in (".json", ".jsonl"):
            rows = load_dataset("json", data_files=data, split="train")
        else:
            rows = load_dataset(data, split=split)
    except (DatasetsError, ValueError, StopIteration) as error:
        reason = str(error.__cause__ or error) or "it is empty"
        raise ValueError(f"'{data}' has no rows that can be read: {reason}") from error
    if not any(fields <= set(rows.column_names) for fields in _FIELDS):
        raise ValueError(
            f"The rows of '{data}' have the fields {rows.column_names}, expected 'prompt' and 'completion', 'messages' "
            "or 'text'."
        )
    return rows


def _tokenized(model: PeftModel, tokenizer: PreTrainedTokenizerBase, data: Dataset, max_length: int) -> Any:
    """The data as TRL trains on it, so that the loss is the one that the states were trained by."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder,
            max_length=max_length,
            gradient_checkpointing=False,
            bf16=False,
            report_to="none",
        )
        trainer = SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer)
        return trainer.train_dataset


def save(model: PeftModel, output: Path, overwrite: bool) -> None:
    """Save the adapter with its alpha."""
    with new_folder(output, overwrite, ADAPTER_FILES) as folder:
        model.save_pretrained(str(folder), save_embedding_layers=False)
