"""What an adapter costs in instructions of the processor, which are counted and not timed.

    python benchmarks/instructions.py [--json FILE]

needs valgrind, and some minutes. On a busy machine the ratio of two times differs by some hundredths from run to run;
that of two counts by a thousandth or two. The models have 32 layers, 24 of them recurrent, and are so narrow that they
do little but run Python, as the host of an accelerator does: in a wide model, an adapter's share is smaller. A count
says nothing of the processor's caches.
"""

from __future__ import annotations

import gc
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent))
from handling import TINY
from overhead import LORA, METHODS, base, on_cache, tokens
from timing import environment, parser, report

from peft_s0.mixers import find_mixer

STEPS = 4


def with_empty_hooks(model: nn.Module) -> nn.Module:
    """Hooks as S0's on each mixer, which do nothing: what torch takes to call them, and no hook can be below."""
    for module in model.modules():
        if find_mixer(type(module)) is not None:
            module.register_forward_pre_hook(lambda module, args, kwargs: None, with_kwargs=True)
            module.register_forward_hook(lambda module, args, output: None, always_call=True)
    return model


COUNTED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "base": METHODS["base"],
    "base, empty hooks on mixers": with_empty_hooks,
    "S0": METHODS["S0"],
    LORA: METHODS[LORA],
}


@torch.no_grad()
def count(run: Callable[[], object]) -> None:
    """Let callgrind count some runs, once Python has adapted its bytecode to them."""
    for _ in range(2 * STEPS):
        run()
    torch._C._valgrind_toggle()
    for _ in range(STEPS):
        run()
    torch._C._valgrind_toggle_and_dump_stats()


@torch.no_grad()
def steps(model: nn.Module) -> None:
    """Count steps behind a prompt."""
    ids, cache = tokens("cpu", 1, 16), DynamicCache(config=model.config)
    call = on_cache(model, cache)
    model(input_ids=ids, **call)
    count(partial(model, input_ids=ids[:, :1], **call))


def prefills(mask: Tensor | None, model: nn.Module) -> None:
    """Count passes over prompts."""
    count(partial(model, input_ids=tokens("cpu", 2, 16), attention_mask=mask, use_cache=True))


MEASUREMENTS: dict[str, Callable[[nn.Module], None]] = {
    "decode, 1 x 1": steps,
    "prefill, 2 x 16": partial(prefills, None),
    "prefill, 2 x 16, left-padded": partial(prefills, torch.arange(16).ge(torch.tensor([[0], [5]])).long()),
}


def under_valgrind() -> None:
    """Count everything once, in order."""
    torch.set_num_threads(1)
    models = [adapt(base("cpu", **TINY)).eval() for adapt in COUNTED.values()]
    gc.disable()
    # All before, imports above all, runs several times faster uncounted.
    subprocess.run(["callgrind_control", "--instr=on", str(os.getpid())], check=True, stdout=subprocess.DEVNULL)
    for measure in MEASUREMENTS.values():
        for model in models:
            measure(model)


def counts(folder: Path) -> list[int]:
    """Instructions of a pass, in the order they were counted in."""
    command = ["valgrind", "--tool=callgrind", "--instr-atstart=no", "--collect-atstart=no"]
    command += [f"--callgrind-out-file={folder / 'counts'}", sys.executable, __file__, "--under-valgrind"]
    fixed = {**os.environ, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=fixed, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"valgrind failed:\n{run.stderr[-3000:]}")
    files = sorted(folder.glob("counts.*"), key=lambda file: int(file.suffix[1:]))
    summaries = [re.findall(r"^summary: (\d+)", file.read_text(), re.MULTILINE) for file in files]
    return [int(total) // STEPS for (total,) in summaries]


def main() -> None:
    """Print the table."""
    command = parser("What an adapter costs in instructions.", rounds=1)
    command.add_argument("--under-valgrind", action="store_true", help="how this file calls itself")
    options = command.parse_args()
    logging.set_verbosity_error()
    if options.under_valgrind:
        under_valgrind()
        return
    if shutil.which("valgrind") is None:
        raise SystemExit("valgrind is not there; on Debian and Ubuntu: apt install valgrind.")
    with tempfile.TemporaryDirectory() as folder:
        found = iter(counts(Path(folder)))
    rows = []
    for measurement in MEASUREMENTS:
        numbers = {method: next(found) for method in COUNTED}
        for method, number in numbers.items():
            rows.append(
                {
                    "counted": measurement,
                    "method": method,
                    "millions": round(number / 1e6, 2),
                    "beside base": round((number - numbers["base"]) / 1e6, 2),
                    "ratio to base": round(number / numbers["base"], 4),
                }
            )
    torch.set_num_threads(1)
    report({"instructions": rows}, environment(), options.json)


if __name__ == "__main__":
    main()
