"""Tuned states for llama.cpp, as data of a sequence or as files that llama-server restores into a slot.

llama.cpp saves and loads the state of a sequence. A file made here is such a state of a sequence that has no token yet,
or of one that starts from the tuned state and has decoded a prefix. What the file must look like is read from the GGUF
of the model, with the `gguf` library: which of its layers recur, how many heads they have, how their states are laid
out. llama.cpp refuses states of another size, but cannot tell those of another order; `verify` can.

The format has been read in llama.cpp's source and is tested with the versions below. It may change with any other.
"""

from __future__ import annotations

import ctypes
import math
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn

from ..files import check_place, new_file
from .states import Start, read_start

LLAMA_CPP_PYTHON = "0.3.36"
"""The version of llama-cpp-python that the tests pass with; it holds llama.cpp 0c1e57098."""
STATE_VERSION = 3
"""LLAMA_STATE_SEQ_VERSION of these versions: of a file with the state of a sequence."""

_DATA_MAGIC = 0xAF143CD8
_FILE_MAGIC = 0x67677371
_F32 = 0
_ERROR = 4  # a level of llama.cpp's log; one above goes on with the line before
# The position of the last token. A sequence without one is at -1, so that its first token will be at 0.
_BEFORE_FIRST = -1

# By the names in GGUF files: what the models' classes are called in transformers, and their layers' mixers.
_MODELS = {
    "mamba2": ("Mamba2", "mixer"),
    "falcon-h1": ("FalconH1", "mamba"),
    "granitehybrid": ("GraniteMoeHybrid", "mamba"),
    "nemotron_h": ("NemotronH", "mixer"),
    "qwen3next": ("Qwen3Next", "linear_attn"),
    "qwen35": ("Qwen3_5", "linear_attn"),
    "qwen35moe": ("Qwen3_5Moe", "linear_attn"),
}
SUPPORTED = tuple(_MODELS)
"""The architectures, as GGUF files name them."""
_GATED_DELTA_NET = ("qwen3next", "qwen35", "qwen35moe")
_NO_ATTENTION = ("mamba2",)
# transformers counts value heads key head by key head; the converter of these turns that round.
_KEY_HEADS_INNERMOST = ("qwen35", "qwen35moe")


@dataclass(frozen=True)
class CacheSettings:
    """What a slot's cache of keys and values is like; a server refuses slots that were written with others.

    Args:
        flash_attention: as the server's `--flash-attn`; None: auto, its default.
        type_k: as its `--cache-type-k`.
        type_v: as its `--cache-type-v`.
    """

    flash_attention: bool | None = None
    type_k: str = "f16"
    type_v: str = "f16"


@dataclass(frozen=True)
class Layout:
    """How llama.cpp keeps the recurrent states of a model.

    Args:
        file: the GGUF it was read from.
        architecture: its name there.
        layers: number of layers, without those of multi-token prediction.
        recurrent: indices of those that recur.
        shape: the state of one layer in the order of transformers, [heads, ...].
        groups: number of groups that heads share keys in.
        convolution: how many values the convolution of one layer remembers.
        weights: the bias of the time step and the decay of each recurrent layer, which no quantisation touches:
            float32 [heads] each, in the order of the GGUF.
    """

    file: Path
    architecture: str
    layers: int
    recurrent: tuple[int, ...]
    shape: tuple[int, int, int]
    groups: int
    convolution: int
    weights: dict[int, tuple[Tensor, Tensor]]

    @property
    def attention(self) -> bool:
        """Whether there is a cache of keys and values beside the states."""
        return self.architecture not in _NO_ATTENTION

    def order_heads(self, heads: Tensor) -> Tensor:
        """[heads, ...] in the order of llama.cpp."""
        if self.architecture not in _KEY_HEADS_INNERMOST:
            return heads
        return heads.unflatten(0, (self.groups, -1)).transpose(0, 1).flatten(0, 1)

    def arrange(self, state: Tensor) -> Tensor:
        """A layer's state as llama.cpp keeps it.

        Args:
            state: float32, of this layout's shape.

        Returns:
            Contiguous: [heads, head size, state size] for Mamba-2, [heads, value size, key size] for the gated delta
            rule.
        """
        if self.architecture in _GATED_DELTA_NET:
            state = state.transpose(1, 2)
        return self.order_heads(state).contiguous()


