"""Two tasks over HTTP, as OpenAI's API has it: `peft-s0 serve`, and many clients that ask for both at a time.

    python examples/serve.py

The two adapters of the quickstart are trained on the tiny model, unless they are there from a run of it. The server is
a process of its own. All answers are compared with those of transformers with the same adapters, one row at a time.
"""

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from peft import PeftModel

from llama_server import TASKS, post, train
from miniature.base import FOLDER, load_base, load_tokenizer
from miniature.evaluate import HELD_OUT, complete

BASE = "tiny"


@contextmanager
def server(folder: Path) -> Iterator[str]:
    """`peft-s0 serve` with the tasks of a folder; gives its address."""
    command = [sys.executable, "-m", "peft_s0", "serve", str(FOLDER), "--name", BASE, "--dtype", "float32"]
    command += [f"--task={task}={folder / task}" for task in TASKS]
    with subprocess.Popen([*command, "--port", "0"], stderr=subprocess.PIPE, text=True) as process:
        try:
            said = ""
            while not (found := re.search(r"running on (http://\S+)", said)):
                line = process.stderr.readline()
                if not line:
                    raise RuntimeError(f"The server did not start:\n{said}")
                said += line
            yield found[1]
        finally:
            process.terminate()


def ask(url: str, task: str, prompt: str) -> str:
    """The greedy answer to a prompt. Any client of OpenAI's API does the same."""
    answer = post(f"{url}/v1/completions", model=task, prompt=prompt, max_tokens=32, temperature=0)
    return answer["choices"][0]["text"]


def main() -> None:
    """Trains, serves, asks and compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("quickstart-output"), help="folder of the adapters")
    parser.add_argument("--prompts", type=int, default=20, help="how many held-out problems are asked")
    parser.add_argument("--seed", type=int, default=0, help="of problems, samples and adapters")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the model is too small for more
    folder = arguments.output
    if not all((folder / task).exists() for task in TASKS):
        train(folder, arguments.seed)

    prompts = [problem.prompt for problem in HELD_OUT[: arguments.prompts]]
    names = (BASE, *TASKS)
    with server(folder) as url, ThreadPoolExecutor(8) as clients:
        # Neighbours in the batch have different tasks.
        wanted = [(name, prompt) for prompt in prompts for name in names]
        answers = list(clients.map(lambda one: ask(url, *one), wanted))

    model = PeftModel.from_pretrained(load_base(), folder / TASKS[0], adapter_name=TASKS[0]).eval()
    model.load_adapter(folder / TASKS[1], adapter_name=TASKS[1])
    print(f"\n{prompts[0]}")
    for place, name in enumerate(names):
        if name != BASE:
            model.set_adapter(name)
        with model.disable_adapter() if name == BASE else nullcontext():
            expected = complete(model, load_tokenizer(), prompts, batch_size=1)
        given = answers[place :: len(names)]
        same = sum(here == there for here, there in zip(given, expected, strict=True))
        print(f"\n    # {name}{given[0]}\n    # {same} of {len(prompts)} answers are those of transformers.")
        if same < len(prompts):
            raise SystemExit("The server and transformers answer differently.")


if __name__ == "__main__":
    main()
