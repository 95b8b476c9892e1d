"""WavLM as its authors published it: the converted folder gives the states of the original forward."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoFeatureExtractor, WavLMModel

from tests.tools.convert.fixtures import Convert
from tests.tools.convert.original_wavlm import OriginalWavLM, configuration
from tests.tools.convert.runs import stock_states
from tools.convert.fairseq_wavlm import conv_layers


@pytest.mark.parametrize("large", [True, False])
def test_the_states_are_the_originals(large: bool, tmp_path: Path, convert: Convert) -> None:
    original = OriginalWavLM(large=large).eval()
    weights = {**original.state_dict(), "final_proj.weight": torch.ones(2)}
    torch.save({"cfg": configuration(large=large), "model": weights}, tmp_path / "WavLM.pt")
    folder = convert(tmp_path / "WavLM.pt", "wavlm")
    model = WavLMModel.from_pretrained(folder)
    waveform = torch.randn(1500)
    expected = original(waveform)
    torch.testing.assert_close(stock_states(model, waveform[None])[:, 0], expected, rtol=1e-4, atol=1e-5)
    assert AutoFeatureExtractor.from_pretrained(folder).do_normalize == large
    assert torch.equal(model.masked_spec_embed, original.mask_emb)


def test_layers_are_read_without_running_them() -> None:
    assert conv_layers("[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2") == (
        [(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512, 2, 2)] * 2
    )
    for harmful in (
        "__import__('os').getcwd()",
        "[open('/etc/passwd')]",
        "[(1,2,3)] * len('ab')",
        "[(1,2,3)] * 10000000000",
    ):
        with pytest.raises(ValueError):
            conv_layers(harmful)


def test_what_is_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    file = tmp_path / "WavLM.pt"
    weights = OriginalWavLM(large=True).state_dict()
    good = configuration(large=True)
    for change, expected in (
        ({"encoder_layers": 4}, "do not agree on encoder.layers.3."),
        ({"conv_feature_layers": "exit()"}, "has a cfg that is not WavLM's"),
        ({"gru_rel_pos": False}, "no gated relative position bias"),
        ({"encoder_ffn_embed_dim": 30}, "its cfg says [30, 16]"),
        ({"activation_fn": "glu"}, "activation_fn glu"),
        ({"encoder_layers": "many"}, "has a cfg that is not WavLM's"),
        ({"encoder_layers": 10**9}, "Write at most 1000"),
        ({"encoder_attention_heads": 3}, "makes no model"),
    ):
        torch.save({"cfg": {**good, **change}, "model": weights}, file)
        assert expected in refused(file, "wavlm")
    torch.save({"cfg": Namespace(**good), "model": weights}, file)  # as fairseq pickles its own settings
    assert "argparse.Namespace would have to be run" in refused(file, "wavlm")
    file.write_bytes(file.read_bytes()[:-100])
    assert "cannot be read" in refused(file, "wavlm")
