from __future__ import annotations

import os
from collections.abc import Iterable

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # several processes share the cores: said before torch counts them
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch


def pytest_collection_modifyitems(items: Iterable[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped, and said to be, where no CUDA device is."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
