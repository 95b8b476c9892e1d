"""Packages that only importers need."""

from __future__ import annotations

import importlib
from typing import Any

from sharding.errors import UserError


def need(package: str, what: str) -> Any:
    """The package.

    Args:
        what: it is needed for, for the message.

    Raises:
        UserError: it is not installed; names the extra that has it.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        problem = f"needs the package {package!r}, which cannot be imported ({error})"
        raise UserError(what, problem, "Run: pip install 'dist-train[import]'") from None
