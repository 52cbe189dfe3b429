r"""Tuned states in llama-server: two tasks on one server, without PyTorch where they are served.

    make llama  # builds llama.cpp, which takes some minutes, and runs its tests
    .venv-llama/bin/python examples/llama_server.py --llama_cpp .venv-llama/src/vendor/llama.cpp

The two adapters of the quickstart are trained on the tiny model, unless they are there from a run of it, and written
as slots that started from their states and have decoded the BOS. llama-server runs the model's GGUF. Before each prompt
the slot of its task is restored. The answers are compared with those of transformers with the same adapters.
"""

import argparse
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from peft import PeftModel

from miniature.base import FOLDER, load_base, load_tokenizer
from miniature.evaluate import HELD_OUT, complete
from miniature.sample import collect, own_solutions
from miniature.task import is_one_line, problems
from peft_s0 import S0Config
from peft_s0.export.llama_cpp import CacheSettings, verify, write_slot
from quickstart import SOLUTIONS, tune

TASKS = ("right", "one-line")
# In half precision, the default, an answer may differ from that of transformers where two tokens are as likely.
CACHE = CacheSettings(flash_attention=False, type_k="f32", type_v="f32")


def post(url: str, **body: Any) -> dict[str, Any]:
    """The answer to a request over HTTP; both are JSON."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as response:
        return json.load(response)


class Server:
    """llama-server on loopback, with one slot.

    Args:
        llama_cpp: folder of llama.cpp, built in its folder `build`.
        gguf: the model.
        slots: folder of the slots' files.
        cache: as the slots were written.
    """

    def __init__(self, llama_cpp: Path, gguf: Path, slots: Path, cache: CacheSettings = CACHE) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        flash_attention = {None: "auto", True: "on", False: "off"}[cache.flash_attention]
        options = {
            "--model": gguf,
            "--port": port,
            "--slot-save-path": slots,
            "--parallel": 1,
            "--cache-ram": 0,  # its prompt cache knows nothing of states: it would mix tasks
            "--flash-attn": flash_attention,
            "--cache-type-k": cache.type_k,
            "--cache-type-v": cache.type_v,
            "--threads": torch.get_num_threads(),
            "--ctx-size": 512,
        }
        command = [llama_cpp / "build" / "bin" / "llama-server", *(part for pair in options.items() for part in pair)]
        self.log = (slots / "server.log").open("wb")
        self.process = subprocess.Popen(list(map(str, command)), stdout=self.log, stderr=subprocess.STDOUT)

    def __enter__(self) -> "Server":
        deadline = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(f"{self.url}/health"):
                    return self
            except (urllib.error.URLError, ConnectionError) as error:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    self.__exit__(None, None, None)
                    raise RuntimeError(f"llama-server did not start, see {self.log.name}.") from error
                time.sleep(0.1)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.process.terminate()
        self.process.wait()
        self.log.close()

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        """The answer to a request."""
        return post(self.url + path, **body)

    def ask(self, prompt: str, task: str | None, length: int = 32) -> str:
        """The greedy answer to a prompt; without a task, the base model's.

        Whoever asks over several connections must let nothing come between the two requests.
        """
        if task is None:
            self.post("/slots/0?action=erase")
        else:
            prefix = self.post("/slots/0?action=restore", filename=f"{task}.slot")["n_restored"]
        answer = self.post("/completion", prompt=prompt, n_predict=length, temperature=0, cache_prompt=True)
        if task is not None and answer["timings"]["cache_n"] != prefix:
            raise RuntimeError(f"The prompt does not begin with the prefix of task '{task}': {prompt!r}.")
        return answer["content"]


def train(folder: Path, seed: int) -> None:
    """The quickstart's two tasks: solutions that are right, and those that are also in one line."""
    torch.manual_seed(seed)
    base, tokenizer = load_base(), load_tokenizer()
    stream = problems("train", seed)
    for task, wanted in zip(TASKS, (bool, is_one_line), strict=True):
        solutions = collect(own_solutions(base, tokenizer, stream, wanted), SOLUTIONS, task)
        tune(tokenizer, solutions, S0Config(alpha=1.0, l2_lambda=5e-4), 5e-3, 20, folder / task, seed)


def main() -> None:
    """Trains, exports, serves, asks and compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama_cpp", type=Path, required=True, help="folder of llama.cpp, built in its folder build")
    parser.add_argument("--output", type=Path, default=Path("quickstart-output"), help="folder for all that is written")
    parser.add_argument("--prompts", type=int, default=20, help="how many held-out problems are asked")
    parser.add_argument("--seed", type=int, default=0, help="of problems, samples and adapters")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the model is too small for more
    folder = arguments.output
    if not all((folder / task).exists() for task in TASKS):
        train(folder, arguments.seed)

    # Of a real model: python path/to/llama.cpp/convert_hf_to_gguf.py folder-of-the-model
    gguf = folder / "tiny.gguf"
    converter = Path(__file__).parent / "miniature" / "to_gguf.py"
    subprocess.run([sys.executable, converter, arguments.llama_cpp, FOLDER, gguf], check=True)

    model = PeftModel.from_pretrained(load_base(), folder / TASKS[0], adapter_name=TASKS[0]).eval()
    model.load_adapter(folder / TASKS[1], adapter_name=TASKS[1])
    for task in TASKS:
        slot = folder / f"{task}.slot"
        write_slot(model, gguf, slot, adapter_name=task, cache=CACHE, overwrite=True)
        found = verify(slot, model, gguf, adapter_name=task, cache=CACHE)
        print(f"{slot}: changes logits by {found.effect:.2f}, as in transformers but for {found.error:.0e} of that.")

    # Tasks take turns.
    prompts = [problem.prompt for problem in HELD_OUT[: arguments.prompts]]
    answers: dict[str | None, list[str]] = {None: [], **{task: [] for task in TASKS}}
    with Server(arguments.llama_cpp, gguf, folder) as server:
        for prompt in prompts:
            for task in answers:
                answers[task].append(server.ask(prompt, task))

    print(f"\n{prompts[0]}")
    for task, given in answers.items():
        if task is not None:
            model.set_adapter(task)
        with model.disable_adapter() if task is None else nullcontext():
            expected = complete(model, load_tokenizer(), prompts)
        same = sum(here == there for here, there in zip(given, expected, strict=True))
        print(f"\n    # {task or 'base'}{given[0]}\n    # {same} of {len(prompts)} answers are those of transformers.")
        if same < len(prompts):
            raise SystemExit("llama-server and transformers answer differently.")


if __name__ == "__main__":
    main()
