"""How states are stored in a file: float32, bfloat16, or int8 with scales.

In memory states are float32 always. Only files are compact: `S0Config.save_pretrained`, which PEFT calls behind each
file of states that it has written, stores them anew as `S0Config.storage` says. So all that passes states on in memory
(checkpoints of FSDP, copies that trainers make, `get_peft_model_state_dict`) has them exactly. What is read back
depends on the file alone, never on the config beside it.

In int8, `BLOCK` values that lie next to each other share a scale: x is stored as the integer q nearest to x / scale,
and read back as q * scale, which is at most half a scale away. The state `...s0_state.weight` becomes two tensors,
`...s0_state.int8` of its shape and `...s0_state.scale`, float32 [blocks]. A loader that does not know them finds no
state at all, and none that it could take for one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

BLOCK = 32
"""Values to a scale. The parts of a low-rank state differ by orders of magnitude; head sizes are multiples of this."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
"""What `S0Config.storage` may be."""

_STATE = re.compile(r"(.*\.s0\.s0_(?:state|offset)\.)(weight|int8|scale)")
# Of safetensors' names of dtypes, those that are written here.
_SHORT = {"F32": "float32", "BF16": "bfloat16", "I8": "int8"}
# Below, a quotient by the scale could overflow; no normal number is smaller.
_LEAST_SCALE = torch.finfo(torch.float32).tiny
_GREATEST_SCALE = torch.finfo(torch.float32).max / 127


@dataclass(frozen=True)
class Stored:
    """A tensor as it is in a file.

    Args:
        name: its name where it is in float32.
        values: the state in some floating-point dtype, or int8; or what is in a file beside states.
        scales: of int8, float32 [blocks]; None otherwise.
    """

    name: str
    values: Tensor
    scales: Tensor | None = None

    def restore(self) -> Tensor:
        """The state in float32.

        Raises:
            ValueError: for scales that are not positive, finite numbers.
        """
        if self.scales is None:
            return self.values.float()
        good = (self.scales >= _LEAST_SCALE) & (self.scales <= _GREATEST_SCALE)
        if not bool(good.all()):
            raise ValueError(
                f"The state '{self.name}' has {int((~good).sum())} of {self.scales.numel()} scales that are NaN, "
                "infinite or not positive; a training run that diverged or a damaged file. Load another checkpoint."
            )
        blocks = _blocks(self.values.float()).mul_(self.scales.unsqueeze(1))
        return blocks.flatten()[: self.values.numel()].view(self.values.shape)

    @property
    def outline(self) -> Tensor:
        """Shape and dtype of what is restored, without reading it: on the meta device where the state is encoded."""
        return self.values if self.scales is None else torch.empty(self.values.shape, device="meta")

    def clone(self) -> Stored:
        """A copy in memory."""
        return Stored(self.name, self.values.clone(), None if self.scales is None else self.scales.clone())

    def to(self, device: torch.device) -> Stored:
        """The same on a device."""
        return Stored(self.name, self.values.to(device), None if self.scales is None else self.scales.to(device))


