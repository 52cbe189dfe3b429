"""Load on a server on loopback: requests a second and their latency, by number of tasks, beside base model and LoRA.

    python benchmarks/serving.py [--rounds 3] [--clients 32] [--requests 128] [--json FILE]

One process serves, another asks: each client sends its next request when it has the answer to the last, and requests
go round the tasks, for 8 to 56 tokens. The model is a random Qwen3.5 of 8 layers, on one thread; all candidates run
in the same engine, with the same prompts and lengths. LoRA is PEFT's, with `adapter_names` for each row in every
step. Requests are counted by the processor's time of the process that serves, which is never idle meanwhile, so that
other processes do not count; latencies are the wall's, and do. Every answer is compared with that of its task alone,
one row at a time.

The last candidate takes a new batch only when the last one is answered, which is how a server around `generate` works.
"""

from __future__ import annotations

import http.client
import json
import multiprocessing
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import uvicorn
from peft import LoraConfig, get_peft_model
from timing import environment, parser, report
from transformers import PreTrainedModel, Qwen3_5ForCausalLM, Qwen3_5TextConfig

from peft_s0 import S0Config, S0Layer, StateBank
from peft_s0.serving import Engine, Request
from peft_s0.serving.app import create_app

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from miniature.base import load_tokenizer
from miniature.evaluate import HELD_OUT

BASE, CAPACITY, LONGEST = "base", 32, 56
NUMBERS = (1, 8, 64)
# The paper's rank, here in the recurrent layers as well as in the attention, where the paper has it.
LORA = LoraConfig(r=24, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "in_proj_qkv", "out_proj"])


def build() -> PreTrainedModel:
    """The same random model each time."""
    torch.manual_seed(0)
    config = Qwen3_5TextConfig(
        vocab_size=67,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        linear_num_key_heads=4,
        linear_num_value_heads=4,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        max_position_embeddings=512,
        initializer_range=0.08,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=None,
    )
    return Qwen3_5ForCausalLM(config).eval()


class NoBank:
    """In the place of a bank: a model whose tasks are something else than states."""

    def __init__(self, model: Any, tasks: Sequence[str]) -> None:
        self.model, self.tasks, self.capacity = model, tasks, len(tasks)

    def __contains__(self, name: object) -> bool:
        return name in self.tasks

    def __iter__(self) -> Iterator[str]:
        return iter(self.tasks)


class BaseEngine(Engine):
    """An engine for the base model alone."""

    def run(self, tasks: Sequence[str], starts: bool, **inputs: Any) -> Any:
        """See `Engine.run`."""
        return self.bank.model(**inputs)


class LoraEngine(Engine):
    """An engine for LoRA adapters, which every step reads."""

    def run(self, tasks: Sequence[str], starts: bool, **inputs: Any) -> Any:
        """See `Engine.run`."""
        return self.bank.model(adapter_names=list(tasks), **inputs)


class WholeBatches(Engine):
    """Takes a new batch only when the last one is answered."""

    def _next_rows(self) -> list[Any]:
        return [] if self._running else super()._next_rows()


@dataclass
class Candidate:
    """Something to serve.

    Args:
        make: makes its engine, with a number of rows.
        tasks: what it is asked for.
        megabytes: what its tasks take on the device.
    """

    make: Callable[[int], Engine]
    tasks: list[str]
    megabytes: float


def candidates(folder: Path) -> dict[str, Candidate]:
    """All of them."""
    tokenizer = load_tokenizer()
    tokenizer.eos_token = None  # answers are as long as they are asked to be

    def states(number: int, engine: type[Engine] = Engine) -> Candidate:
        model = get_peft_model(build(), S0Config()).eval()
        bank = StateBank(model, CAPACITY)
        tasks = [f"task-{i}" for i in range(number)]
        for task in tasks:
            bank.add(task, folder / task)
        slots = [layer.slots.states for layer in model.modules() if isinstance(layer, S0Layer)]
        size = sum(state[0].nbytes for state in slots) * min(number, CAPACITY)
        return Candidate(lambda rows: engine(bank, tokenizer, rows), tasks, size / 1e6)

    def lora(number: int) -> Candidate:
        tasks, model = [f"task-{i}" for i in range(number)], None
        for i, task in enumerate(tasks):
            if model is None:
                model = get_peft_model(build(), LORA, adapter_name=task)
            else:
                model.add_adapter(task, LORA)
            torch.manual_seed(i)
            for name, weight in model.named_parameters():
                if f"lora_B.{task}." in name:
                    torch.nn.init.normal_(weight, std=0.02)
        size = sum(weight.nbytes for name, weight in model.named_parameters() if "lora_" in name)
        bank: Any = NoBank(model.eval(), tasks)
        return Candidate(lambda rows: LoraEngine(bank, tokenizer, rows), tasks, size / 1e6)

    for i in range(max(NUMBERS)):
        torch.manual_seed(i)
        get_peft_model(build(), S0Config(init_weights=1.0, alpha=1.0)).save_pretrained(folder / f"task-{i}")
    plain = build()
    plain.get_base_model = lambda: plain  # as a PeftModel has it
    bank: Any = NoBank(plain, [])
    found = {"base model": Candidate(lambda rows: BaseEngine(bank, tokenizer, rows), [BASE], 0.0)}
    found |= {f"S0, {number} tasks": states(number) for number in NUMBERS}
    found |= {f"LoRA, {number} tasks": lora(number) for number in NUMBERS}
    return {**found, "S0, 8 tasks, whole batches": states(8, WholeBatches)}


