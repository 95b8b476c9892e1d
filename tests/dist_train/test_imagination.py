from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from dist_train.imagination import MIA, ImaginationSettings, Skip


@pytest.mark.parametrize("width, bottleneck, parameters", [(256, 128, 328_576), (128, 64, 82_368)])
def test_sizes_of_the_paper(width: int, bottleneck: int, parameters: int) -> None:
    assert sum(p.numel() for p in MIA(width, bottleneck, "text", 1).parameters()) == parameters


@pytest.mark.parametrize("skip", ["text", "transition"])
def test_where_the_skip_starts(skip: Skip) -> None:
    """With a dead residual block the output is the skip itself."""
    modality = int(torch.randint(3, ()))
    mia = MIA(6, 2, skip, modality)
    torch.nn.init.zeros_(mia.decoder.weight)
    torch.nn.init.zeros_(mia.decoder.bias)
    vectors = torch.randn(3, 4, 7, 6)
    expected = vectors[modality] if skip == "text" else mia.transition(torch.cat(tuple(vectors), dim=-1))
    assert torch.equal(mia(*vectors), expected)


def test_every_modality_contributes() -> None:
    mia = MIA(6, 2, "transition", 1)
    inputs = torch.randn(3, 4, 6, requires_grad=True)
    (gradient,) = torch.autograd.grad(mia(*inputs).square().sum(), inputs)
    assert (gradient.abs().amax(dim=(1, 2)) > 0).all()


def test_settings_refuse_unknown_keys_and_skips() -> None:
    with pytest.raises(ValidationError):
        ImaginationSettings.model_validate({"skipp": "text"})
    with pytest.raises(ValidationError):
        ImaginationSettings.model_validate({"skip": "audio"})
