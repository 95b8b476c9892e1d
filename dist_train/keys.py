"""Recipes as dotted keys, to compare them."""

from __future__ import annotations

from typing import Any


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys."""
    rows: dict[str, Any] = {}
    for key, value in values.items():
        rows.update(flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value})
    return rows


def is_free(key: str, free: tuple[str, ...]) -> bool:
    """Whether `free` names the key, or the section that it lies in."""
    return any(key == name or (name.endswith(".") and key.startswith(name)) for name in free)
