"""What S0's hooks take where a sequence starts: in a model, and a layer's in a loop.

    python benchmarks/hooks.py [--rounds N] [--device cpu|cuda] [--json FILE]

In a loop the processor's caches hold all that a hook needs; in a model, the operations since the layer before have
taken its place, and the same lines take several times as long. On an accelerator the time is the host's, which launches
and does not wait.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from time import thread_time
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent))
from instructions import with_empty_hooks
from overhead import METHODS, base, tokens
from timing import environment, parser, report

from peft_s0.mixers import CACHE_ARGUMENTS, find_mixer

ADAPTED: dict[str, Callable[[nn.Module], nn.Module]] = {"empty ones": with_empty_hooks, "S0's": METHODS["S0"]}
REPEATS = 200


class Stopwatch:
    """Times the hooks that a module has, and keeps what they were called with last.

    Args:
        module: the module.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.before, self.after = list(module._forward_pre_hooks.values()), list(module._forward_hooks.values())
        self.arguments: dict[str, Any] = {}
        self.output: Any = None
        self.seconds = self._start = 0.0
        module.register_forward_pre_hook(self._begin, with_kwargs=True, prepend=True)
        module.register_forward_pre_hook(self._end_before)
        module.register_forward_hook(self._leave, prepend=True)
        module.register_forward_hook(self._end_after)

    def loop(self) -> float:
        """Seconds in a loop, for a sequence without a cache; that of the call itself has a past now."""
        arguments = {name: value for name, value in self.arguments.items() if name not in CACHE_ARGUMENTS}
        start = thread_time()
        for _ in range(REPEATS):
            for hook in self.before:
                hook(self.module, (), arguments)
            for hook in self.after:
                hook(self.module, (), self.output)
        return (thread_time() - start) / REPEATS

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.arguments = kwargs
        self._start = thread_time()

    def _end_before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.seconds += thread_time() - self._start

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.output = output
        self._start = thread_time()

    def _end_after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.seconds += thread_time() - self._start


@torch.no_grad()
def measure(inputs: dict[str, Tensor], rounds: int, model: nn.Module) -> dict[str, list[float]]:
    """Microseconds for each recurrent layer: all hooks of a model in a pass over a prompt, a layer's in a loop."""
    watches = [Stopwatch(module) for module in model.modules() if module._forward_pre_hooks or module._forward_hooks]
    mixers = [watch for watch in watches if find_mixer(type(watch.module)) is not None]
    found: dict[str, list[float]] = {"in a model": [], "in a loop": []}
    for round_ in range(-2, rounds):
        for watch in watches:
            watch.seconds = 0.0
        model(**inputs, use_cache=True)
        looped = mixers[round_ % len(mixers)].loop()
        if round_ >= 0:
            found["in a model"].append(1e6 * sum(watch.seconds for watch in watches) / len(mixers))
            found["in a loop"].append(1e6 * looped)
    return found


def main() -> None:
    """Print the table."""
    command = parser("What S0's hooks take where a sequence starts.", rounds=25)
    command.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options = command.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    mask = torch.arange(64).ge(torch.tensor([[0], [9]])).long().to(options.device)
    prompts = {
        "prefill, 1 x 64": {"input_ids": tokens(options.device, 1, 64)},
        "prefill, 2 x 64, left-padded": {"input_ids": tokens(options.device, 2, 64), "attention_mask": mask},
    }
    rows = []
    for measured, inputs in prompts.items():
        for hooks, adapt in ADAPTED.items():
            for where, times in measure(inputs, options.rounds, adapt(base(options.device)).eval()).items():
                low, median, high = statistics.quantiles(times, n=4)
                rows.append(
                    {
                        "measured": measured,
                        "hooks": hooks,
                        "where": where,
                        "us a layer": round(median, 1),
                        "quartiles": f"{low:.1f} to {high:.1f}",
                    }
                )
    report({"hooks": rows}, environment(options.device), options.json)


if __name__ == "__main__":
    main()
