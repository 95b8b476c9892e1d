from __future__ import annotations

import os

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # several processes share the cores: before torch counts them
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped, and said to be, where no CUDA device is. Those marked `slurm` come first: they
    wait more than they compute, so that with several processes (`-n`) the others run beside them.
    """
    items.sort(key=lambda item: item.get_closest_marker("slurm") is None)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
