"""S0 tuning for Hugging Face PEFT: learn the initial state of each recurrent layer, and nothing else.

Importing this package registers the method with PEFT, so that `get_peft_model`, `PeftModel.from_pretrained`,
`AutoPeftModel` and trainers that take a `peft_config` work with S0 adapters.
"""

from typing import TYPE_CHECKING, Any

from ._versions import require_transformers

require_transformers()

from .bank import StateBank  # noqa: E402
from .card import update_model_card  # noqa: E402
from .config import S0Config  # noqa: E402
from .hub import push_to_hub  # noqa: E402
from .layer import S0Layer  # noqa: E402
from .mixers import Family, Gate, Mixer, register_mixer, registered_mixers  # noqa: E402
from .model import S0Model  # noqa: E402
from .registry import register  # noqa: E402

if TYPE_CHECKING:
    from .calibrate import calibrate_alpha
    from .callback import S0Callback

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
    "calibrate_alpha",
    "push_to_hub",
    "register_mixer",
    "registered_mixers",
    "update_model_card",
]


def __getattr__(name: str) -> Any:
    # Only trainings need the callback, and with it transformers' trainer; only a calibration its progress bar.
    if name == "S0Callback":
        from .callback import S0Callback

        return S0Callback
    if name == "calibrate_alpha":
        from .calibrate import calibrate_alpha

        return calibrate_alpha
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
