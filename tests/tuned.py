"""Tiny models with random states, and what they are compared with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from architectures import VOCABULARY, Architecture
from peft import PeftModel, get_peft_model
from reference import with_slow_mixers
from torch import Tensor, nn
from transformers import PreTrainedModel

from peft_s0 import S0Config, S0Layer

RELATIVE_TOLERANCE = 1e-5


@dataclass
class Tuned:
    """A base model, the same with random states, and its naive twin."""

    architecture: Architecture
    base: PreTrainedModel
    model: PeftModel
    slow: nn.Module

    def ids(self, rows: int, tokens: int, seed: int = 0) -> Tensor:
        """Random token ids [rows, tokens] without special tokens, which stand at both ends of the vocabulary."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(3, VOCABULARY - 8, (rows, tokens), generator=generator)

    @torch.no_grad()
    def expected(self, ids: Tensor) -> Tensor:
        """Logits of the naive twin for unpadded rows."""
        return self.slow(ids, use_cache=False).logits.float()

    @torch.no_grad()
    def effect(self, ids: Tensor) -> float:
        """How far the states move the logits: what an error is measured against."""
        return float((self.expected(ids) - self.base(ids, use_cache=False).logits).abs().max())

    def assert_equal(
        self, actual: Tensor, expected: Tensor, effect: float, tolerance: float = RELATIVE_TOLERANCE
    ) -> None:
        """Equality to rounding, relative to the effect of the states."""
        assert effect > 0.3, f"the states move the logits by {effect} only: an error would not show"
        error = float((actual - expected).abs().max())
        assert error <= tolerance * effect, f"error {error:.2e} at an effect of {effect:.2e}"


def states_of(model: nn.Module) -> dict[str, Tensor]:
    """The effective state of each mixer, by the mixer's name in the base model; zero for an adapter without states."""
    return {
        name: layer.effective_state(adapter).detach() if adapter in layer.s0_state else torch.zeros(layer.state_shape)
        for name, layer, adapter in _layers(model)
    }


def offsets_of(model: nn.Module) -> dict[str, Tensor]:
    """The effective state offset of each mixer, by the mixer's name in the base model."""
    return {
        name: layer.effective_offset(adapter).detach()
        for name, layer, adapter in _layers(model)
        if adapter in layer.s0_offset
    }


def _layers(model: nn.Module) -> Iterator[tuple[str, S0Layer, str]]:
    for name, layer in model.named_modules():
        if isinstance(layer, S0Layer):
            yield name.removeprefix("base_model.model.").removesuffix(".s0"), layer, layer.active_adapters[0]


def tune(architecture: Architecture, seed: int = 0, **config: object) -> Tuned:
    """A tiny model with random non-zero states."""
    # Frozen as the adapted model is: whether a weight needs a gradient decides how torch multiplies by it.
    base = architecture.build(seed).requires_grad_(False)
    arguments = {"alpha": 0.7, "init_weights": 1.0, "l2_lambda": 0.0, **config}
    model = get_peft_model(architecture.build(seed), S0Config(**arguments)).eval()
    slow = with_slow_mixers(base, architecture.slow_mixer, states_of(model), offsets_of(model))
    return Tuned(architecture, base, model, slow)
