"""The configuration of an S0 adapter."""

from __future__ import annotations

import math
import re
import warnings
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Literal

from huggingface_hub import file_exists, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, PeftType
from safetensors import SafetensorError, safe_open

from .alpha import check_alpha, check_pattern
from .card import update_card_of_peft
from .storage import DTYPES, store

VARIANTS = ("initial", "offset", "both")

# Folders that a trainer goes on from, and those of further adapters in them.
_CHECKPOINT = re.compile(r"checkpoint-\d+")

# What LoraConfig has and a state has no use for, and what to use here.
_NOT_HERE = {
    "r": "rank, for states of low rank; the states are full otherwise",
    "lora_alpha": "alpha",
    "init_lora_weights": "init_weights",
    "lora_dropout": "l2_lambda to regularise; a state has no input that could be dropped",
    "bias": "modules_to_save to train further modules; S0 trains no biases",
    "target_parameters": "target_modules; S0 adapts whole recurrent mixers, no single parameters",
    "rank_pattern": "one rank for all layers, or adapters of their own (target_modules or layers_to_transform), active "
    "together: their states add up",
    "ensure_weight_tying": "trainable_token_indices, which keeps tied embeddings tied",
}


@dataclass
class S0Config(PeftConfig):
    r"""
    Configuration of S0 tuning (arXiv 2604.01168): the initial state of each recurrent layer is learnt, the model stays
    frozen.

    A sequence starts from the state `alpha * S`, or `alpha * S / ||S||_F` with `normalize`, where `S` is the learnt
    tensor of a layer, kept in float32 and saved unscaled.

    An adapter that is made of a config has a copy of it, `model.peft_config[adapter_name]`, which counts from then on;
    the config itself may serve for further adapters and models. Alphas of that copy are changed by `set_alpha`, since
    layers look up once what `alpha_pattern` says of them.

    Args:
        target_modules (`list[str]` or `str`, *optional*):
            Names of the recurrent mixers to adapt, as a list of suffixes or one regular expression. `None`: every
            recurrent mixer of the model.
        exclude_modules (`list[str]` or `str`, *optional*):
            Names of mixers to leave alone, in the same form.
        layers_to_transform (`list[int]` or `int`, *optional*):
            Indices of the decoder layers to adapt, beside any form of `target_modules`; those without a recurrent mixer
            are passed over. docs/peft.md says how to name the first third of the recurrent layers.
        layers_pattern (`list[str]` or `str`, *optional*):
            Name of the list of layers that these indices count in, if it is not one of PEFT's usual names.
        modules_to_save (`list[str]`, *optional*):
            Further modules to train and save whole, such as a classification head.
        trainable_token_indices (`list[int]` or `dict[str, list[int]]`, *optional*):
            Token embeddings to train beside the states.
        init_weights (`bool`, `float` or `"prompt"`):
            `True`: zeros, the base model exactly. A number: normal with that standard deviation. `False`: normal with
            standard deviation 1, for tests. `"prompt"`: what the base model's layers end `init_prompt` in, see
            docs/prompts.md.
        init_prompt (`str` or `list`, *optional*):
            The prompt to start from with `init_weights="prompt"`: a text, chat messages, token ids, or a list of such,
            whose mean it is. It runs through the base model when the adapter is made, and is not run again when the
            adapter is loaded.
        tokenizer_name_or_path (`str`, *optional*):
            Tokenizer of `init_prompt`. `None`: the model's own.
        alpha (`float`, *optional*):
            Scale of the state. `None`: the default of the mixers' recurrence family (0.07 gated delta rule, 0.65
            Mamba-2, 1.0 elsewhere), written into the model's copy of the config. How to choose it: docs/alpha.md.
        alpha_pattern (`dict[str, float]`):
            An alpha of their own for some layers. A key is the end of a mixer's name, as `"layers.0.linear_attn"`, or a
            regular expression for it; of several that match, the first counts. All other layers have `alpha`.
        learn_alpha (`bool`):
            Learn one alpha for each layer beside its state, from `alpha` or `alpha_pattern` on, without a penalty. What
            was learnt is saved with the states; the config keeps where it began. docs/alpha.md says when it is of use.
        train_alpha (`float`, *optional*):
            Scale while the model is in training mode. `None`: `alpha`, as in the paper's algorithm; `1.0`: as in its
            authors' code, which trains the bare state and scales afterwards. `normalize` does not apply to it.
        normalize (`bool`):
            Divide each layer's state by its Frobenius norm before scaling.
        l2_lambda (`float`):
            Weight of the penalty `l2_lambda * sum ||S||^2`, over states and offsets, whose gradient is added once per
            optimiser step, before gradients are clipped. It does not show in the loss that a trainer reports;
            `S0Callback` logs it.
        variant (`str`):
            `"initial"`: the state enters once, before the first token. `"offset"`: a tensor of the state's shape is
            added to the state each time it is read, at every step, and never enters the recurrence (state-offset
            tuning, arXiv 2503.03499); for the gated delta rule, o_t = (S_t + D) q_t, and Mamba-2. `"both"`: one of
            each. The offset `D` is scaled as the state is: it is `alpha * dS`, or `alpha * dS / ||dS||_F` with
            `normalize`, where `dS` is what is learnt and saved. `alpha=1.0` is the offset of that paper, which has no
            scale. All that is said of states here goes for offsets.
        rank (`int`, *optional*):
            Learn each head's state as a product of two matrices of this rank. `None`: the full state. The penalty is
            on the product, as it is on a full state.
        storage (`str`):
            How states are saved: `"float32"`, exactly; `"bfloat16"`, rounded to nearest, half the size; `"int8"`, with
            a scale for each 32 values, 28 % of the size. In memory they are float32. See docs/small-states.md.

    Raises:
        ValueError: for a value outside of what is said above; the message names field and value.
        TypeError: for a field that only LoRA has; the message names what to use.
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
    init_weights: bool | float | Literal["prompt"] = field(
        default=True,
        metadata={
            "help": "True: zeros. A number: standard deviation. False: standard normal, for tests. 'prompt': what "
            "init_prompt leaves in the base model."
        },
    )
    init_prompt: str | list[Any] | None = field(
        default=None,
        metadata={"help": "With init_weights='prompt': a text, chat messages, token ids, or a list of such."},
    )
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "Tokenizer of init_prompt. None: the model's own."}
    )
    alpha: float | None = field(
        default=None, metadata={"help": "Scale of the state. None: the default of the mixers' recurrence family."}
    )
    alpha_pattern: dict[str, float] = field(
        default_factory=dict,
        metadata={"help": "Alphas of some layers: ends of mixers' names, or regular expressions, to numbers."},
    )
    learn_alpha: bool = field(
        default=False, metadata={"help": "Learn one alpha for each layer, which starts from alpha or alpha_pattern."}
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
    variant: Literal["initial", "offset", "both"] = field(
        default="initial",
        metadata={"help": "What is learnt: 'initial' (a state to start from), 'offset' (added at each step), 'both'."},
    )
    rank: int | None = field(
        default=None, metadata={"help": "Rank of each head's state as a product of two matrices. None: full."}
    )
    storage: Literal["float32", "bfloat16", "int8"] = field(
        default="float32", metadata={"help": "How states are saved: 'float32', 'bfloat16' or 'int8'."}
    )

    # Whether the config came from a file whose states were not read yet. Not a field, so it is never saved.
    awaits_states: ClassVar[bool] = False
    # Whether it was made for inference with int8 states, as one read from a file is, for training too. Likewise.
    awaits_int8: ClassVar[bool] = False

    def __new__(cls, *args: Any, **kwargs: Any) -> S0Config:
        """Refuse what only LoRA has, saying what to use."""
        for name in kwargs:
            if name in _NOT_HERE:
                raise TypeError(f"S0Config has no {name}. Use {_NOT_HERE[name]}.")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("S0")
        for entry in fields(self):
            # As they are read from a file.
            setattr(self, entry.name, listed(getattr(self, entry.name)))
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        if isinstance(self.modules_to_save, str):
            raise ValueError(f"S0Config: modules_to_save must be a list of names, got {self.modules_to_save!r}.")
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError("S0Config: layers_pattern counts for nothing without layers_to_transform; set both.")
        for name in ("alpha", "train_alpha", "l2_lambda"):
            value = getattr(self, name)
            if value is None and name != "l2_lambda":
                continue
            check_alpha(f"S0Config: {name}", value)
        self.alpha_pattern = {} if self.alpha_pattern is None else self.alpha_pattern
        check_pattern(self.alpha_pattern)
        for name in ("learn_alpha", "normalize"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"S0Config: {name} must be True or False, got {getattr(self, name)!r}.")
        if self.learn_alpha and self.train_alpha is not None:
            raise ValueError(
                f"S0Config: learn_alpha=True learns the scale that is used, and train_alpha={self.train_alpha} would "
                "replace it in training. Leave train_alpha at None."
            )
        if (self.init_weights == "prompt") != (self.init_prompt is not None):
            raise ValueError(
                "S0Config: init_weights='prompt' and init_prompt go together, got "
                f"init_weights={self.init_weights!r} and init_prompt={self.init_prompt!r}; set both or neither."
            )
        if (
            self.init_weights != "prompt"
            and not isinstance(self.init_weights, bool)
            and not (_is_number(self.init_weights) and math.isfinite(self.init_weights) and self.init_weights >= 0)
        ):
            raise ValueError(
                "S0Config: init_weights must be True, False, a standard deviation >= 0 or 'prompt', got "
                f"{self.init_weights!r}."
            )
        if self.variant not in VARIANTS:
            raise ValueError(
                f"S0Config: variant must be one of {', '.join(map(repr, VARIANTS))}, got {self.variant!r}."
            )
        if self.storage not in DTYPES:
            raise ValueError(f"S0Config: storage must be one of {', '.join(map(repr, DTYPES))}, got {self.storage!r}.")
        vars(self)["awaits_int8"] = self.storage == "int8" and self.inference_mode
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
        file = find_states(pretrained_model_name_or_path, subfolder, **options)
        if file is not None:
            check_readable(file)
        if kwargs.get("ephemeral_gpu_offload"):
            warnings.warn("ephemeral_gpu_offload is ignored: S0 computes nothing with offloaded weights.", stacklevel=3)
        vars(config)["awaits_states"] = True
        return config

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """Read the fields of a config from its file.

        Raises:
            ValueError: if it is no JSON object, or one of a method that PEFT does not know; the message names the file.
        """
        try:
            fields: Any = super().from_json_file(path_json_file, **kwargs)
        except (ValueError, TypeError) as error:
            raise ValueError(f"'{path_json_file}' is no JSON object ({error}). Copy the adapter again.") from error
        if not isinstance(fields, dict):
            raise ValueError(f"'{path_json_file}' must hold a JSON object, found a {type(fields).__name__}.")
        method = fields.get("peft_type", "S0")
        if method not in list(PEFT_TYPE_TO_CONFIG_MAPPING):
            raise ValueError(
                f"'{path_json_file}' is of an adapter of the method {method!r}, which this PEFT does not know; "
                "expected 'S0'."
            )
        return fields

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save the config; store the states that are in the folder as it says; add the section on S0 to PEFT's card.

        PEFT calls this when it has written an adapter's states, in float32. In a trainer's `checkpoint-*` folder they
        stay so, for a run that goes on from them to end as one without a break. Files are replaced in one step each:
        whenever the process ends, the old one is there or the new one.

        Args:
            save_directory: folder to save into, made if it is not there.
            kwargs: passed on to PEFT.

        Raises:
            ValueError: if there is a pickle file of states, which no S0 adapter is loaded from, or if states
                stored in int8 are damaged.
        """
        folder = Path(save_directory)
        if (folder / WEIGHTS_NAME).exists():
            raise ValueError(
                f"'{save_directory}' holds an {WEIGHTS_NAME}, as safe_serialization=False writes it. S0 adapters are "
                f"kept in {SAFETENSORS_WEIGHTS_NAME} only. Remove the file and save without safe_serialization=False."
            )
        folder.mkdir(parents=True, exist_ok=True)
        place, states = folder.resolve(), folder / SAFETENSORS_WEIGHTS_NAME
        if states.is_file() and not any(_CHECKPOINT.fullmatch(name) for name in (place.name, place.parent.name)):
            store(states, self.storage)
        with TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
            super().save_pretrained(temporary, **kwargs)
            (Path(temporary) / CONFIG_NAME).replace(folder / CONFIG_NAME)
        update_card_of_peft(folder)