def group(tensors: Mapping[str, Tensor]) -> dict[str, Stored]:
    """Put the tensors of each state together.

    Args:
        tensors: those of a file, by their names. Their values are not read.

    Returns:
        Each state, and all that is in the file beside states, by the name that it has in float32.

    Raises:
        ValueError: if integers or their scales are missing, or are not of the shape or dtype they should be; the
            message names the state, the expected and the found.
    """
    found: dict[str, Stored] = {}
    for name, tensor in tensors.items():
        match = _STATE.fullmatch(name)
        if match is None or match[2] == "weight":
            found[name] = Stored(name, tensor)
            continue
        values, scales = tensors.get(f"{match[1]}int8"), tensors.get(f"{match[1]}scale")
        state = f"{match[1]}weight"
        if values is None or scales is None or state in tensors:
            there = ", ".join(part for part in ("weight", "int8", "scale") if f"{match[1]}{part}" in tensors)
            raise _damaged(state, "'int8' and 'scale'", f"of these '{there}'")
        if values.dtype != torch.int8 or scales.dtype != torch.float32:
            raise _damaged(state, "torch.int8 and scales in torch.float32", f"{values.dtype} and {scales.dtype}")
        blocks = -(-values.numel() // BLOCK)
        if list(scales.shape) != [blocks]:
            raise _damaged(state, f"[{blocks}] scales for shape {list(values.shape)}", f"{list(scales.shape)}")
        found[state] = Stored(state, values, scales)
    return found


def decode(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read the tensors of a file: states in float32, however they are stored, all others as they are.

    Raises:
        ValueError: see `group`; also for scales that are not positive, finite numbers.
    """

    def read(stored: Stored) -> Tensor:
        # Integers that are no state in int8 are for those to refuse who know what is expected.
        number = stored.values.is_floating_point() or stored.scales is not None
        return stored.restore() if is_state(stored.name) and number else stored.values

    return {name: read(stored) for name, stored in group(tensors).items()}


def encode(tensors: Mapping[str, Tensor], storage: str) -> dict[str, Tensor]:
    """The tensors of a file whose states are stored in another way; nothing else is changed.

    Args:
        tensors: those of a file, however its states are stored.
        storage: "float32", "bfloat16" (rounded to nearest, ties to even) or "int8".

    Raises:
        ValueError: see `decode`.
    """
    encoded: dict[str, Tensor] = {}
    for name, tensor in decode(tensors).items():
        match = _STATE.fullmatch(name)
        if match is None or not tensor.is_floating_point():
            encoded[name] = tensor
        elif storage == "int8":
            encoded[f"{match[1]}int8"], encoded[f"{match[1]}scale"] = _quantize(tensor)
        else:
            encoded[name] = tensor.to(DTYPES[storage])
    return encoded


def contents(file: Path) -> dict[str, tuple[str, int]]:
    """What a file holds, by its header.

    Returns:
        Of each state and all beside: how it is stored, as `S0Config.storage` calls it where it can, and its number of
        values; by the name that it has in float32.
    """
    with safe_open(file, framework="pt") as tensors:
        slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 - no dict
        found = {}
        for name, piece in slices.items():
            match = _STATE.fullmatch(name)
            if match is None or match[2] != "scale":
                dtype = piece.get_dtype()
                found[f"{match[1]}weight" if match else name] = (_SHORT.get(dtype, dtype), math.prod(piece.get_shape()))
    return found


def is_state(name: str) -> bool:
    """Whether a name in a file, as it is in float32, is that of a state."""
    match = _STATE.fullmatch(name)
    return match is not None and match[2] == "weight"


def store(file: Path, storage: str) -> None:
    """Store the states of a file anew, if they are stored in another way.

    The file is replaced in one step. One that cannot be read is left alone, for loading refuses it: transformers saves
    a config over whatever is in the folder, and the states after it.

    Args:
        file: a safetensors file of an adapter.
        storage: see `encode`.

    Raises:
        ValueError: see `decode`. The file stays as it is.
    """
    try:
        present = contents(file)
    except (SafetensorError, OSError):
        return
    if all(found == storage for name, (found, _) in present.items() if is_state(name)):
        return
    with safe_open(file, framework="pt") as tensors:
        metadata = tensors.metadata()
    encoded = encode(load_file(file), storage)
    with TemporaryDirectory(dir=file.parent, prefix=".saving-") as temporary:
        save_file(encoded, Path(temporary) / file.name, metadata=metadata)
        (Path(temporary) / file.name).replace(file)


def _quantize(state: Tensor) -> tuple[Tensor, Tensor]:
    """A state's integers, of its shape, and the scale of each block.

    The largest value of a block becomes 127 or -127. Its scale keeps 16 of float32's 24 significant bits, so that the
    products with integers are exact, and what was read back is stored again as the same integers and scales.
    """
    blocks = _blocks(state)
    scales = blocks.abs().amax(dim=1) / 127
    scales = (scales.view(torch.int32) & -256).view(torch.float32).clamp_min(_LEAST_SCALE)
    integers = torch.round(blocks.double() / scales.unsqueeze(1)).to(torch.int8)
    return integers.flatten()[: state.numel()].view(state.shape).contiguous(), scales


def _blocks(state: Tensor) -> Tensor:
    """A state's values, [blocks, BLOCK], with zeros at the end."""
    return nn.functional.pad(state.flatten(), (0, -state.numel() % BLOCK)).view(-1, BLOCK)


def _damaged(state: str, expected: str, found: str) -> ValueError:
    return ValueError(
        f"The state '{state}' is stored in int8, but not whole: expected {expected}, found {found}. The file is "
        "damaged or was put together by hand; copy the adapter again."
    )
