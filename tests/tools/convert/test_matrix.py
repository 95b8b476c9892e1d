"""Every cell of docs/conversion.md: what comes out says what the run says that went in."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, WavLMConfig, WavLMModel

from dist_train.projector import Projector, load_projector
from tests.end_to_end.commands import call
from tests.ranks import run_ranks
from tests.tools.convert.fixtures import Convert
from tests.tools.convert.official_sdumc import Holder, Official
from tests.tools.convert.runs import (
    Made,
    MakeRun,
    filled,
    our_logits,
    our_states,
    predictions,
    stock_states,
)
from tests.tools.convert.test_llama import write_llama2c, write_pieces
from tests.tools.convert.test_sdumc import clips, ours, theirs
from tools.convert import deepspeed_universal
from tools.convert.formats import FORMATS, shared

WHOLE = ("huggingface", "wavlm", "fairseq-wavlm", "meta-llama", "llama2c")  # these come of a run tuned in full
CELLS = [
    pytest.param(
        of.name, to.name, marks=pytest.mark.slow if of.name == "deepspeed" else [], id=f"{of.name}-to-{to.name}"
    )
    for of in FORMATS
    for to in FORMATS
    if shared(of, to)
]


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A universal checkpoint is hundreds of small files: forcing each to disk would take most of the time."""
    monkeypatch.setattr(deepspeed_universal, "flush", lambda path: None)


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory, made: MakeRun) -> Callable[[str], Path]:
    """A source of each format, of the run tuned in full or by LoRA."""
    known: dict[str, Path] = {}
    folder = tmp_path_factory.mktemp("sources")

    def find(name: str) -> Path:
        if name not in known:
            run = made("full" if name in WHOLE else "lora")
            known[name] = make(name, run, folder / name)
        return known[name]

    return find


def make(name: str, run: Made, path: Path) -> Path:
    """A source of a format."""
    if name == "portable":
        return run.best
    if name == "deepspeed":
        path.mkdir()
        run_ranks("save", 1, path, module="tests.tools.convert.work_native", run=str(run.path))
        return path / "native"
    llm = {name: x.detach() for name, x in run.model.llm.causal.state_dict().items()}
    if name == "fairseq-wavlm":
        path.mkdir()
        return write_fairseq(path / "WavLM.pt", run)
    if name in ("meta-llama", "llama2c"):
        path.mkdir()
        found = by_meta(llm, heads=4, kv_heads=2)
        if name == "llama2c":
            write_llama2c(path / "model.bin", found, (64, 128, 2, 4, 2, len(llm["lm_head.weight"]), 512))
            write_pieces(path / "tokenizer.bin", [chr(0x4E00 + i) for i in range(len(llm["lm_head.weight"]) - 259)])
            return path / "model.bin"
        torch.save(found, path / "consolidated.00.pt")
        params = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-5}
        (path / "params.json").write_text(json.dumps(params))
        return path
    exact = ["--dtype", "fp32"] if name == "huggingface" else []
    assert call("convert", run.path, path, "--to", name, *exact) == 0
    return path


def by_meta(llm: dict[str, Tensor], heads: int, kv_heads: int) -> dict[str, Tensor]:
    """A Hugging Face Llama under Meta's names, its rotary rows back in pairs."""
    pairs = {
        "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
        "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
        "model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output",
    }  # fmt: skip
    found = {}
    for name, value in llm.items():
        short = name.removesuffix(".weight")
        layer = re.fullmatch(r"model\.(layers\.\d+)\.(.+)", short)
        theirs = f"{layer[1]}.{pairs[layer[2]]}" if layer else pairs[short]
        count = {"attention.wq": heads, "attention.wk": kv_heads}.get(theirs.split(".", 2)[-1])
        if count:
            value = value.view(count, 2, -1, value.shape[1]).transpose(1, 2).reshape(value.shape)  # noqa: PLW2901
        found[f"{theirs}.weight"] = value.contiguous()
    return found


