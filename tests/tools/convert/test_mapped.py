"""Memory of mapped tensors: given back, and never what was written or belongs to no file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tools.convert.deepspeed_files import load
from tools.convert.mapped import SMALL, Mapped, madvise

MANY = 8 * SMALL  # elements of 4 bytes


def file_pages() -> int:
    """Bytes of this process's memory that are pages of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssFile"))


@pytest.fixture
def held(tmp_path: Path) -> tuple[Tensor, Tensor]:
    """A tensor, and the same mapped."""
    value = torch.randn(MANY)
    torch.save({"a": value}, tmp_path / "file.pt")
    return value, load(tmp_path / "file.pt")["a"]


@pytest.mark.skipif(madvise is None, reason="Linux only")
def test_pages_are_given_back_and_read_again(held: tuple[Tensor, Tensor]) -> None:
    value, tensor = held
    mapped = Mapped()
    sizes = []
    for part in range(8):
        here = mapped.joined([tensor[part * SMALL : (part + 1) * SMALL]], torch.Size([1024, 1024]))
        assert torch.equal(here.flatten(), value[part * SMALL : (part + 1) * SMALL])
        sizes.append(file_pages())
    assert sizes[-1] - sizes[1] < 4 * SMALL  # it has grown by less than one part in six (libraries grow too at first)
    assert torch.equal(tensor, value)


def test_what_was_written_stays(held: tuple[Tensor, Tensor]) -> None:
    value, tensor = held
    mapped = Mapped()
    changed = mapped.joined([tensor], tensor.shape).view(2, -1)
    changed += 1
    mapped.joined([torch.ones(1)], torch.Size([1]))
    assert torch.equal(changed.flatten(), value + 1)


def test_what_is_no_file_stays() -> None:
    mapped = Mapped()
    value = mapped.joined([torch.ones(MANY)], torch.Size([MANY]))
    both = mapped.joined([torch.ones(MANY), torch.ones(MANY)], torch.Size([2 * MANY]))
    mapped.joined([torch.ones(1)], torch.Size([1]))
    assert value.sum() == MANY and both.sum() == 2 * MANY