def without_start(config: S0Config, **changes: Any) -> S0Config:
    """A copy of a config for states that come from elsewhere, which says nothing of how they start.

    Args:
        config: an adapter's config.
        changes: other fields that are to differ.
    """
    return replace(config, init_weights=True, init_prompt=None, tokenizer_name_or_path=None, **changes)


def check_holds_prompt(config: S0Config) -> None:
    """Refuse a config with which sequences would not start from the state that was written.

    Raises:
        ValueError: naming the field, its value and what to set.
    """
    reason = None
    if config.variant not in ("initial", "both"):
        reason = f"variant={config.variant!r} has no initial state; use 'initial'"
    elif config.normalize:
        reason = "normalize=True takes its norm away; leave it at False"
    elif config.train_alpha is not None and config.train_alpha != config.alpha:
        reason = (
            f"train_alpha={config.train_alpha!r} would start training from another state than use; leave it at None"
        )
    elif config.alpha == 0:
        reason = "alpha=0 lets nothing of it in; leave it at None, or set 1.0"
    elif 0 in config.alpha_pattern.values():
        reason = f"alpha_pattern={config.alpha_pattern!r} lets nothing of it into a layer; leave 0 out"
    elif config.train_alpha is not None and config.alpha_pattern:
        reason = f"train_alpha={config.train_alpha!r} takes no account of alpha_pattern; leave it at None"
    if reason is not None:
        raise ValueError(f"S0Config: the state of a prompt cannot be kept: {reason}.")


