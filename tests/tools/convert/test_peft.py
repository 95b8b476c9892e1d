"""Adapter folders: plain peft puts them beside the base and says what our model says; and back into a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, WavLMModel

from tests.tools.convert.fixtures import Convert
from tests.tools.convert.runs import MakeRun, enlarge, filled, our_logits, our_states, predictions, stock_states

ADAPTERS = ["lora", "dora", "vera"]


@pytest.mark.parametrize("tuning", ADAPTERS)
def test_the_language_model(tuning: str, made: MakeRun, convert: Convert, folders: dict[str, Path]) -> None:
    run = made(tuning)
    folder = convert(run.path, "peft")
    told = json.loads((folder / "adapter_config.json").read_text())
    assert told["base_model_name_or_path"] == str(folders["llm"]) and told["task_type"] == "CAUSAL_LM"
    model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folders["llm"]), str(folder)).eval()
    ids = torch.randint(3, 300, (3, 11))
    with torch.no_grad():
        logits = model(ids).logits.flatten(0, 1)
    torch.testing.assert_close(logits, our_logits(run.model, ids), rtol=1e-4, atol=1e-4)

    back = convert(folder, "portable", "--run", run.path, name="back")
    torch.testing.assert_close(predictions(filled(run, back), run), predictions(run.model, run), rtol=0, atol=0)
    merged = convert(folder, "huggingface", "--dtype", "fp32", name="merged")  # needs no run: the folder names its base
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(merged)(ids).logits.flatten(0, 1)
    torch.testing.assert_close(again, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tuning", ADAPTERS)
def test_wavlm(
    tuning: str, made: MakeRun, convert: Convert, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = made(tuning)
    folder = convert(run.path, "peft-wavlm")
    assert "merge_and_unload()" in capsys.readouterr().out
    model: Any = PeftModel.from_pretrained(WavLMModel.from_pretrained(folders["audio"]), str(folder)).eval()
    waveform = torch.randn(2, 8000)
    expected = our_states(run.model, waveform)
    if tuning == "lora":  # what the note says: stock attention does not call its projections
        deaf = stock_states(model, waveform)
        assert (deaf - expected).abs().max() > 0.01
    heard = stock_states(model.merge_and_unload(), waveform)
    torch.testing.assert_close(heard, expected, rtol=1e-4, atol=1e-4)

    back = convert(folder, "portable", "--run", run.path, name="back")
    torch.testing.assert_close(predictions(filled(run, back), run), predictions(run.model, run), rtol=0, atol=0)


def test_adapters_outside_wavlms_attention_are_heard_as_they_are(
    made: MakeRun, convert: Convert, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    targets = {"lora": {"rank": 3, "target_modules": ["intermediate_dense", "output_dense"]}}
    run = made("lora", audio=targets)
    folder = convert(run.path, "peft-wavlm")
    assert "merge_and_unload()" not in capsys.readouterr().out
    model: Any = PeftModel.from_pretrained(WavLMModel.from_pretrained(folders["audio"]), str(folder))
    waveform = torch.randn(2, 8000)
    torch.testing.assert_close(stock_states(model, waveform), our_states(run.model, waveform), rtol=1e-4, atol=1e-4)


def test_layers_that_a_run_cut_off_get_no_adapter(made: MakeRun, convert: Convert, folders: dict[str, Path]) -> None:
    run = made("lora", simulation={"rollout": "none"})
    folder = convert(run.path, "peft-wavlm")
    model: Any = PeftModel.from_pretrained(WavLMModel.from_pretrained(folders["audio"]), str(folder))
    adapted = {name.split(".layers.")[1][0] for name in model.state_dict() if "lora_A" in name}
    assert adapted == {"0", "1"} and len(load_file(folder / "adapter_model.safetensors")) == 2 * 4 * 2


def test_an_adapter_that_peft_trained_becomes_part_of_a_run(
    made: MakeRun, convert: Convert, folders: dict[str, Path], tmp_path: Path
) -> None:
    run = made("lora")
    config = LoraConfig(r=3, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(folders["llm"]), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(str(tmp_path / "trained"))
    back = convert(tmp_path / "trained", "portable", "--run", run.path)
    ids = torch.randint(3, 300, (2, 9))
    with torch.no_grad():
        expected = model.eval()(ids).logits.flatten(0, 1)
    torch.testing.assert_close(our_logits(filled(run, back), ids), expected, rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_said(
    made: MakeRun, folders: dict[str, Path], tmp_path: Path, refused: Callable[..., str], convert: Convert
) -> None:
    run = made("lora")
    trained = {}
    for name, config in {
        "scaled": LoraConfig(r=3, lora_alpha=9, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]),
        "fewer": LoraConfig(r=3, lora_alpha=16, target_modules=["gate_proj"]),
        "bias": LoraConfig(r=3, target_modules=["q_proj"], bias="lora_only"),
    }.items():
        model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(folders["llm"]), config)
        trained[name] = tmp_path / name
        model.save_pretrained(str(tmp_path / name))
    assert "scaled by 3, the run's is scaled by 5.33" in refused(trained["scaled"], "portable", "--run", run.path)
    assert "which the run does not train" in refused(trained["fewer"], "portable", "--run", run.path)
    assert "sets bias" in refused(trained["bias"], "portable", "--run", run.path)
    assert "--run: is needed" in refused(trained["scaled"], "portable")
    assert "trains full" not in refused(run.path, "peft", "--base", folders["audio"])
    assert "holds no adapter" in refused(made("full").path, "peft")

    other = AutoModelForCausalLM.from_pretrained(folders["llm"])
    enlarge(other)
    other.save_pretrained(tmp_path / "other")
    line = refused(run.path, "huggingface", "--base", tmp_path / "other")
    assert "holds other weights than the language model this checkpoint was trained on" in line
    assert "is a wavlm model" in line or "holds a wavlm model" in refused(
        run.path, "huggingface", "--base", folders["audio"]
    )
    whole = convert(run.path, "huggingface", name="whole")
    assert "the run trains lora of it" in refused(whole, "portable", "--run", run.path)