def read_layout(gguf: str | Path) -> Layout:
    """Read from a GGUF how llama.cpp will keep the model's states.

    Args:
        gguf: the file; of a split model, the first part.

    Raises:
        ImportError: without the `gguf` library.
        ValueError: if the file is no GGUF, of an architecture that is not supported, or says nothing of its states.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ImportError("Reading a GGUF needs the gguf library: pip install 'peft-s0[llama]'.") from error
    file = Path(gguf)
    if not file.is_file():
        raise ValueError(f"There is no file '{file}'.")
    parts = _parts(file)
    try:
        readers = [GGUFReader(part) for part in parts]
    except (ValueError, IndexError) as error:
        raise ValueError(f"'{file}' is not a whole GGUF ({error}).") from error
    fields = readers[0].fields

    def value(key: str, default: Any = None) -> Any:
        found = fields.get(key)
        if found is None and default is None:
            raise ValueError(f"'{file}' has no {key}, so it does not say how its states are laid out.")
        return default if found is None else found.contents()

    name = value("general.architecture")
    if name not in SUPPORTED:
        raise ValueError(
            f"'{file}' is of the architecture '{name}'. States can be exported for {', '.join(SUPPORTED)}."
        )
    if value("split.count", 0) > len(parts):
        raise ValueError(f"'{file}' is one of {value('split.count')} parts, the others are not beside it.")
    tensors = {tensor.name: tensor for reader in readers for tensor in reader.tensors}
    layers = value(f"{name}.block_count") - value(f"{name}.nextn_predict_layers", 0)
    recurrent = tuple(index for index in range(layers) if f"blk.{index}.ssm_conv1d.weight" in tensors)
    if not recurrent:
        raise ValueError(f"'{file}' has no recurrent layer among its {layers}.")
    heads, inner, size, groups = (
        value(f"{name}.ssm.{key}") for key in ("time_step_rank", "inner_size", "state_size", "group_count")
    )
    head = inner // heads
    return Layout(
        file=file,
        architecture=name,
        layers=layers,
        recurrent=recurrent,
        shape=(heads, size, head) if name in _GATED_DELTA_NET else (heads, head, size),
        groups=groups,
        convolution=(value(f"{name}.ssm.conv_kernel") - 1) * (inner + 2 * groups * size),
        weights={
            index: (
                _vector(tensors, f"blk.{index}.ssm_dt.bias", file),
                _vector(tensors, f"blk.{index}.ssm_a", file),
            )
            for index in recurrent
        },
    )


def state_data(
    adapter: PeftModel | str | Path,
    gguf: str | Path,
    *,
    adapter_name: str | None = None,
    streams: int = 1,
    **options: Any,
) -> bytes:
    """The state of a sequence without a token, as `llama_state_seq_set_data` takes it. See `set_state`.

    Args:
        adapter: a live model with S0 adapters, or folder or Hub id of a saved adapter, for which the base model's
            config is read. A live model's weights are compared with those of the GGUF, too.
        gguf: the model that will start from it; of a split one, the first part.
        adapter_name: which adapter of a live model; None: the active one.
        streams: number of streams of the context's cache: 1 if it serves one sequence or is unified (`kv_unified`),
            else `n_seq_max`.
        options: for a saved adapter, `base_model` (the model, its folder or Hub id; else the one that the adapter
            names), `trust_remote_code`, and `subfolder`, `revision`, `token` and the like, for the Hub.

    Raises:
        ImportError: without the `gguf` library.
        TypeError: if the adapter is none.
        ValueError: if the GGUF is refused (see `read_layout`), the adapter is not that model's or is more than initial
            states; the message names what was expected and found.
    """
    layout = read_layout(gguf)
    return struct.pack("<Ii", _DATA_MAGIC, 0) + _sequence(
        layout, _start(layout, adapter, adapter_name, options), streams
    )


def write_state(
    adapter: PeftModel | str | Path,
    gguf: str | Path,
    file: str | Path,
    *,
    adapter_name: str | None = None,
    streams: int = 1,
    overwrite: bool = False,
    **options: Any,
) -> Path:
    """Write the state of a sequence without a token, as `llama_state_seq_load_file` reads it.

    llama-server restores it, too, but forgets it with the first prompt; `write_slot` makes what lasts.

    Args:
        adapter: see `state_data`.
        gguf: see `state_data`.
        file: what to write, in one step: whenever the process ends, the old file is there or the new one.
        adapter_name: see `state_data`.
        streams: see `state_data`.
        overwrite: replace a file that is there.
        options: see `state_data`.

    Returns:
        The file.

    Raises:
        FileExistsError: if the file exists and may not be replaced.
        ImportError: see `state_data`.
        TypeError: see `state_data`.
        ValueError: see `state_data`.
    """
    check_place(file, overwrite)
    layout = read_layout(gguf)
    data = _sequence(layout, _start(layout, adapter, adapter_name, options), streams)
    with new_file(file, overwrite) as temporary:
        temporary.write_bytes(struct.pack("<3I", _FILE_MAGIC, STATE_VERSION, 0) + data)
    return Path(file)


def write_slot(
    adapter: PeftModel | str | Path,
    gguf: str | Path,
    file: str | Path,
    prefix: Sequence[int] | str | None = None,
    *,
    adapter_name: str | None = None,
    cache: CacheSettings | None = None,
    overwrite: bool = False,
    check_version: bool = True,
    **options: Any,
) -> list[int]:
    """Write a slot of llama-server that started from the adapter and has decoded a prefix.

    After `POST /slots/0?action=restore` the server goes on from there with any prompt that begins with the prefix and
    is longer. It cannot go back before a token of a recurrent model, so restore before each prompt.

    Args:
        adapter: see `state_data`.
        gguf: see `state_data`; it is loaded.
        file: what to write, in one step.
        prefix: tokens, or text in which special tokens are read as such; None: the tokenizer's BOS.
        adapter_name: see `state_data`.
        cache: the server's settings; None: its defaults.
        overwrite: replace a file that is there.
        check_version: whether to refuse versions of llama-cpp-python that are not tested.
        options: see `state_data`.

    Returns:
        The tokens of the prefix.

    Raises:
        FileExistsError: if the file exists and may not be replaced.
        ImportError: without the `gguf` library or llama-cpp-python.
        TypeError: see `state_data`.
        ValueError: see `state_data`; also for an empty prefix, None where there is no BOS, tokens outside of the
            vocabulary, unknown cache types, and versions that are not tested.
        RuntimeError: if llama.cpp fails, with its own message.
    """
    check_place(file, overwrite)
    library = _library(check_version)
    data = state_data(adapter, gguf, adapter_name=adapter_name, **options)
    with _Engine(library, gguf, cache or CacheSettings()) as engine:
        tokens = engine.prefix(prefix)
        engine.make_context(len(tokens))
        set_state(engine.context, data, check_version=check_version)
        engine.decode(tokens, 0)
        with new_file(file, overwrite) as temporary:
            engine.save(temporary, tokens)
    return tokens


def set_state(context: Any, data: bytes, sequence: int = 0, *, check_version: bool = True) -> None:
    """Let a sequence of a llama-cpp-python context start from a tuned state. Its first token is decoded at position 0.

    Args:
        context: what `llama_init_from_model` returned, or `Llama(...).ctx`.
        data: from `state_data`.
        sequence: its number; nothing may have been decoded in it.
        check_version: whether to refuse versions of llama-cpp-python that are not tested.

    Raises:
        ImportError: without llama-cpp-python.
        ValueError: if the sequence has been used, which llama.cpp would not mind and answer wrongly, or the data is not
            for this context: another model, or another number of streams. The sequence is then as it was, or empty.
    """
    library = _library(check_version)
    size = library.llama_state_seq_get_size(context, sequence)
    buffer = (ctypes.c_uint8 * size)()
    library.llama_state_seq_get_data(context, buffer, size, sequence)
    if size >= len(data):
        raise ValueError(
            f"Sequence {sequence} has been used. Setting a state over it would give wrong answers; clear the context "
            "first with llama_memory_clear, which takes all sequences (llama_memory_seq_rm leaves a state that has no "
            "token)."
        )
    # An empty sequence is the data without cells.
    model = library.llama_get_model(context)
    if library.llama_model_is_hybrid(model):
        found, expected = (int.from_bytes(bytes(part[8:12]), "little") for part in (data, buffer))
        if found != expected:
            raise ValueError(
                f"The state is for a cache of {found} streams, that of this context has {expected}. Pass streams="
                f"{expected} to state_data, or make the context with kv_unified."
            )
    source = (ctypes.c_uint8 * len(data)).from_buffer_copy(data)
    with _messages(library) as said:
        read = library.llama_state_seq_set_data(context, source, len(data), sequence)
    if read != len(data):
        raise ValueError(f"llama.cpp refuses the state ({said()}). Make it from the GGUF that the context runs.")


@dataclass(frozen=True)
class Verification:
    """What `verify` measured.

    Args:
        error: how far what the state changes in llama.cpp is from what it changes in transformers, relative to the
            latter, in the norm of all logits.
        effect: the largest difference of a logit that it makes in transformers.
        base: the largest difference of a logit between the two engines without the state.
    """

    error: float
    effect: float
    base: float


@torch.no_grad()
def verify(
    file: str | Path,
    model: PeftModel,
    gguf: str | Path,
    *,
    adapter_name: str | None = None,
    tokens: Sequence[int] | None = None,
    tolerance: float = 0.1,
    cache: CacheSettings | None = None,
    check_version: bool = True,
) -> Verification:
    """Load a file into llama.cpp and compare the logits with those of transformers, with the adapter and without.

    What is compared is the difference that the adapter makes, so that what quantisation does to a model counts little.

    Args:
        file: from `write_state` or `write_slot`.
        model: the model with the adapter, in eval mode.
        gguf: the same model for llama.cpp.
        adapter_name: which adapter; None: the active one.
        tokens: what to decode after the file's prefix; None: eight tokens from all over the vocabulary.
        tolerance: largest `Verification.error` that passes. States in another order have one of about 1; quantised
            weights cause some, see docs/llama-cpp.md.
        cache: as in `write_slot`.
        check_version: as in `write_slot`.

    Raises:
        ImportError: without the `gguf` library or llama-cpp-python.
        ValueError: if the difference is larger, if the adapter changes too little to tell, if llama.cpp refuses the
            file, or the model is not that of the GGUF.
    """
    library = _library(check_version)
    layout = read_layout(gguf)
    start = _start(layout, model, adapter_name, {})
    with _Engine(library, gguf, cache or CacheSettings()) as engine:
        if tokens is None:
            tokens = np.random.default_rng(0).integers(0, engine.vocabulary, 8).tolist()
        prefix = _prefix_of(file)
        everything = [*prefix, *tokens]
        engine.check(everything)
        engine.make_context(len(everything))
        base = engine.decode(everything, 0)[len(prefix) :]
        engine.clear()
        engine.load(Path(file), prefix)
        tuned = engine.decode(list(tokens), len(prefix))
    expected_base, expected = _transformers_logits(model, start, adapter_name, everything, len(prefix))
    columns = min(base.shape[1], expected.shape[1])  # some converters pad the vocabulary
    base, tuned, expected_base, expected = (part[:, :columns] for part in (base, tuned, expected_base, expected))
    effect = float((expected - expected_base).abs().max())
    base_error = float((base - expected_base).abs().max())
    if effect == 0 or effect < base_error / 10:
        raise ValueError(
            f"{start.source} changes logits by {effect:.1e} only, llama.cpp differs from transformers by "
            f"{base_error:.1e} without it: nothing can be told. Pass other tokens, or a GGUF of higher precision."
        )
    error = float(((tuned - base) - (expected - expected_base)).norm() / (expected - expected_base).norm())
    if not error <= tolerance:
        raise ValueError(
            f"'{file}' is wrong for '{gguf}': what it changes in llama.cpp differs from what {start.source} changes in "
            f"transformers by {error:.1e} of the latter, more than the tolerance of {tolerance:g}. Write it again for "
            "this GGUF; if that does not help, this version of llama.cpp keeps states in another way."
        )
    return Verification(error, effect, base_error)


def _parts(file: Path) -> list[Path]:
    """All parts of a split model."""
    split = re.fullmatch(r"(.*-)(\d{5})(-of-\d{5}\.gguf)", file.name)
    if split is None:
        return [file]
    name, _, end = split.groups()
    return sorted(part for part in file.parent.iterdir() if re.fullmatch(f"{re.escape(name)}\\d{{5}}{end}", part.name))


def _vector(tensors: dict[str, Any], name: str, file: Path) -> Tensor:
    if name not in tensors or tensors[name].tensor_type != _F32:
        raise ValueError(f"'{file}' has no float32 tensor {name}, which every converter writes for its architecture.")
    return torch.from_numpy(np.array(tensors[name].data, dtype=np.float32)).flatten()


def _start(layout: Layout, adapter: PeftModel | str | Path, adapter_name: str | None, options: dict[str, Any]) -> Start:
    """An adapter's states, with its model compared with the GGUF's."""
    start = read_start(adapter, adapter_name, **options)
    name, attribute = _MODELS[layout.architecture]
    advice = "Use the GGUF of the base model that the adapter was trained on."
    if start.attributes != {attribute} or not re.match(f"{name}(?!Moe)[A-Z]", start.model_class):
        raise ValueError(
            f"{start.source} is for a {start.model_class} with mixers called {', '.join(sorted(start.attributes))}; "
            f"'{layout.file}' is a {layout.architecture}, that is {name}, with {attribute}. {advice}"
        )
    if tuple(sorted(start.mixers)) != layout.recurrent:
        raise ValueError(
            f"The recurrent layers of {start.source} are {sorted(start.mixers)}, those of '{layout.file}' "
            f"{list(layout.recurrent)}. {advice}"
        )
    for index, state in start.states.items():
        if tuple(state.shape) != layout.shape:
            raise ValueError(
                f"The state of layer {index} of {start.source} has shape {list(state.shape)}, expected "
                f"{list(layout.shape)} for '{layout.file}'. {advice}"
            )
    for index, mixer in start.mixers.items():
        _check_weights(layout, index, mixer)
    return start


def _check_weights(layout: Layout, index: int, mixer: nn.Module) -> None:
    """Compare a mixer with its GGUF: this tells another model of the same size, and another order of heads."""
    bias, decay = mixer.get_parameter("dt_bias").detach(), mixer.get_parameter("A_log").detach()
    if bias.is_meta or decay.is_meta:
        return  # offloaded, or not there at all
    own = {"dt_bias": bias.float().cpu(), "-exp(A_log)": -decay.float().cpu().exp()}
    for (name, weight), found in zip(own.items(), layout.weights[index], strict=True):
        expected = layout.order_heads(weight)
        # The rounding of bfloat16, which either side may have gone through.
        if expected.shape != found.shape or not torch.allclose(expected, found, rtol=2**-6, atol=2**-6):
            raise ValueError(
                f"The model is not that of '{layout.file}': {name} of layer {index} is {_shown(expected)} here and "
                f"{_shown(found)} there. Use the GGUF of the base model that the adapter was trained on."
            )


def _shown(weight: Tensor) -> str:
    return "[" + ", ".join(f"{value:.4g}" for value in weight[:4].tolist()) + (", ...]" if len(weight) > 4 else "]")


def _sequence(layout: Layout, start: Start, streams: int) -> bytes:
    """A sequence without a token whose recurrent layers hold an adapter's states, as llama.cpp writes it."""
    if not isinstance(streams, int) or isinstance(streams, bool) or streams < 1:
        raise ValueError(f"streams must be an integer >= 1, got {streams!r}.")
    parts = []
    if layout.attention:
        parts.append(struct.pack(f"<{streams + 1}I", streams, *[0] * streams))  # no keys and values in any
    # One cell and its position; not transposed.
    parts.append(struct.pack("<IiIII", 1, _BEFORE_FIRST, 0, 0, layout.layers))
    convolution = struct.pack("<iQ", _F32, 4 * layout.convolution) + bytes(4 * layout.convolution)
    parts.extend([convolution] * len(layout.recurrent))
    zero = torch.zeros(layout.shape)
    for index in layout.recurrent:
        state = layout.arrange(start.states.get(index, zero))
        parts.append(struct.pack("<iQ", _F32, 4 * math.prod(layout.shape)))
        parts.append(state.numpy().astype("<f4").tobytes())
    return b"".join(parts)