def prompt_of(place: int) -> str:
    """The prompt for the task at a place: several lengths."""
    return HELD_OUT[place % 16].prompt + "\n" * (place % 5)


def length_of(number: int) -> int:
    """How many tokens the answer to a request has: 8 to 56, 32 in the mean."""
    return 8 + number * 16 % (LONGEST - 7)


def alone(engine: Engine, tasks: list[str]) -> list[str]:
    """What each task answers to its prompt, one after another."""
    answers = []
    for place, task in enumerate(tasks):
        ids = engine.tokenizer(prompt_of(place))["input_ids"]
        request = Request(ids, "__base__" if task == BASE else task, LONGEST)
        answers.append(engine.submit(request).result().text)
    return answers


@contextmanager
def served(engine: Engine) -> Iterator[int]:
    """The engine on loopback; gives the port."""
    server = uvicorn.Server(uvicorn.Config(create_app(engine, BASE), port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def ask(port: int, tasks: list[str], expected: list[str], clients: int, requests: int) -> dict[str, Any]:
    """Send requests from several clients: seconds of all and of each, and how many answers were another task's."""
    local = threading.local()

    def one(number: int) -> tuple[float, bool]:
        if not hasattr(local, "connection"):
            local.connection = http.client.HTTPConnection("127.0.0.1", port)
        place = number % len(tasks)
        body = {"model": tasks[place], "prompt": prompt_of(place), "max_tokens": length_of(number), "temperature": 0}
        start = time.perf_counter()
        local.connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = json.load(local.connection.getresponse())
        text = answer["choices"][0]["text"]
        return time.perf_counter() - start, bool(text) and expected[place].startswith(text)

    with ThreadPoolExecutor(clients) as pool:
        start = time.perf_counter()
        results = list(pool.map(one, range(requests)))
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "each": [each for each, _ in results], "wrong": sum(not right for _, right in results)}


def main() -> None:
    """Measure, print, and write the figures to a file if one is given."""
    command = parser("Load on a server on loopback.", rounds=3)
    command.add_argument("--clients", type=int, default=32)
    command.add_argument("--requests", type=int, default=128)
    arguments = command.parse_args()
    torch.set_num_threads(1)
    results: dict[str, list[dict[str, Any]]] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        multiprocessing.get_context("spawn").Pool(1) as asking,
    ):
        found, expected = candidates(Path(folder)), {}
        for name, candidate in found.items():
            with candidate.make(1) as engine:
                expected[name] = alone(engine, candidate.tasks)
        for _ in range(arguments.rounds):
            for name, candidate in found.items():
                with candidate.make(arguments.clients) as engine, served(engine) as port:
                    # A round of each task first, so that states are where they stay.
                    load = (port, candidate.tasks, expected[name], arguments.clients)
                    asking.apply(ask, (*load, arguments.clients))
                    start = time.process_time()
                    run = asking.apply(ask, (*load, arguments.requests))
                    results.setdefault(name, []).append({**run, "processor": time.process_time() - start})
    rows = []
    for name, runs in results.items():
        rate = statistics.median(arguments.requests / run["processor"] for run in runs)
        wall = statistics.median(arguments.requests / run["seconds"] for run in runs)
        each = sorted(seconds for run in runs for seconds in run["each"])
        rows.append(
            {
                "": name,
                "requests/s of the processor": f"{rate:.1f}",
                "tokens/s": f"{rate * sum(map(length_of, range(arguments.requests))) / arguments.requests:.0f}",
                "requests/s of the wall": f"{wall:.1f}",
                "latency, median": f"{statistics.median(each):.2f} s",
                "99 %": f"{each[int(0.99 * len(each))]:.2f} s",
                "adapters on the device": f"{found[name].megabytes:.1f} MB",
                "wrong answers": f"{sum(run['wrong'] for run in runs)} of {arguments.requests * len(runs)}",
            }
        )
    report({"load": rows}, {**environment(), "clients": arguments.clients}, arguments.json)


if __name__ == "__main__":
    main()
