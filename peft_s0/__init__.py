"""S0 tuning for Hugging Face PEFT: learn the initial state of each recurrent layer, and nothing else.

Importing this package registers the method with PEFT, so that `get_peft_model`, `PeftModel.from_pretrained`,
`AutoPeftModel` and trainers that take a `peft_config` work with S0 adapters.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._versions import require_transformers

require_transformers()

from .bank import StateBank  # noqa: E402
from .card import update_model_card  # noqa: E402
from .compress import compress_adapter  # noqa: E402
from .config import S0Config  # noqa: E402
from .hub import push_to_hub  # noqa: E402
from .layer import S0Layer  # noqa: E402
from .mixers import Family, Gate, Mixer, register_mixer, registered_mixers  # noqa: E402
from .model import S0Model, recurrent_layers  # noqa: E402
from .registry import register  # noqa: E402

if TYPE_CHECKING:
    from .calibrate import calibrate_alpha
    from .callback import S0Callback
    from .prompt import state_from_prompt
    from .soups import soup

register()

__version__ = "0.1.0"

__all__ = [
    "Family",
    "Gate",
    "Mixer",
    "S0Callback",
    "S0Config",
    "S0Layer",
    "S0Model",
    "StateBank",
    "analysis",
    "calibrate_alpha",
    "compress_adapter",
    "push_to_hub",
    "recurrent_layers",
    "register_mixer",
    "registered_mixers",
    "soup",
    "state_from_prompt",
    "update_model_card",
]


# What only some need is imported when it is asked for: the callback comes with transformers' trainer.
_LATER = {
    "S0Callback": ".callback",
    "calibrate_alpha": ".calibrate",
    "soup": ".soups",
    "state_from_prompt": ".prompt",
}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(_LATER[name], __name__), name)
    if name == "analysis":
        return import_module(".analysis", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