def _prefix_of(file: str | Path) -> list[int]:
    """The tokens of a file with the state of a sequence."""
    with Path(file).open("rb") as opened:
        header = opened.read(12)
        magic, version, count = struct.unpack("<3I", header) if len(header) == 12 else (0, 0, 0)
        tokens = opened.read(4 * count)
    if magic != _FILE_MAGIC or version != STATE_VERSION or len(tokens) != 4 * count:
        raise ValueError(
            f"'{file}' is no state of a sequence of version {STATE_VERSION} (magic {magic:#x}, version {version})."
        )
    return list(struct.unpack(f"<{count}i", tokens))


def _transformers_logits(
    model: PeftModel, start: Start, adapter_name: str | None, tokens: list[int], skip: int
) -> tuple[Tensor, Tensor]:
    """Logits of the base model and of the adapter, float32 [tokens - skip, vocabulary]."""
    ids = torch.tensor([tokens], device=next(model.parameters()).device)
    names = [adapter_name or model.active_adapters[0]]
    results = [model(ids, adapter_names=given, use_cache=False).logits for given in (["__base__"], names)]
    base, tuned = (result[0, skip:].float().cpu() for result in results)
    return base, tuned


def _library(check_version: bool) -> ModuleType:
    """llama-cpp-python."""
    try:
        import llama_cpp
    except ImportError as error:
        raise ImportError(
            f"This needs llama-cpp-python: pip install llama-cpp-python=={LLAMA_CPP_PYTHON}. state_data and "
            "write_state do without."
        ) from error
    if check_version and llama_cpp.__version__ != LLAMA_CPP_PYTHON:
        raise ValueError(
            f"How llama.cpp keeps states is tested with llama-cpp-python {LLAMA_CPP_PYTHON}, found "
            f"{llama_cpp.__version__}. Install that one, or pass check_version=False and go by what verify() says."
        )
    return llama_cpp


