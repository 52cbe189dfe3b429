"""Measure what goes wrong where a state is put into a cache by hand, for docs/padding-and-packing.md.

    python docs/make_padding.py

Two tiny random models with random states, on a CPU. "By hand" is what one would try first: a transformers cache whose
recurrent states are the initial states and whose convolution has seen zeros, passed to the model. Each error is
the largest difference of a logit from that of the same row alone, unpadded, in one call with S0, as a share of what the
states move there at most.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.utils import logging

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from architectures import MAIN, VOCABULARY, Architecture  # noqa: E402

from peft_s0 import S0Config, S0Layer  # noqa: E402
from peft_s0.mixers import cache_argument  # noqa: E402

PAGE = ROOT / "docs" / "padding-and-packing.md"
TOKENS = 12

Forward = Callable[..., Tensor]


def by_hand(base: nn.Module, states: dict[int, Tensor]) -> Forward:
    """The base model on a cache that holds the states."""
    convolved: dict[int, Tensor] = {}
    probe = DynamicCache(config=base.config)
    argument = cache_argument(type(base))
    base(torch.ones(1, 2, dtype=torch.long), use_cache=True, **{argument: probe})
    for index in states:
        convolved[index] = torch.zeros_like(probe.layers[index].conv_states[0])

    def forward(ids: Tensor, **arguments: Tensor) -> Tensor:
        cache = DynamicCache(config=base.config)
        for index, state in states.items():
            cache.update_conv_state(convolved[index].repeat(len(ids), 1, 1), index)
            cache.update_recurrent_state(state.repeat(len(ids), 1, 1, 1), index)
        return base(ids, use_cache=True, **{argument: cache}, **arguments).logits

    return forward


def padded(row: Tensor, pads: int) -> dict[str, Tensor]:
    """A row behind pads, with its mask and positions."""
    mask = torch.cat([torch.zeros(pads, dtype=torch.long), torch.ones_like(row)])
    ids = torch.cat([torch.zeros(pads, dtype=torch.long), row])
    positions = (mask.cumsum(0) - 1).clamp_min(0)
    return {"ids": ids[None], "attention_mask": mask[None], "position_ids": positions[None]}


def cases(row: Tensor, other: Tensor) -> dict[str, tuple[dict[str, Tensor], Callable[[Tensor], Tensor]]]:
    """What each case passes, and where the row's logits are in what comes back."""
    positions = torch.cat([torch.arange(len(other)), torch.arange(len(row))])
    packed = {"ids": torch.cat([other, row])[None], "position_ids": positions[None]}
    found: dict[str, tuple[dict[str, Tensor], Callable[[Tensor], Tensor]]] = {
        "alone": ({"ids": row[None]}, lambda logits: logits[0])
    }
    for pads in (1, 4, 16, 64):
        arguments = padded(row, pads)
        found[f"{pads} {'pad' if pads == 1 else 'pads'} in front"] = arguments, lambda logits: logits[0, -len(row) :]
    found["packed behind another"] = packed, lambda logits: logits[0, len(other) :]
    return found


@torch.no_grad()
def errors(architecture: Architecture) -> dict[str, tuple[str, str]]:
    """For each case the error by hand and that of S0."""
    base = architecture.build(0)
    model = get_peft_model(architecture.build(0), S0Config(alpha=0.7, init_weights=1.0)).eval()
    states = {
        int(re.findall(r"\d+", name)[0]): layer.effective_state("default")
        for name, layer in model.named_modules()
        if isinstance(layer, S0Layer)
    }
    generator = torch.Generator().manual_seed(0)
    row, other = (torch.randint(3, VOCABULARY - 8, (TOKENS,), generator=generator) for _ in range(2))
    exact = model(row[None], use_cache=False).logits[0]
    effect = (exact - base(row[None], use_cache=False).logits[0]).abs().max()
    manual = by_hand(base, states)

    def error(forward: Forward, arguments: dict[str, Tensor], find: Callable[[Tensor], Tensor]) -> str:
        share = float((find(forward(**arguments)) - exact).abs().max() / effect)
        return f"{share:.0%}" if share > 1e-3 else "0" if share == 0 else f"{share:.0e}"

    def with_s0(ids: Tensor, **arguments: Tensor) -> Tensor:
        return model(ids, use_cache=False, **arguments).logits

    return {
        name: (error(manual, arguments, find), error(with_s0, arguments, find))
        for name, (arguments, find) in cases(row, other).items()
    }


def table() -> str:
    """The page's table."""
    measured = {architecture.name: errors(architecture) for architecture in MAIN}
    head = " | ".join(f"{name}, by hand | {name}, S0" for name in measured)
    lines = [f"| a row of {TOKENS} tokens | {head} |", f"| --- |{' --- |' * 2 * len(measured)}"]
    for case in next(iter(measured.values())):
        cells = " | ".join(" | ".join(found[case]) for found in measured.values())
        lines.append(f"| {case} | {cells} |")
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    text = PAGE.read_text()
    PAGE.write_text(re.sub(r"(?m)(^\|.*\n)+", table() + "\n", text, count=1))
