"""Numbers in an adapter's configuration."""

from __future__ import annotations

import sys
from typing import TypeGuard


def is_rank(value: object) -> TypeGuard[int]:
    """Whether a configuration value can be a rank."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**31


def is_alpha(value: object) -> TypeGuard[float]:
    """Whether a configuration value can be an alpha."""
    # NaN fails the comparison.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
