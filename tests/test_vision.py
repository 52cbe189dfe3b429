"""Text and images through the vision-language classes, which reuse the text models' mixers."""

from __future__ import annotations

import pytest
import torch
from architectures import ARCHITECTURES
from torch import Tensor
from tuned import Tuned, tune

ROWS = [row for row in ARCHITECTURES if row.name.endswith(("_vl", "_omni"))]


def picture(tuned: Tuned, text: Tensor) -> dict[str, Tensor]:
    """An image of 4 x 4 patches, 4 tokens, in front of each row of text."""
    config, rows = tuned.base.config, text.shape[0]
    image = torch.full((rows, 4), config.image_token_id)
    generator = torch.Generator().manual_seed(1)
    if tuned.architecture.name == "nemotron_h_omni":
        patches = torch.randn(rows * 16, 3 * 4 * 4, generator=generator)
        grid = torch.tensor([[4, 4]] * rows)
        return {"input_ids": torch.cat([image, text], dim=1), "pixel_values": patches, "image_grid_hw": grid}
    start, end = (torch.full((rows, 1), token) for token in (config.vision_start_token_id, config.vision_end_token_id))
    ids = torch.cat([start, image, end, text], dim=1)
    return {
        "input_ids": ids,
        "pixel_values": torch.randn(rows * 16, 3 * 2 * 4 * 4, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * rows),
        "mm_token_type_ids": (ids == config.image_token_id).int(),
    }


@pytest.mark.parametrize("architecture", ROWS, ids=lambda row: row.name)
def test_images(architecture) -> None:
    tuned = tune(architecture)
    inputs = picture(tuned, tuned.ids(2, 9))
    with torch.no_grad():
        expected = tuned.slow(
            **inputs | {"pixel_values": inputs["pixel_values"].double()}, use_cache=False
        ).logits.float()
        base = tuned.base(**inputs).logits
        without = tuned.base(inputs["input_ids"]).logits
        assert float((base - without).abs().max()) > 1e-2, "the picture does not reach the logits"
        effect = float((expected - base).abs().max())
        tuned.assert_equal(tuned.model(**inputs).logits, expected, effect)
        padding = torch.zeros(2, 5, dtype=torch.long)
        by_token = [name for name in ("input_ids", "mm_token_type_ids") if name in inputs]
        padded = {name: torch.cat([padding, inputs[name]], dim=1) for name in by_token}
        mask = torch.cat([padding, torch.ones_like(inputs["input_ids"])], dim=1)
        logits = tuned.model(**inputs | padded, attention_mask=mask).logits[:, 5:]
        tuned.assert_equal(logits, expected, effect, tolerance=3e-5)
        generated = tuned.model.generate(**inputs, max_new_tokens=4, do_sample=False)
        assert generated.shape[1] == inputs["input_ids"].shape[1] + 4
