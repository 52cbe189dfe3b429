"""Serving adapters over HTTP."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import uvicorn
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_s0 import S0Config, StateBank
from peft_s0.serving import Engine
from peft_s0.serving.app import create_app


def find_tasks(folder: Path, taken: Collection[str]) -> dict[str, str]:
    """The adapters in the folders of a folder, by the folders' names.

    Raises:
        ValueError: if there are none, or a name is taken.
    """
    found = {place.parent.name: str(place.parent) for place in sorted(folder.glob("*/adapter_config.json"))}
    if not found:
        raise ValueError(f"No folder in '{folder}' holds an adapter (an adapter_config.json).")
    for name in found:
        if name in taken:
            raise ValueError(f"There are two tasks '{name}', one in '{folder}'.")
    return found


def make_engine(
    base_model: str,
    tasks: Mapping[str, str],
    name: str,
    capacity: int,
    rows: int,
    queue: int,
    max_length: int | None,
    dtype: str,
    trust_remote_code: bool,
) -> Engine:
    """Load a model and the headers of its tasks' files.

    Raises:
        ValueError: see `StateBank.add` and `Engine`, and for a task that is called as the model is.
    """
    if name in tasks:
        raise ValueError(f"A task is called '{name}', as the base model is; give the latter another name (--name).")
    base = AutoModelForCausalLM.from_pretrained(
        base_model, dtype=dtype, device_map="auto", trust_remote_code=trust_remote_code
    )
    tokenizer = AutoTokenizer.from_pretrained(base_model, trust_remote_code=trust_remote_code)
    bank = StateBank(get_peft_model(base, S0Config()).eval(), capacity)
    for task, adapter in tasks.items():
        bank.add(task, adapter)
    return Engine(bank, tokenizer, rows, queue, max_length)


def run(engine: Engine, name: str, host: str, port: int) -> None:
    """Serve until the process is told to stop; what runs then has half a minute left."""
    with engine:
        uvicorn.run(create_app(engine, name), host=host, port=port, timeout_graceful_shutdown=30)
