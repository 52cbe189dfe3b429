"""The configuration of an S0 adapter."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Literal

from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, PeftType
from safetensors import SafetensorError, safe_open

VARIANTS = ("initial",)


@dataclass
class S0Config(PeftConfig):
    r"""
    Configuration of S0 tuning (arXiv 2604.01168): the initial state of each recurrent layer is learnt, the model stays
    frozen.

    A sequence starts from the state `alpha * S`, or `alpha * S / ||S||_F` with `normalize`, where `S` is the learnt
    tensor of a layer, kept in float32 and saved unscaled.

    Args:
        target_modules (`list[str]` or `str`, *optional*):
            Names of the recurrent mixers to adapt, as a list of suffixes or one regular expression. `None`: every
            recurrent mixer of the model.
        exclude_modules (`list[str]` or `str`, *optional*):
            Names of mixers to leave alone, in the same form.
        layers_to_transform (`list[int]` or `int`, *optional*):
            Indices of the decoder layers to adapt.
        layers_pattern (`list[str]` or `str`, *optional*):
            Name of the list of layers that these indices count in, if it is not one of PEFT's usual names.
        modules_to_save (`list[str]`, *optional*):
            Further modules to train and save whole, such as a classification head.
        trainable_token_indices (`list[int]` or `dict[str, list[int]]`, *optional*):
            Token embeddings to train beside the states.
        init_weights (`bool` or `float`):
            `True`: zeros, the base model exactly. A number: normal with that standard deviation. `False`: normal with
            standard deviation 1, for tests.
        alpha (`float`, *optional*):
            Scale of the state. `None`: the default of the mixers' recurrence family (0.07 gated delta rule, 0.65
            Mamba-2, 1.0 elsewhere), written into the config when it meets the model.
        train_alpha (`float`, *optional*):
            Scale while the model is in training mode. `None`: `alpha`, as in the paper's algorithm; `1.0`: as in its
            authors' code, which trains the bare state and scales afterwards. `normalize` does not apply to it.
        normalize (`bool`):
            Divide each layer's state by its Frobenius norm before scaling.
        l2_lambda (`float`):
            Weight of the penalty `l2_lambda * sum ||S||^2`, whose gradient is added once per optimiser step, before
            gradients are clipped. It does not show in the loss that a trainer reports; `S0Callback` logs it.
        variant (`str`):
            `"initial"`: the state enters once, before the first token.
        rank (`int`, *optional*):
            Learn each head's state as a product of two matrices of this rank. `None`: the full state.

    Raises:
        ValueError: for a value outside of what is said above; the message names field and value.
    """

    target_modules: list[str] | set[str] | str | None = field(
        default=None,
        metadata={
            "help": "Recurrent mixers to adapt: list of name suffixes or a regular expression. None: all of them."
        },
    )
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Mixers to leave alone: list of name suffixes or a regular expression."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the decoder layers to adapt. None: all."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the layer list that layers_to_transform counts in."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules to train and save whole, such as a classification head."}
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Token embeddings to train beside the states."}
    )
    init_weights: bool | float = field(
        default=True, metadata={"help": "True: zeros. A number: standard deviation. False: standard normal, for tests."}
    )
    alpha: float | None = field(
        default=None, metadata={"help": "Scale of the state. None: the default of the mixers' recurrence family."}
    )
    train_alpha: float | None = field(
        default=None,
        metadata={"help": "Scale in training mode. None: alpha (the paper); 1.0: as in the authors' code."},
    )
    normalize: bool = field(
        default=False, metadata={"help": "Divide each layer's state by its Frobenius norm before scaling."}
    )
    l2_lambda: float = field(
        default=5e-4, metadata={"help": "Weight of the penalty on the squared norm of the states, per optimiser step."}
    )
    variant: Literal["initial"] = field(
        default="initial", metadata={"help": "How the state is used: 'initial' (once, before the first token)."}
    )
    rank: int | None = field(
        default=None, metadata={"help": "Rank of each head's state as a product of two matrices. None: full."}
    )

    # Whether the config came from a file whose states were not read yet. Not a field, so it is never saved.
    awaits_states: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("S0")
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError("S0Config: layers_pattern counts for nothing without layers_to_transform; set both.")
        for name in ("alpha", "train_alpha", "l2_lambda"):
            value = getattr(self, name)
            if value is None and name != "l2_lambda":
                continue
            if not _is_number(value) or not math.isfinite(value) or value < 0:
                raise ValueError(f"S0Config: {name} must be a finite number >= 0, got {value!r}.")
        if not isinstance(self.init_weights, bool) and not (
            _is_number(self.init_weights) and math.isfinite(self.init_weights) and self.init_weights >= 0
        ):
            raise ValueError(
                f"S0Config: init_weights must be True, False or a standard deviation >= 0, got {self.init_weights!r}."
            )
        if self.variant not in VARIANTS:
            raise ValueError(
                f"S0Config: variant must be one of {', '.join(map(repr, VARIANTS))}, got {self.variant!r}."
            )
        if self.rank is not None and (not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1):
            raise ValueError(f"S0Config: rank must be an integer >= 1, or None for the full state, got {self.rank!r}.")

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write the config into a folder, in one step: whenever the process ends, the old file is there or the new one.

        Args:
            save_directory: the folder, made if it is not there.
            kwargs: passed on to PEFT.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
            super().save_pretrained(temporary, **kwargs)
            (Path(temporary) / CONFIG_NAME).replace(folder / CONFIG_NAME)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> S0Config:
        """Load the config of a saved adapter, from a folder or from the Hub.

        A folder's states file is opened as well, so that a broken one is refused before any model is touched.

        Args:
            pretrained_model_name_or_path: folder or Hub id of the adapter.
            subfolder: folder below it that holds the files.
            kwargs: passed on to PEFT.

        Raises:
            ValueError: if the folder's states file is truncated or no safetensors file, or no config is there.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        _check_readable(Path(pretrained_model_name_or_path) / (subfolder or "") / SAFETENSORS_WEIGHTS_NAME)
        vars(config)["awaits_states"] = True
        return config


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_readable(file: Path) -> None:
    if not file.is_file():
        return
    try:
        with safe_open(file, framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(
            f"'{file}' is not a whole safetensors file ({error}; {file.stat().st_size} bytes on disk): it is truncated "
            "or damaged. Copy or download the adapter again."
        ) from error
