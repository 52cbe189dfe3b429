"""What is written, byte by byte, and what is refused before anything is: none of this needs llama.cpp to run."""

from __future__ import annotations

import dataclasses
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from tuned import states_of, tune

from llama.conftest import NAMES, ROWS, Case
from peft_s0 import S0Config
from peft_s0.export import llama_cpp
from peft_s0.export.llama_cpp import read_layout, state_data, write_state
from peft_s0.injection import layer_of
from peft_s0.mixers import find_mixer

MakeCase = Callable[..., Case]


def recurrent(model: PeftModel) -> dict[int, Any]:
    """The mixers by their layers, from transformers' side."""
    return {module.layer_idx: module for module in model.modules() if find_mixer(type(module)) is not None}


def test_layouts(case: Case) -> None:
    layout = read_layout(case.gguf)
    mixers = recurrent(case.tuned.model)
    assert layout.architecture == NAMES[case.tuned.architecture.name]
    assert layout.recurrent == tuple(sorted(mixers))
    assert {layout.shape} == {tuple(layer_of(mixer).state_shape) for mixer in mixers.values()}
    assert layout.layers == case.tuned.base.config.num_hidden_layers
    mixer = next(iter(mixers.values()))
    assert layout.convolution == mixer.conv1d.weight.shape[0] * (mixer.conv1d.weight.shape[-1] - 1)


def as_kept(name: str, state: Tensor, key_heads: int) -> Tensor:
    """A layer's state as llama.cpp keeps it, number by number."""
    heads, rows, columns = state.shape
    if not name.startswith("qwen"):
        return state
    kept = torch.empty(heads, columns, rows)
    for head in range(heads):
        key_head, of_it = divmod(head, heads // key_heads)
        place = of_it * key_heads + key_head if name.startswith("qwen3_5") else head
        for row in range(rows):
            for column in range(columns):
                kept[place, column, row] = state[head, row, column]
    return kept


def test_bytes(case: Case) -> None:
    name, layout = case.tuned.architecture.name, read_layout(case.gguf)
    states = list(states_of(case.tuned.model).values())
    data = state_data(case.tuned.model, case.gguf, streams=3)
    words = [0xAF143CD8, 0]
    words += [] if name == "mamba2" else [3, 0, 0, 0]
    head = struct.pack(f"<{len(words)}I", *words) + struct.pack("<IiIII", 1, -1, 0, 0, layout.layers)
    convolution = struct.pack("<iQ", 0, 4 * layout.convolution) + bytes(4 * layout.convolution)
    body = [
        struct.pack("<iQ", 0, 4 * state.numel()) + as_kept(name, state, layout.groups).numpy().tobytes()
        for state in states
    ]
    assert data == head + convolution * len(states) + b"".join(body)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"normalize": True, "alpha": 3.0},
        {"rank": 2, "init_weights": False},
        {"layers_to_transform": [2]},
        {"train_alpha": 5.0, "alpha": 0.07},
        {"alpha_pattern": {"layers.1.linear_attn": 2.0}},
        {"learn_alpha": True},
    ],
    ids=str,
)
def test_saved_is_live(config: dict[str, Any], make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case("qwen3_5", **config)
    case.tuned.model.save_pretrained(tmp_path / "adapter")
    live = state_data(case.tuned.model, case.gguf)
    base = {"base_model": case.tuned.base}
    assert state_data(tmp_path / "adapter", case.gguf, **base) == live
    file = write_state(str(tmp_path / "adapter"), case.gguf, tmp_path / "new" / "task.state", **base)
    header = struct.pack("<3I", 0x67677371, 3, 0)
    assert file.read_bytes() == header + live[8:]
    assert [path.name for path in file.parent.iterdir()] == ["task.state"]


def test_a_choice_of_adapters(make_case: MakeCase) -> None:
    case = make_case("falcon_h1")
    model = case.tuned.model
    first = state_data(model, case.gguf)
    torch.manual_seed(1)
    model.add_adapter("other", S0Config(init_weights=1.0))
    assert state_data(model, case.gguf) == first
    other = state_data(model, case.gguf, adapter_name="other")
    assert other != first
    model.set_adapter("other")
    assert state_data(model, case.gguf) == other
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"Name one of the active adapters \['default', 'other'\]"):
        state_data(model, case.gguf)
    with pytest.raises(ValueError, match="no S0 adapter 'third'"):
        state_data(model, case.gguf, adapter_name="third")


