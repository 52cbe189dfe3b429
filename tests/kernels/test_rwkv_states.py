"""RWKV's files of tuned states in fla's RWKV models, whose kernels run interpreted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from full_disk import full_disk
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from test_fla_models import CASES, Case, ids_of, relative
from torch import Tensor

from peft_s0 import S0Config
from peft_s0.convert import export_rwkv, import_rwkv

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:fla"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


@pytest.fixture(params=["RWKV7Attention", "RWKV6Attention"])
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def layers_of(case: Case, model: Any) -> list[Any]:
    return [module for module in model.modules() if type(module) is case.layer]


def write(file: Path, case: Case, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A file as RWKV's trainers write it: in each head, rows are values and columns are keys."""
    generator = torch.Generator().manual_seed(3)
    states = {}
    for i, layer in enumerate(layers_of(case, case.build())):
        keys = layer.head_dim if case.model == "RWKV7" else layer.head_k_dim
        state = torch.randn(layer.num_heads, layer.head_v_dim, keys, generator=generator)
        states[f"blocks.{i}.att.time_state"] = state.to(dtype)
    torch.save(states, file)
    return states


def contents(file: Path) -> dict[str, Tensor]:
    return torch.load(file, weights_only=True)


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(actual) == list(expected)
    for name, state in expected.items():
        assert actual[name].dtype == state.dtype
        assert torch.equal(actual[name], state)


@torch.no_grad()
def test_rows_are_values_and_columns_are_keys(case: Case, tmp_path: Path) -> None:
    """RWKV writes its recurrence with the key on the right, S_t = S_{t-1} diag(w_t) + v_t k_t^T and S_t r_t; the twin
    is the formula of fla's layer, which has the key on the left."""
    states = write(tmp_path / "state.pth", case)
    import_rwkv(tmp_path / "state.pth", tmp_path / "adapter", case.build())
    model = PeftModel.from_pretrained(case.build(), tmp_path / "adapter")
    # The first layer: RWKV-7's later ones mix values of the first into their own.
    layer, twin = layers_of(case, model)[0], layers_of(case, case.build())[0].double()
    hidden = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(2))
    by_key = torch.einsum("hvk->hkv", states["blocks.0.att.time_state"].double()).expand(2, -1, -1, -1)
    expected = case.naive(twin, hidden.double(), by_key)
    effect = (expected - case.naive(twin, hidden.double(), torch.zeros_like(by_key))).abs().max()
    assert effect > 0.1
    assert relative(layer(hidden_states=hidden)[0], expected, effect) < 1e-5
    config = model.peft_config["default"]
    assert (config.alpha, config.normalize, config.l2_lambda) == (1.0, False, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_there_and_back(case: Case, tmp_path: Path, dtype: torch.dtype) -> None:
    """From the base model's config alone; of an adapter made here, the states that sequences start from."""
    case.build().save_pretrained(tmp_path / "base")
    states = write(tmp_path / "state.pth", case, dtype)
    import_rwkv(tmp_path / "state.pth", tmp_path / "adapter", tmp_path / "base")
    export_rwkv(tmp_path / "adapter", tmp_path / "again.pth", dtype=dtype)
    assert_same(contents(tmp_path / "again.pth"), states)
    import_rwkv(tmp_path / "again.pth", tmp_path / "adapter-again", tmp_path / "base")
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "adapter-again"))
    assert all(state.dtype == torch.float32 for state in first.values())
    assert_same(second, first)


@torch.no_grad()
def test_an_adapter_made_here(case: Case, tmp_path: Path) -> None:
    """Alpha is in the exported states, and a layer without a state has zeros."""
    model = get_peft_model(case.build(), S0Config(alpha=0.5, init_weights=1.0, layers_to_transform=[1])).eval()
    model.save_pretrained(tmp_path / "adapter")
    export_rwkv(tmp_path / "adapter", tmp_path / "state.pth", case.build())
    states = contents(tmp_path / "state.pth")
    assert not states["blocks.0.att.time_state"].any()
    import_rwkv(tmp_path / "state.pth", tmp_path / "again", case.build())
    loaded, ids = PeftModel.from_pretrained(case.build(), tmp_path / "again"), ids_of(2, 4)
    expected = model(ids).logits
    assert (expected - case.build()(ids).logits).abs().max() > 0.1
    torch.testing.assert_close(loaded(ids).logits, expected, atol=1e-6, rtol=0)
    with pytest.raises(FileExistsError, match=r"state\.pth' exists already"):
        export_rwkv(tmp_path / "adapter", tmp_path / "state.pth", case.build())
    export_rwkv(tmp_path / "adapter", tmp_path / "state.pth", case.build(), overwrite=True)
    assert_same(contents(tmp_path / "state.pth"), states)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "again", "state.pth"]


def test_a_disk_that_is_full(case: Case, tmp_path: Path) -> None:
    get_peft_model(case.build(), S0Config()).save_pretrained(tmp_path / "adapter")
    with full_disk(500), pytest.raises(OSError, match=r"state\.pth' cannot be written .*File too large"):
        export_rwkv(tmp_path / "adapter", tmp_path / "state.pth", case.build())
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_what_does_not_fit(case: Case, tmp_path: Path) -> None:
    states = write(tmp_path / "state.pth", case)
    first = states["blocks.0.att.time_state"]
    for changed, message in (
        ({"blocks.0.att.time_state": first}, r"Expected 2 layers, found 1; missing in the file: blocks\.1"),
        ({**states, "blocks.2.att.time_state": first}, r"not in the model: blocks\.2"),
        ({**states, "blocks.0.att.time_state": first[:, :5]}, r"blocks\.0\.att.* expected shape \[2, 16, \d+\], found"),
        ({**states, "blocks.0.att.time_state": first / 0}, "values that are NaN or infinite"),
    ):
        torch.save(changed, tmp_path / "state.pth")
        with pytest.raises(ValueError, match=message):
            import_rwkv(tmp_path / "state.pth", tmp_path / "adapter", case.build())
    assert [path.name for path in tmp_path.iterdir()] == ["state.pth"]
