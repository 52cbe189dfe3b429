"""The one version that S0 rests on."""

from __future__ import annotations

import transformers
from packaging.version import Version

# From 5.21 on every mixer asks its cache for its conv and recurrent states. From 5.23 on layers that gradient
# checkpointing runs again keep what hooks have given them, and RecurrentGemma decodes padded rows rightly.
TRANSFORMERS = "5.23.0"


def require_transformers(installed: str = transformers.__version__) -> None:
    """Refuse a transformers on which S0 is not exact.

    Raises:
        ImportError: naming the version needed and the version found.
    """
    if Version(installed) < Version(TRANSFORMERS):
        raise ImportError(
            f"peft_s0 needs transformers >= {TRANSFORMERS}, found {installed}: with older recurrent layers "
            f"a state is not exact, or not possible. Run: pip install 'transformers>={TRANSFORMERS}'"
        )
