"""The one version that S0 rests on."""

from __future__ import annotations

import transformers
from packaging.version import Version

# From here on every mixer asks its cache for its conv and recurrent states.
TRANSFORMERS = "5.21.0"


def require_transformers(installed: str = transformers.__version__) -> None:
    """Refuse a transformers whose mixers do not ask their cache for the initial state.

    Raises:
        ImportError: naming the version needed and the version found.
    """
    if Version(installed) < Version(TRANSFORMERS):
        raise ImportError(
            f"peft_s0 needs transformers >= {TRANSFORMERS}, found {installed}: older recurrent layers do not take "
            f"their initial state from the cache. Run: pip install 'transformers>={TRANSFORMERS}'"
        )