def write_fairseq(path: Path, run: Made) -> Path:
    """The run's WavLM under its authors' names."""
    model: Any = run.model.audio.wavlm
    config: WavLMConfig = model.config
    swaps = [
        (r"masked_spec_embed", "mask_emb"), (r"feature_projection\.projection", "post_extract_proj"),
        (r"feature_projection\.layer_norm", "layer_norm"), (r"(conv_layers\.\d+)\.conv", r"\1.0"),
        (r"(conv_layers\.\d+)\.layer_norm", r"\1.2.1"), (r"pos_conv_embed\.conv", "pos_conv.0"),
        (r"parametrizations\.weight\.original0", "weight_g"), (r"parametrizations\.weight\.original1", "weight_v"),
        (r"(encoder\.layers\.\d+)\.layer_norm", r"\1.self_attn_layer_norm"),
        (r"feed_forward\.intermediate_dense", "fc1"), (r"feed_forward\.output_dense", "fc2"),
        (r"attention\.gru_rel_pos_linear", "self_attn.grep_linear"),
        (r"attention\.gru_rel_pos_const", "self_attn.grep_a"),
        (r"attention\.rel_attn_embed", "self_attn.relative_attention_bias"),
        (r"(layers\.\d+)\.attention\.", r"\1.self_attn."),
    ]  # fmt: skip
    weights = {}
    for name, value in model.state_dict().items():
        theirs = name
        for pattern, new in swaps:
            theirs = re.sub(pattern, new, theirs)
        weights[theirs] = value
    cfg = {
        "extractor_mode": "layer_norm", "layer_norm_first": True, "conv_bias": False, "activation_fn": "gelu",
        "encoder_layers": config.num_hidden_layers, "encoder_embed_dim": config.hidden_size,
        "encoder_ffn_embed_dim": config.intermediate_size, "encoder_attention_heads": config.num_attention_heads,
        "conv_feature_layers": str(list(zip(config.conv_dim, config.conv_kernel, config.conv_stride, strict=True))),
        "conv_pos": config.num_conv_pos_embeddings, "conv_pos_groups": config.num_conv_pos_embedding_groups,
        "num_buckets": config.num_buckets, "max_distance": config.max_bucket_distance,
        "relative_position_embedding": True, "gru_rel_pos": True,
    }  # fmt: skip
    torch.save({"cfg": cfg, "model": weights}, path)
    return path


@pytest.mark.parametrize(("of", "to"), CELLS)
def test_cell(of: str, to: str, source: Callable[[str], Path], made: MakeRun, convert: Convert) -> None:
    run = made("full" if of in WHOLE else "lora")
    options = ["--dtype", "fp32"] if to == "huggingface" else []
    result = convert(source(of), to, "--run", run.path, *options)
    CHECKS[to](result, run)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def check_portable(result: Path, run: Made) -> None:
    close(predictions(filled(run, result), run), predictions(run.model, run))


def check_universal(result: Path, run: Made) -> None:
    back = result.with_name("back")
    assert call("convert", result, back, "--to", "portable") == 0
    check_portable(back, run)


def check_huggingface(result: Path, run: Made) -> None:
    ids = torch.randint(3, 300, (2, 9))
    AutoTokenizer.from_pretrained(result)
    with torch.no_grad():
        close(AutoModelForCausalLM.from_pretrained(result).eval()(ids).logits.flatten(0, 1), our_logits(run.model, ids))


def check_peft(result: Path, run: Made) -> None:
    ids = torch.randint(3, 300, (2, 9))
    base = AutoModelForCausalLM.from_pretrained(str(run.recipe.text.pretrained))
    model: Any = PeftModel.from_pretrained(base, str(result)).eval()
    with torch.no_grad():
        close(model(ids).logits.flatten(0, 1), our_logits(run.model, ids))


def check_peft_wavlm(result: Path, run: Made) -> None:
    waveform = torch.randn(1, 8000)
    base = WavLMModel.from_pretrained(str(run.recipe.audio.pretrained))
    model: Any = PeftModel.from_pretrained(base, str(result))
    close(stock_states(model.merge_and_unload(), waveform), our_states(run.model, waveform))


def check_wavlm(result: Path, run: Made) -> None:
    waveform = torch.randn(1, 8000)
    close(stock_states(WavLMModel.from_pretrained(result), waveform), our_states(run.model, waveform))


def check_sdumc(result: Path, run: Made) -> None:
    widths = (64, 64, run.recipe.widths.vision)
    official = Holder(Official(*widths, skip="text", width=16, bottlenecks=(8, 8))).eval()
    official.load_state_dict(torch.load(result / "fusion.pt", weights_only=True)["state_dict"], strict=True)
    chosen = clips(widths)
    close(theirs(official.model, chosen), ours(run.model.fusion, chosen))


def check_slam(result: Path, run: Made) -> None:
    held = torch.load(result / "model.pt", weights_only=True)
    own = dict(run.model.named_parameters())
    adapters = {name: x for name, x in held.items() if name.startswith("llm.base_model.model.")}
    assert len(adapters) == 2 * 4 * 2
    for name, value in adapters.items():
        assert torch.equal(value, own["llm.causal." + name.removeprefix("llm.base_model.model.")])
    if any(name.startswith("encoder_projector.") for name in held):
        fresh = Projector(64, 64, run.recipe.simulation)
        load_projector(fresh, str(result))
        frames, mask = torch.randn(2, 12, 64), torch.ones(2, 12, dtype=torch.bool)
        assert run.model.projector is not None
        close(fresh(frames, mask).states, run.model.projector(frames, mask).states)


CHECKS: dict[str, Callable[[Path, Made], None]] = {
    "portable": check_portable,
    "deepspeed-universal": check_universal,
    "huggingface": check_huggingface,
    "peft": check_peft,
    "peft-wavlm": check_peft_wavlm,
    "wavlm": check_wavlm,
    "sdumc": check_sdumc,
    "slam": check_slam,
}
