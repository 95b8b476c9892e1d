"""Merged models: what transformers loads says what our model says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, WavLMModel

from tests.tools.convert.fixtures import Convert
from tests.tools.convert.runs import MakeRun, make_run, our_logits, our_states, stock_states

TUNINGS = ["lora", "dora", "vera", "full"]


def stock_logits(folder: Path, ids: Tensor) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder).float().eval()
    with torch.no_grad():
        return model(ids).logits.flatten(0, 1)


@pytest.mark.parametrize("tuning", TUNINGS)
def test_the_language_model(tuning: str, made: MakeRun, convert: Convert) -> None:
    run = made(tuning)
    ids = torch.randint(3, 300, (3, 11))
    expected = our_logits(run.model, ids)
    exact = convert(run.path, "huggingface", "--dtype", "fp32", name="exact")
    torch.testing.assert_close(stock_logits(exact, ids), expected, rtol=1e-4, atol=1e-4)
    plain = stock_logits(Path(str(run.recipe.text.pretrained)), ids)
    assert (plain - expected).abs().max() > 0.5  # what was trained is heard

    rounded = convert(run.best, "huggingface", name="rounded")
    model: Any = AutoModelForCausalLM.from_pretrained(rounded)
    assert model.dtype == torch.bfloat16
    whole = AutoModelForCausalLM.from_pretrained(exact).state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, whole[name].bfloat16())
    assert AutoTokenizer.from_pretrained(rounded)("a good film").input_ids
    told = json.loads((rounded / "provenance.json").read_text())
    assert told["source"]["format"] == "portable" and len(told["source"]["files"]) == 4
    assert any("fusion" in line for line in told["left_out"])
    assert any("optimizer" in line for line in told["left_out"])


@pytest.mark.parametrize("tuning", TUNINGS)
def test_wavlm(tuning: str, made: MakeRun, convert: Convert) -> None:
    run = made(tuning)
    waveform = torch.randn(2, 8000)
    folder = convert(run.path, "wavlm")
    model = WavLMModel.from_pretrained(folder)
    assert model.dtype == torch.float32 and (folder / "preprocessor_config.json").is_file()
    torch.testing.assert_close(stock_states(model, waveform), our_states(run.model, waveform), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("quantisation", ["int8", "nf4"])
def test_a_quantised_run_merges_into_the_unquantised_base(
    quantisation: str, made: MakeRun, convert: Convert, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = made("lora", text={"quantisation": quantisation}, audio={"tuning": "frozen", "lora": {}})
    folder = convert(run.path, "huggingface", "--dtype", "fp32")
    assert f"trained beside {quantisation} weights" in capsys.readouterr().out
    merged = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    base = AutoModelForCausalLM.from_pretrained(folders["llm"]).state_dict()
    own = dict(run.model.llm.causal.named_parameters())
    for name, plain in base.items():
        expected = plain
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight")):
            module = name.removesuffix(".weight")
            a, b = (own[f"{module}.lora_{x}.default.weight"] for x in "AB")
            expected = plain + 16 / 3 * b @ a
        torch.testing.assert_close(merged[name], expected)


def test_a_model_without_pretrained_files(shards: Path, tmp_path: Path, convert: Convert) -> None:
    run = make_run(tmp_path / "run", shards, audio={"tuning": "lora"}, text={"config": {"tie_word_embeddings": True}})
    ids, waveform = torch.randint(3, 300, (2, 9)), torch.randn(2, 8000)
    llm = convert(run.path, "huggingface", "--dtype", "fp32", name="llm")
    torch.testing.assert_close(stock_logits(llm, ids), our_logits(run.model, ids), rtol=1e-4, atol=1e-4)
    wavlm = convert(run.path, "wavlm", name="wavlm")
    states = stock_states(WavLMModel.from_pretrained(wavlm), waveform)
    torch.testing.assert_close(states, our_states(run.model, waveform), rtol=1e-4, atol=1e-4)


def test_a_run_in_bf16(made: MakeRun, convert: Convert) -> None:
    run = made("vera", precision="bf16", text={"vera": {"rank": 8}})
    ids = torch.randint(3, 300, (2, 9))
    exact = stock_logits(convert(run.path, "huggingface", "--dtype", "fp32"), ids)
    assert (exact - our_logits(run.model, ids).float()).abs().max() < 0.05 * exact.abs().max()


def test_upper_layers_that_a_run_cut_off_come_from_the_base(made: MakeRun, convert: Convert) -> None:
    run = made("lora", simulation={"rollout": "none"})
    waveform = torch.randn(2, 8000)
    model = WavLMModel.from_pretrained(convert(run.path, "wavlm"))
    layer: Any = run.model.audio.layer
    expected = our_states(run.model, waveform)[layer]
    assert model.config.num_hidden_layers == 3 and layer == 2
    torch.testing.assert_close(stock_states(model, waveform)[layer], expected, rtol=1e-4, atol=1e-4)