@contextmanager
def _messages(library: ModuleType) -> Iterator[Callable[[], str]]:
    """What llama.cpp says is wrong meanwhile, instead of saying it on standard error: from a function, all in one."""
    said: list[str] = []

    def listen(level: int, text: bytes, data: Any) -> None:
        if level >= _ERROR:
            said.append(text.decode(errors="replace"))

    listener = library.llama_log_callback(listen)
    before, data = library.llama_log_callback(), ctypes.c_void_p()
    library.llama_log_get(ctypes.byref(before), ctypes.byref(data))
    library.llama_log_set(listener, None)
    try:
        yield lambda: " ".join("".join(said).split()) or "no message"
    finally:
        library.llama_log_set(before, data)


class _Engine:
    """A model in llama.cpp with one sequence.

    Args:
        library: llama-cpp-python.
        gguf: the model.
        cache: what its cache of keys and values is like.
    """

    def __init__(self, library: ModuleType, gguf: str | Path, cache: CacheSettings) -> None:
        self.library = library
        self.context: Any = None
        self.parameters = library.llama_context_default_params()
        self.parameters.n_seq_max = 1
        self.parameters.n_threads = self.parameters.n_threads_batch = torch.get_num_threads()
        self.parameters.type_k = _ggml_type(library, "type_k", cache.type_k)
        self.parameters.type_v = _ggml_type(library, "type_v", cache.type_v)
        self.parameters.flash_attn_type = -1 if cache.flash_attention is None else int(cache.flash_attention)
        self.opened = ExitStack()
        self.said = self.opened.enter_context(_messages(library))
        library.llama_backend_init()
        self.model = library.llama_model_load_from_file(str(gguf).encode(), library.llama_model_default_params())
        if not self.model:
            self.opened.close()
            raise RuntimeError(f"llama.cpp cannot load '{gguf}' ({self.said()}).")
        self.vocab = library.llama_model_get_vocab(self.model)
        self.vocabulary: int = library.llama_vocab_n_tokens(self.vocab)

    def __enter__(self) -> _Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.context:
            self.library.llama_free(self.context)
        self.library.llama_model_free(self.model)
        self.opened.close()

    def make_context(self, tokens: int) -> None:
        """Make room for a number of tokens."""
        self.parameters.n_ctx = self.parameters.n_batch = tokens + 1
        self.parameters.n_ubatch = min(tokens + 1, 512)
        self.context = self.library.llama_init_from_model(self.model, self.parameters)
        if not self.context:
            raise RuntimeError(f"llama.cpp cannot make a context ({self.said()}).")

    def prefix(self, prefix: Sequence[int] | str | None) -> list[int]:
        """The tokens of a prefix."""
        if prefix is None:
            if not self.library.llama_vocab_get_add_bos(self.vocab):
                raise ValueError(
                    "The GGUF's tokenizer puts no BOS in front of a prompt. Pass prefix=, what all prompts begin with, "
                    "such as the start of the chat template."
                )
            return [self.library.llama_vocab_bos(self.vocab)]
        tokens = self._tokenize(prefix) if isinstance(prefix, str) else [int(token) for token in prefix]
        if not tokens:
            raise ValueError("The prefix is empty. Pass at least one token, or call write_state.")
        self.check(tokens)
        return tokens

    def check(self, tokens: Sequence[int]) -> None:
        """Refuse tokens that are none."""
        wrong = [token for token in tokens if not 0 <= token < self.vocabulary]
        if wrong:
            raise ValueError(f"Tokens {wrong[:5]} are outside of the GGUF's vocabulary of {self.vocabulary}.")

    def _tokenize(self, text: str) -> list[int]:
        data = text.encode()
        tokens = (self.library.llama_token * (len(data) + 2))()
        count = self.library.llama_tokenize(self.vocab, data, len(data), tokens, len(tokens), True, True)
        if count < 0:
            raise RuntimeError(f"llama.cpp cannot tokenise {text!r}.")
        return list(tokens[:count])

    def decode(self, tokens: list[int], position: int) -> Tensor:
        """Logits of tokens that come at a position: float32 [tokens, vocabulary]."""
        batch = self.library.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for index, token in enumerate(tokens):
                batch.token[index], batch.pos[index] = token, position + index
                batch.n_seq_id[index], batch.seq_id[index][0], batch.logits[index] = 1, 0, 1
            if self.library.llama_decode(self.context, batch) != 0:
                raise RuntimeError(f"llama.cpp cannot decode ({self.said()}).")
        finally:
            self.library.llama_batch_free(batch)
        shape = (len(tokens), self.vocabulary)
        logits = np.ctypeslib.as_array(self.library.llama_get_logits(self.context), shape)
        return torch.from_numpy(logits.copy())

    def clear(self) -> None:
        """Empty the sequence."""
        self.library.llama_memory_clear(self.library.llama_get_memory(self.context), True)

    def save(self, file: Path, tokens: list[int]) -> None:
        """Write the sequence and its tokens to a file."""
        held = (self.library.llama_token * len(tokens))(*tokens)
        written = self.library.llama_state_seq_save_file(self.context, str(file).encode(), 0, held, len(tokens))
        # It does not look whether the system took the last bytes, too.
        if not written or file.stat().st_size != written:
            raise RuntimeError(f"llama.cpp cannot write '{file}' ({self.said()}).")

    def load(self, file: Path, tokens: list[int]) -> None:
        """Read the sequence from a file with these tokens."""
        held, count = (self.library.llama_token * max(1, len(tokens)))(), ctypes.c_size_t()
        if not self.library.llama_state_seq_load_file(
            self.context, str(file).encode(), 0, held, len(tokens), ctypes.byref(count)
        ):
            raise ValueError(
                f"llama.cpp refuses '{file}' ({self.said()}). Write it for this GGUF, with these settings of the cache."
            )


def _ggml_type(library: ModuleType, argument: str, name: str) -> int:
    found = getattr(library, f"GGML_TYPE_{name.upper()}", None)
    if found is None:
        raise ValueError(f"CacheSettings: {argument} must be one of ggml's types, as 'f16' or 'q8_0', got {name!r}.")
    return int(found)