def load_config(model_id: str | Path, **kwargs: Any) -> S0Config:
    """The config of a saved S0 adapter.

    Args:
        model_id: folder or Hub id of the adapter.
        kwargs: `subfolder`, `revision`, `token` and the like, for the Hub.

    Raises:
        ValueError: see `S0Config.from_pretrained`; also if it is the adapter of another method.
    """
    config: PeftConfig = S0Config.from_pretrained(str(model_id), **kwargs)
    if not isinstance(config, S0Config):
        raise ValueError(f"'{model_id}' holds an adapter of the method {config.peft_type!s}, expected S0.")
    return config


def listed(value: Any) -> Any:
    """Tuples, ranges, arrays and tensors as lists, numbers as Python's; also in a dict or a list."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, dict):
        return {key: listed(entry) for key, entry in value.items()}
    return [listed(entry) for entry in value] if isinstance(value, (list, tuple, range)) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def find_states(source: str, subfolder: str | None = None, **options: Any) -> Path | None:
    """The states file that PEFT will load, downloaded if the source is no folder; None if there is none.

    Raises:
        LocalEntryNotFoundError: if the Hub does not answer and the file is not in the cache.
        ValueError: if the states are in a pickle file alone, saying how to convert one that is trusted.
    """
    folder = Path(source, subfolder or "")
    if folder.is_dir():
        if (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
            return folder / SAFETENSORS_WEIGHTS_NAME
        pickled = (folder / WEIGHTS_NAME).is_file()
    else:
        try:
            return Path(hf_hub_download(source, SAFETENSORS_WEIGHTS_NAME, subfolder=subfolder, **options))
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            name = f"{subfolder}/{WEIGHTS_NAME}" if subfolder else WEIGHTS_NAME
            pickled = file_exists(source, name, revision=options.get("revision"), token=options.get("token"))
    if pickled:
        raise ValueError(
            f"'{source}' has its states in {WEIGHTS_NAME}, a pickle file, which can run code when it is read. S0 "
            f"adapters are loaded from {SAFETENSORS_WEIGHTS_NAME} only. A file that you trust is converted by "
            "safetensors.torch.save_file(torch.load("
            f"'{WEIGHTS_NAME}', weights_only=True), '{SAFETENSORS_WEIGHTS_NAME}')."
        )
    return None


def check_readable(file: Path) -> None:
    """Refuse a states file that is truncated or damaged.

    Raises:
        ValueError: naming the file and its size.
    """
    try:
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"'{file}' is not a whole safetensors file ({error}; {file.stat().st_size} bytes on disk): it is truncated "
            "or damaged. Copy the adapter again, or download it again with force_download=True."
        ) from error