def test_the_old_file_stays_if_writing_fails(
    make_case: MakeCase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case("mamba2")
    file = write_state(case.tuned.model, case.gguf, tmp_path / "task.state")
    before = file.read_bytes()

    def fail(path: Path, data: bytes) -> None:
        with path.open("wb") as opened:
            opened.write(data[:1000])
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="no space left"):
        write_state(case.tuned.model, case.gguf, file, overwrite=True)
    with pytest.raises(FileExistsError, match="Choose another name, or replace it with overwrite=True"):
        write_state(case.tuned.model, case.gguf, file)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


# What is refused.


def refuses(message: str, adapter: Any, file: Path, tmp_path: Path, **options: Any) -> None:
    with pytest.raises(ValueError, match=message):
        write_state(adapter, file, tmp_path / "never", **options)
    assert not (tmp_path / "never").exists()


def test_adapters_that_are_more_than_states(make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case("falcon_h1", modules_to_save=["lm_head"])
    refuses("has modules_to_save", case.tuned.model, case.gguf, tmp_path)
    case.tuned.model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    refuses("has modules_to_save", tmp_path / "adapter", case.gguf, tmp_path, base_model=case.tuned.base)
    refuses("adapter_name='other' is for a live model", tmp_path / "adapter", case.gguf, tmp_path, adapter_name="other")
    with pytest.raises(TypeError, match=r"\['subfolder'\] are for a saved adapter"):
        state_data(case.tuned.model, case.gguf, subfolder="x")


def test_adapters_of_another_kind(make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case("falcon_h1")
    for variant in ("offset", "both"):
        other = tune(case.tuned.architecture, variant=variant)
        refuses(f"has variant '{variant}'. Only 'initial'", other.model, case.gguf, tmp_path)
    lora = get_peft_model(ROWS["falcon_h1"].build(), LoraConfig(target_modules=["q_proj"])).eval()
    refuses("no S0 adapter 'default'", lora, case.gguf, tmp_path)
    with pytest.raises(TypeError, match="got FalconH1ForCausalLM"):
        state_data(case.tuned.base, case.gguf)


def test_training_mode(make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case("falcon_h1")
    refuses(r"call eval\(\) first", case.tuned.model.train(), case.gguf, tmp_path)


def test_values_that_are_not_finite(make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case("falcon_h1")
    mixer = recurrent(case.tuned.model)[1]
    with torch.no_grad():
        layer_of(mixer).state("default").weight[0, 0, 0] = torch.nan
    refuses("1 of 1024 values that are NaN", case.tuned.model, case.gguf, tmp_path)


def test_another_model_of_the_same_size(make_case: MakeCase, tmp_path: Path) -> None:
    """Also where only the order of heads is another."""
    for name in NAMES:
        case = make_case(name)
        other = tune(ROWS[name], seed=1)
        refuses(r"is not that of .*: dt_bias of layer \d is \[", other.model, case.gguf, tmp_path)
        with torch.no_grad():
            for mixer in recurrent(case.tuned.model).values():
                mixer.dt_bias.copy_(mixer.dt_bias.flip(0))
        refuses(r"is not that of .*: dt_bias of layer \d is \[", case.tuned.model, case.gguf, tmp_path)


def test_a_model_in_bfloat16_is_the_same(make_case: MakeCase) -> None:
    case = make_case("qwen3_next")
    data = state_data(case.tuned.model, case.gguf)
    assert state_data(case.tuned.model.to(torch.bfloat16), case.gguf) == data


def saved(model: PeftModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def test_other_shapes(ggufs: dict[str, Path], tmp_path: Path) -> None:
    def config() -> Any:
        made = ROWS["mamba2"].config()
        made.num_heads, made.head_dim = 8, 16
        return made

    tuned = tune(dataclasses.replace(ROWS["mamba2"], config=config))
    message = r"state of layer 0 of .* has shape \[8, 16, 16\], expected \[4, 16, 16\] for '.*mamba2.gguf'"
    refuses(message, tuned.model, ggufs["mamba2"], tmp_path)
    refuses(message, saved(tuned.model, tmp_path / "adapter"), ggufs["mamba2"], tmp_path, base_model=tuned.base)


def test_other_models_with_states_of_the_same_shape(
    make_case: MakeCase, ggufs: dict[str, Path], tmp_path: Path
) -> None:
    case = make_case("qwen3_next")
    message = "for a Qwen3NextForCausalLM .* is a qwen35, that is Qwen3_5, with"
    refuses(message, case.tuned.model, ggufs["qwen3_5"], tmp_path)
    adapter = saved(case.tuned.model, tmp_path / "adapter")
    refuses(message, adapter, ggufs["qwen3_5"], tmp_path, base_model=case.tuned.base)
    message = (
        "for a Qwen3NextForCausalLM with mixers called linear_attn; .* is a falcon-h1, that is FalconH1, with mamba"
    )
    refuses(message, adapter, ggufs["falcon_h1"], tmp_path, base_model=case.tuned.base)
    # All that is told apart by an optional part of the name.
    refuses("is a qwen35moe, that is Qwen3_5Moe", make_case("qwen3_5").tuned.model, ggufs["qwen3_5_moe"], tmp_path)
    refuses("is a qwen35, that is Qwen3_5, with", make_case("qwen3_5_moe").tuned.model, ggufs["qwen3_5"], tmp_path)


def test_other_layers(ggufs: dict[str, Path], tmp_path: Path) -> None:
    def longer() -> Any:
        config = ROWS["qwen3_5"].config()
        config.num_hidden_layers = 5
        config.layer_types = ["linear_attention", *config.layer_types]
        return config

    row = dataclasses.replace(ROWS["qwen3_5"], config=longer)
    message = r"recurrent layers of .* are \[0, 1, 2, 3\], those of '.*' \[0, 1, 2\]"
    tuned = tune(row)
    refuses(message, tuned.model, ggufs["qwen3_5"], tmp_path)
    refuses(message, saved(tuned.model, tmp_path / "adapter"), ggufs["qwen3_5"], tmp_path, base_model=tuned.base)
    # Also of an adapter that tunes layers alone that are there.
    part = tune(row, layers_to_transform=[1])
    refuses(message, saved(part.model, tmp_path / "part"), ggufs["qwen3_5"], tmp_path, base_model=tuned.base)


@pytest.mark.parametrize("streams", [0, True, 1.0])
def test_streams(streams: Any, make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case("falcon_h1")
    refuses("streams must be an integer >= 1, got", case.tuned.model, case.gguf, tmp_path, streams=streams)


def write_gguf(file: Path, architecture: str, entries: dict[str, int], tensors: list[str]) -> Path:
    writer = gguf.GGUFWriter(file, architecture)
    for key, value in entries.items():
        writer.add_uint32(f"{architecture}.{key}", value)
    for name in tensors:
        writer.add_tensor(name, np.zeros(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_files_that_are_none_of_ours(make_case: MakeCase, tmp_path: Path) -> None:
    model = make_case("mamba2").tuned.model
    refuses("There is no file", model, tmp_path / "none.gguf", tmp_path)
    (tmp_path / "text.gguf").write_text("no GGUF at all, but a text that is long enough to look like one")
    refuses("is not a whole GGUF", model, tmp_path / "text.gguf", tmp_path)
    refuses(
        "is of the architecture 'llama'. States can be exported for mamba2, falcon-h1",
        model,
        write_gguf(tmp_path / "llama.gguf", "llama", {"block_count": 2}, ["a"]),
        tmp_path,
    )
    sizes = {"block_count": 2, "ssm.time_step_rank": 4, "ssm.inner_size": 128, "ssm.state_size": 16}
    bare = write_gguf(tmp_path / "bare.gguf", "mamba2", sizes, ["a"])
    refuses("no recurrent layer among its 2", model, bare, tmp_path)
    some = write_gguf(tmp_path / "some.gguf", "mamba2", sizes, ["blk.0.ssm_conv1d.weight"])
    refuses("has no mamba2.ssm.group_count", model, some, tmp_path)
    sizes |= {"ssm.group_count": 1, "ssm.conv_kernel": 4}
    without = write_gguf(tmp_path / "without.gguf", "mamba2", sizes, ["blk.0.ssm_conv1d.weight"])
    refuses("has no float32 tensor blk.0.ssm_dt.bias", model, without, tmp_path)


def test_truncated(make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case("mamba2")
    whole = case.gguf.read_bytes()
    for size in (2, 100, len(whole) // 2):
        (tmp_path / "short.gguf").write_bytes(whole[:size])
        refuses("is not a whole GGUF", case.tuned.model, tmp_path / "short.gguf", tmp_path)


def test_split_models(make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case("qwen3_5")
    reader = gguf.GGUFReader(case.gguf)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "qwen35", split_max_tensors=20)
    for key, entry in reader.fields.items():
        if key.startswith("qwen35.") and entry.types[0] == gguf.GGUFValueType.UINT32:
            writer.add_uint32(key, entry.contents())
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    parts = sorted(tmp_path.glob("model-*.gguf"))
    assert len(parts) == 3
    assert state_data(case.tuned.model, parts[0]) == state_data(case.tuned.model, case.gguf)
    parts[1].unlink()
    refuses("is one of 3 parts, the others are not beside it", case.tuned.model, parts[0], tmp_path)


def test_without_the_library(make_case: MakeCase, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case("mamba2")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"pip install 'peft-s0\[llama\]'"):
        state_data(case.tuned.model, case.gguf)


def test_supported_is_what_is_tested() -> None:
    assert set(llama_cpp.SUPPORTED) == set(NAMES.values())
