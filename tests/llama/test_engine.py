"""Tuned states in llama.cpp, against the naive recurrence: however the tokens come, the logits are the same."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
import torch
from full_disk import full_disk
from torch import Tensor
from tuned import Tuned, tune

from llama.conftest import NAMES, ROWS, Case
from peft_s0.export.llama_cpp import (
    CacheSettings,
    _Engine,
    set_state,
    state_data,
    verify,
    write_slot,
    write_state,
)

MakeCase = Callable[..., Case]
# As exact as llama.cpp can be: in a cache of half precision the base model itself is off by 1e-3.
EXACT = CacheSettings(flash_attention=False, type_k="f32", type_v="f32")
TOLERANCE = 2e-5
TOKENS = 21


@contextmanager
def engine_of(case: Case, sequences: int = 1, unified: bool = False) -> Iterator[_Engine]:
    with _Engine(llama_cpp, case.gguf, EXACT) as engine:
        engine.parameters.n_seq_max = sequences
        engine.parameters.kv_unified = unified
        engine.make_context(64 * sequences)
        yield engine


def decode(engine: _Engine, ids: Tensor, chunks: tuple[int, ...] = (TOKENS,), start: int = 0) -> Tensor:
    parts, position = [], start
    for part in ids[0].split(list(chunks)):
        parts.append(engine.decode(part.tolist(), position))
        position += len(part)
    return torch.cat(parts)[None]


CHUNKS = {"at once": (TOKENS,), "one by one": (1,) * TOKENS, "in chunks": (2, 1, 8, 10), "one, then all": (1, 20)}


def test_decoding(case: Case) -> None:
    ids = case.tuned.ids(1, TOKENS)
    expected, effect = case.tuned.expected(ids), case.tuned.effect(ids)
    data = state_data(case.tuned.model, case.gguf)
    with engine_of(case) as engine:
        for chunks in CHUNKS.values():
            engine.clear()
            set_state(engine.context, data)
            case.tuned.assert_equal(decode(engine, ids, chunks), expected, effect, TOLERANCE)
        # The base model again, when the state is gone.
        engine.clear()
        base = case.tuned.base(ids, use_cache=False).logits
        case.tuned.assert_equal(decode(engine, ids), base, effect, TOLERANCE)


@pytest.mark.parametrize("unified", [False, True])
@pytest.mark.parametrize("name", ["mamba2", "qwen3_5", "falcon_h1"])
def test_a_state_for_each_sequence(name: str, unified: bool, make_case: MakeCase) -> None:
    """Two tasks beside each other, and a sequence that starts from nothing."""
    case, other = make_case(name), tune(ROWS[name], init_weights=2.0)
    streams = 1 if unified else 3
    ids = case.tuned.ids(1, TOKENS)
    effect = case.tuned.effect(ids)
    with engine_of(case, sequences=3, unified=unified) as engine:
        for sequence, tuned in enumerate((case.tuned, other)):
            set_state(engine.context, state_data(tuned.model, case.gguf, streams=streams), sequence)
        expected = [case.tuned.expected(ids), other.expected(ids), case.tuned.base(ids, use_cache=False).logits]
        batch = llama_cpp.llama_batch_init(3 * TOKENS, 0, 1)
        batch.n_tokens = 3 * TOKENS
        for place in range(3 * TOKENS):
            position, sequence = divmod(place, 3)
            batch.token[place], batch.pos[place], batch.logits[place] = int(ids[0, position]), position, 1
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, sequence
        engine.parameters.n_batch = 3 * TOKENS
        assert llama_cpp.llama_decode(engine.context, batch) == 0
        shape = (TOKENS, 3, engine.vocabulary)
        pointer = ctypes.cast(llama_cpp.llama_get_logits(engine.context), ctypes.POINTER(ctypes.c_float))
        values = torch.tensor(pointer[: shape[0] * shape[1] * shape[2]]).view(shape)
        llama_cpp.llama_batch_free(batch)
        for sequence in range(3):
            case.tuned.assert_equal(values[None, :, sequence], expected[sequence], effect, TOLERANCE)


def test_the_class_of_llama_cpp_python(make_case: MakeCase) -> None:
    case = make_case("qwen3_5")
    ids = case.tuned.ids(1, TOKENS)
    model = llama_cpp.Llama(
        str(case.gguf),
        n_ctx=64,
        n_threads=1,
        n_threads_batch=1,
        logits_all=True,
        verbose=False,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        flash_attn=False,
    )
    data = state_data(case.tuned.model, case.gguf)
    for _ in range(2):
        model.reset()
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(model.ctx), True)
        set_state(model.ctx, data)
        model.eval(ids[0].tolist())
        logits = torch.tensor(model.scores[:TOKENS]).float()[None]
        case.tuned.assert_equal(logits, case.tuned.expected(ids), case.tuned.effect(ids), TOLERANCE)
    model.close()


def test_slots(case: Case, tmp_path: Path) -> None:
    ids = case.tuned.ids(1, TOKENS)
    prefix = ids[0, :4].tolist()
    file = tmp_path / "task.slot"
    assert write_slot(case.tuned.model, case.gguf, file, prefix, cache=EXACT) == prefix
    assert struct.unpack("<7i", file.read_bytes()[:28])[2:] == (4, *prefix)
    with engine_of(case) as engine:
        engine.load(file, prefix)
        logits = decode(engine, ids[:, 4:], (TOKENS - 4,), start=4)
    case.tuned.assert_equal(logits, case.tuned.expected(ids)[:, 4:], case.tuned.effect(ids), TOLERANCE)
    for written in (file, write_state(case.tuned.model, case.gguf, tmp_path / "task.state")):
        found = verify(written, case.tuned.model, case.gguf, cache=EXACT)
        assert found.error < TOLERANCE
        assert found.base < 1e-4
        assert found.effect > 0.3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["task.slot", "task.state"]


def other_order(tuned: Tuned) -> Tuned:
    """The same numbers in another order: what llama.cpp cannot see."""
    twin = tune(tuned.architecture)
    with torch.no_grad():
        for name, weight in twin.model.named_parameters():
            if ".s0_state." in name:
                weight.copy_(weight.clone().transpose(1, 2).reshape(weight.shape))
    return twin


def test_another_order_is_found(case: Case, tmp_path: Path) -> None:
    wrong = write_state(other_order(case.tuned).model, case.gguf, tmp_path / "wrong.state")
    right = write_state(case.tuned.model, case.gguf, tmp_path / "right.state")
    assert verify(right, case.tuned.model, case.gguf).error < 5e-3  # with the cache that servers have
    with pytest.raises(
        ValueError, match=r"is wrong for .* differs from what adapter 'default' changes in transformers"
    ):
        verify(wrong, case.tuned.model, case.gguf)
    found = verify(wrong, case.tuned.model, case.gguf, tolerance=10.0)
    assert found.error > 0.5


@pytest.mark.parametrize(("kind", "tolerance"), [("Q8_0", 0.1), ("Q4_0", 0.6)])
@pytest.mark.parametrize("name", ["mamba2", "qwen3_5", "falcon_h1"])
def test_quantised_models(name: str, kind: str, tolerance: float, make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case(name)
    file = tmp_path / f"{kind}.gguf"
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}"), 1
    assert llama_cpp.llama_model_quantize(str(case.gguf).encode(), str(file).encode(), ctypes.byref(parameters)) == 0
    assert file.stat().st_size < case.gguf.stat().st_size
    right = write_state(case.tuned.model, file, tmp_path / "right.state")
    assert right.read_bytes() == write_state(case.tuned.model, case.gguf, tmp_path / "same.state").read_bytes()
    found = verify(right, case.tuned.model, file, tolerance=tolerance)
    wrong = write_state(other_order(case.tuned).model, file, tmp_path / "wrong.state")
    with pytest.raises(ValueError, match="is wrong for"):
        verify(wrong, case.tuned.model, file, tolerance=tolerance)
    assert found.base > 1e-3  # it is quantised


# What is refused.


@pytest.mark.parametrize("name", ["mamba2", "qwen3_5"])
def test_used_sequences(name: str, make_case: MakeCase) -> None:
    case = make_case(name)
    ids = case.tuned.ids(1, TOKENS)
    data = state_data(case.tuned.model, case.gguf)
    with engine_of(case) as engine:
        memory = llama_cpp.llama_get_memory(engine.context)
        decode(engine, ids)
        with pytest.raises(ValueError, match=r"Sequence 0 has been used.*llama_memory_clear"):
            set_state(engine.context, data)
        engine.clear()
        set_state(engine.context, data)
        # A state that has no token yet is one, too, and llama_memory_seq_rm does not take it away.
        llama_cpp.llama_memory_seq_rm(memory, 0, -1, -1)
        with pytest.raises(ValueError, match="Sequence 0 has been used"):
            set_state(engine.context, data)
        logits = decode(engine, ids)
        case.tuned.assert_equal(logits, case.tuned.expected(ids), case.tuned.effect(ids), TOLERANCE)


def test_states_of_other_models(make_case: MakeCase, ggufs: dict[str, Path], tmp_path: Path) -> None:
    case, other = make_case("qwen3_5"), make_case("granitemoehybrid")
    ids = case.tuned.ids(1, TOKENS)
    data = state_data(case.tuned.model, case.gguf)
    wrong = {
        "mismatched layer count": state_data(other.tuned.model, other.gguf),
        "mismatched r row size": data[:40] + struct.pack("<Q", 8) + data[48:],
        "error loading state": data[:-4],
        "mismatched r type": data[:36] + struct.pack("<i", 1) + data[40:],
    }
    base = case.tuned.base(ids, use_cache=False).logits
    with engine_of(case) as engine:
        for message, refused in wrong.items():
            with pytest.raises(ValueError, match=f"llama.cpp refuses the state .*{message}"):
                set_state(engine.context, refused)
            engine.clear()
            case.tuned.assert_equal(decode(engine, ids), base, case.tuned.effect(ids), TOLERANCE)
            engine.clear()
    file = write_state(other.tuned.model, other.gguf, tmp_path / "other.state")
    with pytest.raises(ValueError, match=r"llama.cpp refuses '.*other.state' \(.*mismatched layer count"):
        verify(file, case.tuned.model, case.gguf)


def test_streams(make_case: MakeCase) -> None:
    case = make_case("falcon_h1")
    with (
        engine_of(case, sequences=2) as engine,
        pytest.raises(ValueError, match=r"for a cache of 1 streams, that of this context has 2. Pass streams=2"),
    ):
        set_state(engine.context, state_data(case.tuned.model, case.gguf))


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        (None, "puts no BOS in front of a prompt. Pass prefix="),
        ([], "The prefix is empty"),
        ([1, 128], r"Tokens \[128\] are outside of the GGUF's vocabulary of 128"),
        ([-1], r"Tokens \[-1\] are outside"),
    ],
)
def test_prefixes(prefix: Any, message: str, make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case("mamba2")
    with pytest.raises(ValueError, match=message):
        write_slot(case.tuned.model, case.gguf, tmp_path / "task.slot", prefix)
    assert not list(tmp_path.iterdir())


def test_cache_types(make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case("mamba2")
    with pytest.raises(ValueError, match="type_k must be one of ggml's types, as 'f16' or 'q8_0', got 'float'"):
        write_slot(case.tuned.model, case.gguf, tmp_path / "task.slot", [1], cache=CacheSettings(type_k="float"))


def test_a_slot_that_is_there(make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case("mamba2")
    file = tmp_path / "task.slot"
    write_slot(case.tuned.model, case.gguf, file, [1])
    before = file.read_bytes()
    with pytest.raises(FileExistsError, match="overwrite=True"):
        write_slot(case.tuned.model, case.gguf, file, [1, 2])
    assert file.read_bytes() == before
    write_slot(case.tuned.model, case.gguf, file, [1, 2], overwrite=True)
    assert file.read_bytes() != before


def test_versions(make_case: MakeCase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case("mamba2")
    data = state_data(case.tuned.model, case.gguf)
    file = write_state(case.tuned.model, case.gguf, tmp_path / "task.state")
    monkeypatch.setattr(llama_cpp, "__version__", "0.4.0")
    message = "tested with llama-cpp-python 0.3.36, found 0.4.0. Install that one, or pass check_version=False"
    with pytest.raises(ValueError, match=message):
        write_slot(case.tuned.model, case.gguf, tmp_path / "task.slot", [1])
    with pytest.raises(ValueError, match=message):
        verify(file, case.tuned.model, case.gguf)
    with engine_of(case) as engine:
        with pytest.raises(ValueError, match=message):
            set_state(engine.context, data)
        set_state(engine.context, data, check_version=False)
    assert verify(file, case.tuned.model, case.gguf, check_version=False).error < TOLERANCE


def test_files_of_other_versions(make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case("mamba2")
    file = write_state(case.tuned.model, case.gguf, tmp_path / "task.state")
    file.write_bytes(file.read_bytes()[:4] + struct.pack("<I", 4) + file.read_bytes()[8:])
    with pytest.raises(ValueError, match=r"no state of a sequence of version 3 \(magic 0x67677371, version 4\)"):
        verify(file, case.tuned.model, case.gguf)


def test_nothing_to_tell(make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case("falcon_h1", init_weights=True)
    file = write_state(case.tuned.model, case.gguf, tmp_path / "task.state")
    with pytest.raises(ValueError, match=r"changes logits by 0.0e\+00 only"):
        verify(file, case.tuned.model, case.gguf)


def test_models_that_llama_cpp_does_not_load(make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case("mamba2")
    (tmp_path / "broken.gguf").write_bytes(case.gguf.read_bytes().replace(b"blk.1.ssm_norm", b"blk.1.ssm_nxrm"))
    with pytest.raises(
        RuntimeError, match=r"llama.cpp cannot load '.*broken.gguf' \(.*'blk.1.ssm_norm.weight' not found"
    ):
        write_slot(case.tuned.model, tmp_path / "broken.gguf", tmp_path / "task.slot", [1])


def test_all_architectures_are_run() -> None:
    assert set(ROWS) == set(NAMES)


def test_a_disk_that_is_full(make_case: MakeCase, tmp_path: Path) -> None:
    """Also where the last bytes alone have no place, which llama.cpp does not notice."""
    case, slot = make_case("mamba2"), tmp_path / "slot"
    write_slot(case.tuned.model, case.gguf, slot, [5])
    before = slot.read_bytes()
    for size in (100, len(before) - 1):
        with full_disk(size), pytest.raises(RuntimeError, match=r"llama\.cpp cannot write '.*slot'"):
            write_slot(case.tuned.model, case.gguf, slot, [5], overwrite=True)
        assert slot.read_bytes() == before
    assert list(tmp_path.iterdir()) == [slot]
