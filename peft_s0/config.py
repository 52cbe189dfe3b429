"""The configuration of an S0 adapter."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, ClassVar, Literal

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, PeftType
from safetensors import SafetensorError, safe_open

from .card import update_card_of_peft

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
            Weight of the penalty `l2_lambda * sum ||S||^2`, whose gradient is added once per optimiser step. It does
            not show in the loss that a trainer reports.
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

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> S0Config:
        """Load the config of a saved adapter, from a folder or from the Hub.

        The states file is opened as well, downloaded if it is on the Hub, so that a broken one is refused before any
        model is touched.

        Args:
            pretrained_model_name_or_path: folder or Hub id of the adapter.
            subfolder: folder below it that holds the files.
            kwargs: passed on to PEFT.

        Raises:
            ValueError: if the states file is truncated or damaged, or no config is there.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        options, _, _ = cls._split_kwargs(kwargs)
        file = _find_states(pretrained_model_name_or_path, subfolder, options)
        if file is not None:
            _check_readable(file)
        vars(config)["awaits_states"] = True
        return config

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save the config; if PEFT has written a model card for the adapter, add the section on S0 to it.

        Args:
            save_directory: folder to save into.
            kwargs: passed on to PEFT.
        """
        super().save_pretrained(save_directory, **kwargs)
        update_card_of_peft(Path(save_directory))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _find_states(source: str, subfolder: str | None, options: dict[str, Any]) -> Path | None:
    """The states file that PEFT will load, downloaded if the source is no folder; None if there is none.

    Raises:
        LocalEntryNotFoundError: if the Hub does not answer and the file is not in the cache.
    """
    folder, names = Path(source, subfolder or ""), (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)
    if folder.is_dir():
        return next((folder / name for name in names if (folder / name).is_file()), None)
    for name in names:
        try:
            return Path(hf_hub_download(source, name, subfolder=subfolder, **options))
        except LocalEntryNotFoundError:
            if name == names[-1]:
                raise
        except EntryNotFoundError:
            pass
    return None


def _check_readable(file: Path) -> None:
    try:
        if file.name == SAFETENSORS_WEIGHTS_NAME:
            with safe_open(file, framework="pt"):
                pass
        else:
            torch.load(file, map_location="meta", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, OSError, UnpicklingError) as error:
        kind = "safetensors" if file.name == SAFETENSORS_WEIGHTS_NAME else "PyTorch"
        raise ValueError(
            f"'{file}' is not a whole {kind} file ({error}; {file.stat().st_size} bytes on disk): it is truncated or "
            "damaged. Copy the adapter again, or download it again with force_download=True."
        ) from error
