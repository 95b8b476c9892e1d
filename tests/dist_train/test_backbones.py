"""Other language models than Llama and other speech encoders than WavLM: their states are those of the stock model run
on each clip alone, and they train.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Wav2Vec2FeatureExtractor,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from dist_train import decoder, packed
from dist_train.audio import AudioEncoder, AudioSettings
from dist_train.build import build_collator, build_model
from dist_train.decoder import check_packs, check_plain
from dist_train.global_loss import pack
from dist_train.llm import Block, load_tokenizer
from dist_train.packed import Tokens
from dist_train.plan import Planner
from dist_train.plan_model import Clip
from dist_train.recipe import validate
from sharding.errors import UserError, UserErrors
from sharding.hardware import PROFILES
from tests import tiny
from tests.dist_train import tiny_llm, work_backbones
from tests.dist_train.backbones import ENCODERS, LANGUAGE_MODELS
from tests.ranks import run_ranks

LENGTHS = (6, 1, 11, 4)


@pytest.fixture(params=LANGUAGE_MODELS)
def causal(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Fields of a tiny language model."""
    return {**LANGUAGE_MODELS[request.param]}


@pytest.fixture(params=ENCODERS)
def encoder(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Fields of a tiny speech encoder."""
    return {**ENCODERS[request.param]}


def eager(model: Any) -> Any:
    """The same weights in transformers' own model, with its own plain attention."""
    found = AutoModelForCausalLM.from_config(copy.deepcopy(model.config), attn_implementation="eager").eval().double()
    found.load_state_dict(model.state_dict())
    return found


def test_a_language_model_reads_and_imagines_as_the_stock_one(
    causal: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Real text, an answer that was decoded, and what is said to it: of each clip alone, in float64."""
    model = tiny_llm.build(tokenizer, {"layer": 1}, config=causal, layers=2, transcribes=True)
    assert model.causal.config.model_type == causal["model_type"]
    stock = eager(model.causal)
    rows = [torch.randint(3, 300, (length,)) for length in LENGTHS]
    ids = pad_sequence(rows, batch_first=True, padding_value=5)
    text = Tokens(ids, torch.arange(ids.shape[1]) < torch.tensor(LENGTHS)[:, None])
    audio = tiny_llm.ragged_audio(3, 12, 5, 1)
    whole = tiny_llm.all_of(audio)
    answers = model.answers(audio, whole, None)
    said = model.transcript(text, whole)
    real, spoken, imagined = model.read(
        [
            Block(None, text),
            model.question(audio, said, whole),
            model.question(audio, answers, whole)._replace(whole_way=False),
        ]
    )
    logs = model.transcription(spoken, said, whole)
    for row, ids_of_row in enumerate(rows):
        states = stock(ids_of_row[None], output_hidden_states=True).hidden_states
        found = real.last(2).states[row, text.mask[row]]
        torch.testing.assert_close(found, states[-1][0] + states[-2][0], rtol=0, atol=1e-4 * scale(states[-1]))

        embed = stock.get_input_embeddings()
        prefix = torch.cat([audio.states[row, audio.mask[row]], embed(model.prompt)])
        answer = answers.ids[row, answers.mask[row]]
        everything = stock(inputs_embeds=torch.cat([prefix, embed(answer)])[None], output_hidden_states=True)
        # The model has said what it finds most likely.
        logits = everything.logits[0, len(prefix) - 1 : -1]
        assert logits.gather(1, answer[:, None]).squeeze(1).allclose(logits.amax(1), rtol=1e-4, atol=1e-4)
        wanted = everything.hidden_states[1][0, len(prefix) - 1 : -1]
        got = imagined.layer(1).states[row, imagined.mask[row, imagined.first :]]
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4 * scale(wanted))

        target = said.ids[row, said.mask[row]]
        logits = stock(inputs_embeds=torch.cat([prefix, embed(target)])[None]).logits[0, len(prefix) - 1 : -1]
        expected = torch.nn.functional.cross_entropy(logits, target, reduction="sum")
        torch.testing.assert_close(logs[row, 0], expected, rtol=1e-4, atol=1e-4)


def scale(states: Tensor) -> float:
    """Largest value; norms with float32 inside leave errors in proportion."""
    return max(1.0, states.abs().max().item())


def test_a_packed_pass_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check itself: it refuses with attention that forgets the window or the cap."""
    gemma = AutoConfig.for_model(**LANGUAGE_MODELS["gemma2"])
    check_packs(gemma, "text.config")
    seen, capped = packed.seen, packed.capped
    for name, wrong in {
        "seen": lambda length, window, device: seen(length, None, device),
        "capped": lambda q, k, v, mask, dropout, scaling, cap: capped(q, k, v, mask, dropout, scaling, 1e9),
    }.items():
        monkeypatch.setattr(packed, name, wrong)
        decoder.failure.cache_clear()
        with pytest.raises(UserError, match=r"text\.config: is a gemma2 model, which cannot run packed: "):
            check_packs(gemma, "text.config")
        monkeypatch.undo()
    decoder.failure.cache_clear()
    check_packs(gemma, "text.config")


@pytest.mark.parametrize(
    ("kind", "changes", "told"),
    [
        ("gpt_oss", {"num_local_experts": 2, "head_dim": 8}, "cannot run packed"),  # attention sinks
        ("bloom", {}, "cannot run packed"),  # ALiBi
        ("bart", {}, "encoder-decoder"),
        ("gemma3", {}, "several modalities"),
        ("wavlm", {}, "not a causal language model"),
        ("qwen3_next", {}, "layers of linear_attention"),
    ],
)
def test_what_cannot_be_right_in_a_packed_pass_is_refused(kind: str, changes: dict[str, Any], told: str) -> None:
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4} if told == "cannot run packed" else {}
    config = AutoConfig.for_model(kind, **small, **changes)
    with pytest.raises(UserError, match=rf"text\.pretrained: is an? .*{told}"):
        check_packs(config, "text.pretrained")
    if told != "cannot run packed":
        with pytest.raises(UserError):
            check_plain(config, "text.pretrained")


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("opt", {"ffn_dim": 24, "word_embed_proj_dim": 16}),  # learned positions
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
    ],
)
def test_rows_longer_than_the_positions_are_refused(
    kind: str, changes: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Otherwise a long row would end in an error of an index, or change what the others are."""
    config = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 12}
    model = tiny_llm.build(tokenizer, {"rollout": "prefix"}, config={"model_type": kind, **config, **changes})
    assert tiny_llm.imagine(model, tiny_llm.ragged_audio(12, 3))[0].mask.sum() == 15
    with pytest.raises(UserError, match=rf"this {kind} has positions for 12 tokens and frames, a clip takes 13"):
        tiny_llm.imagine(model, tiny_llm.ragged_audio(13, 3))


def test_a_tokenizer_without_bos(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """As Qwen's: transcripts begin with EOS, the prompt with nothing."""
    made = PreTrainedTokenizerFast(tokenizer_object=copy.deepcopy(tokenizer.backend_tokenizer), eos_token="</s>")
    made.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.bos_token_id is None and loaded.pad_token_id is None
    model = tiny_llm.build(loaded, config=LANGUAGE_MODELS["qwen2"])
    assert model.prompt.tolist() == loaded("Say:", add_special_tokens=False).input_ids
    assert tiny_llm.build(loaded, {"prompt": ""}).prompt.tolist() == [loaded.eos_token_id]
    audio = tiny_llm.ragged_audio(3, 2)
    states, answers = tiny_llm.imagine(model, audio)
    assert answers is not None and states.mask.sum() == answers.mask.sum()


def clips(count: int = 4) -> list[Tensor]:
    return [torch.randn(int(torch.randint(2500, 9000, ()))) * 0.3 + 0.1 for _ in range(count)]


def padded(waveforms: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Padding is loud: only the mask can keep it out."""
    padded = pad_sequence(waveforms, batch_first=True, padding_value=7.0)
    return padded, torch.arange(padded.shape[1]) < torch.tensor([len(x) for x in waveforms])[:, None]


def build(config: dict[str, Any], *, needs_last: bool = True, **changes: Any) -> AudioEncoder:
    """An encoder whose weights are far from their small initial values."""
    settings = {"layer": 1, "tuning": "full", "max_seconds": 30, **changes}
    made = AudioEncoder(AudioSettings(config=config, **settings), minimum_frames=5, needs_last=needs_last).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return made


def heard_by_stock(config: Any, weights: dict[str, Tensor], clip: Tensor) -> tuple[list[Tensor], Tensor]:
    """Hidden states and the encoder's output of transformers' model and feature extractor for one clip alone."""
    if config.model_type != "whisper":
        extracted = Wav2Vec2FeatureExtractor(do_normalize=True)(clip.numpy(), sampling_rate=16_000, return_tensors="pt")
        model = AutoModel.from_config(config).eval()
        model.load_state_dict(weights)
        output = model(extracted.input_values, output_hidden_states=True)
        return list(output.hidden_states), output.last_hidden_state
    stock = WhisperEncoder(config).eval()
    stock.load_state_dict(weights)
    extractor = WhisperFeatureExtractor(feature_size=config.num_mel_bins)
    frames = -(-len(clip) // 320)
    # In the 30 s that it pads to, what is behind the clip is hidden from attention.
    hidden = torch.zeros(1, 1, 1, config.max_source_positions)
    hidden[..., frames:] = -torch.inf
    for layer in stock.layers:
        layer.register_forward_pre_hook(lambda _, args: (args[0], hidden))
    features = extractor(clip.numpy(), sampling_rate=16_000, return_tensors="pt").input_features
    output = stock(features, output_hidden_states=True)
    return [state[:, :frames] for state in output.hidden_states], output.last_hidden_state[:, :frames]


def test_an_encoder_hears_each_clip_as_the_stock_one_does_alone(encoder: dict[str, Any]) -> None:
    chosen = clips()
    made = build(encoder)
    kind = encoder["model_type"]
    assert made.model.config.model_type == made.kind == kind
    with torch.no_grad():
        stream, last, mask, _ = made(*padded(chosen))
        for row, clip in enumerate(chosen):
            states, output = heard_by_stock(made.model.config, made.model.state_dict(), clip)
            assert int(mask[row].sum()) == output.shape[1] and mask[row, : output.shape[1]].all()
            torch.testing.assert_close(stream[row, mask[row]], states[1][0], rtol=0, atol=5e-5 * scale(states[1]))
            torch.testing.assert_close(last[row, mask[row]], output[0], rtol=0, atol=5e-5 * scale(output))
            alone = made(clip[None], torch.ones(1, len(clip), dtype=torch.bool))
            torch.testing.assert_close(last[row, mask[row]], alone.last[0], rtol=0, atol=5e-5 * scale(output))


def test_a_whisper_of_thirty_seconds_is_the_stock_one() -> None:
    fields = {**ENCODERS["whisper"], "max_source_positions": 1500}
    made = build(fields)
    clip = torch.randn(480_000) * torch.linspace(0, 0.5, 480_000)
    stock = WhisperEncoder(made.model.config).eval()
    stock.load_state_dict(made.model.state_dict())
    extractor = WhisperFeatureExtractor(feature_size=fields["num_mel_bins"])
    with torch.no_grad():
        wanted = stock(extractor(clip.numpy(), sampling_rate=16_000, return_tensors="pt").input_features)
        found = made(clip[None], torch.ones(1, len(clip), dtype=torch.bool))
    assert found.mask.all() and found.mask.shape == (1, 1500)
    torch.testing.assert_close(found.last, wanted.last_hidden_state, rtol=0, atol=1e-4 * scale(found.last))


def test_the_shortest_clip_has_as_many_frames_as_asked(encoder: dict[str, Any]) -> None:
    for frames in (1, 5):
        settings = AudioSettings(config=encoder, layer=1, max_seconds=30)
        made = AudioEncoder(settings, minimum_frames=frames, needs_last=True)
        samples = made.minimum_samples
        states = made(torch.zeros(1, samples), torch.ones(1, samples, dtype=torch.bool))
        assert states.mask.sum() == frames or (frames == 1 and states.mask.sum() == 2)  # Whisper: a window at least
        assert states.last.isfinite().all()


@pytest.mark.parametrize("needs_last", [True, False])
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_all_that_is_trained_learns_and_checkpointing_changes_nothing(
    encoder: dict[str, Any], needs_last: bool, tuning: str
) -> None:
    made, saving = (
        build(
            encoder,
            needs_last=needs_last,
            tuning=tuning,
            train_feature_encoder=True,
            activation_checkpointing=checkpoints,
        ).train()
        for checkpoints in (False, True)
    )
    saving.load_state_dict(made.state_dict())
    batch = padded(clips())
    weight: list[Tensor] = []
    for one in (made, saving):
        states = one(*batch)
        parts = [states.stream, states.last] if needs_last else [states.stream]
        if not weight:
            weight = [torch.randn_like(part) for part in parts]
        heard = states.mask[..., None]
        torch.stack([(p * w * heard).sum() for p, w in zip(parts, weight, strict=True)]).sum().backward()
    again = dict(saving.named_parameters())
    trained = {name: p for name, p in made.named_parameters() if p.requires_grad}
    assert trained
    for name, parameter in trained.items():
        assert parameter.grad is not None, name
        # Softmax does not hang on what is added to all keys.
        assert parameter.grad.abs().sum() > 0 or name.endswith("k_proj.bias"), name
        torch.testing.assert_close(again[name].grad, parameter.grad, rtol=1e-4, atol=1e-4 * scale(parameter.grad))
    if tuning == "lora":
        layers = 3 if needs_last else 1
        assert len(trained) == layers * 4 * 2  # A and B of q, k, v and the output


def test_pretrained_encoders_are_known_by_their_files(encoder: dict[str, Any], tmp_path: Path) -> None:
    config = AutoConfig.for_model(**{**encoder, "layerdrop": 0.5, "encoder_layerdrop": 0.5})
    kind: Any = WhisperModel if encoder["model_type"] == "whisper" else AutoModel.from_config
    stock = kind(config)
    stock.save_pretrained(tmp_path)
    settings = AudioSettings(pretrained=str(tmp_path), layer=1, max_seconds=30)
    made = AudioEncoder(settings, minimum_frames=1, needs_last=True).train()
    assert not any(p.requires_grad for p in made.parameters())
    weights = (stock.get_encoder() if encoder["model_type"] == "whisper" else stock).state_dict()
    assert weights.keys() == made.model.state_dict().keys()
    assert all(torch.equal(value, made.model.state_dict()[name]) for name, value in weights.items())
    batch = padded(clips())
    before = made(*batch).last
    assert torch.equal(made(*batch).last, before)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"do_normalize": False}))
    loud = (batch[0] * 3, batch[1])
    deaf = AudioEncoder(settings, minimum_frames=1, needs_last=True)
    if encoder["model_type"] != "whisper" and encoder["feat_extract_norm"] == "layer" and encoder.get("conv_bias"):
        assert not torch.allclose(deaf(*loud).last, made(*loud).last, atol=1e-3)


def test_what_an_encoder_cannot_do_is_refused(tmp_path: Path) -> None:
    whisper = ENCODERS["whisper"]
    for changes, told in (
        ({"audio": {"config": {**whisper}, "max_seconds": 60}}, r"audio\.max_seconds: is 60, but this Whisper has"),
        ({"audio": {"config": {"model_type": "wav2vec2-conformer"}}}, r"audio\.config\.model_type: cannot be"),
        ({"audio": {"config": {**ENCODERS["hubert"], "hiden_size": 3}}}, r"did you mean|Did you mean"),
        ({"text": {"config": {"model_type": [1]}}}, r"text\.config\.model_type: cannot be '\[1\]'"),
        ({"text": {"config": {"model_type": "qwen"}}}, r"text\.config\.model_type: cannot be 'qwen'"),
        ({"text": {"config": {"model_type": "gemma3"}}}, r"text\.config: is a model of several modalities"),
        (
            {"text": {"config": {"model_type": "qwen2", "kv_heads": 2}}},
            r"text\.config\.kv_heads: is not a field",
        ),
    ):
        values = tiny.recipe(Path("none")).model_dump()
        for section, new in changes.items():
            values[section].update(new)
        with pytest.raises((UserErrors, UserError), match=told):
            validate(values)
    WhisperConfig().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"audio\.pretrained"):  # no weights
        AudioEncoder(AudioSettings(pretrained=str(tmp_path)), minimum_frames=1, needs_last=True)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "sew"}))
    with pytest.raises(UserError, match=r"audio\.pretrained.*is a sew model.*hubert"):
        AudioEncoder(AudioSettings(pretrained=str(tmp_path)), minimum_frames=1, needs_last=True)


@pytest.mark.parametrize(
    ("text", "audio"),
    [("qwen2", "hubert"), ("gemma2", "whisper"), ("gemma3", "wav2vec2 base"), ("mistral", "wavlm base")],
)
def test_what_is_planned_is_what_is_computed(
    text: str, audio: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """FLOPs of a micro-step, decoding among them, and its memory, of tensors without data and of real ones."""
    recipe = work_backbones.recipe(
        text, audio, "lora", simulation={"rollout": "generate"}, widths={"vision": tiny.VISION_WIDTH}
    )
    rng = np.random.default_rng()
    samples = [{"key": str(i), "index": i, "real": True, **tiny.clip(rng)} for i in range(4)]
    model = build_model(recipe, tokenizer).train()
    batch = build_collator(recipe, tokenizer, model)(samples)
    batch.pop("set_aside")  # type: ignore[misc]
    batch["answer"] = torch.full((4, 3), 5)
    batch["answer_mask"] = torch.ones(4, 3, dtype=torch.bool)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        rows = pack(model(batch), batch).rows
        (rows * torch.randn_like(rows)).sum().backward()
    masks: Any = batch
    seen = [[int(masks[f"{name}_mask"][row].sum()) for name in ("audio", "text", "vision")] for row in range(4)]
    clips = [Clip(audio, words, frames, 3) for audio, words, frames in seen]
    planner = Planner(recipe, tokenizer, PROFILES["cpu"], 1, 1)
    assert [(w.elements, w.trained) for w in planner.weights] == [
        (p.numel(), p.requires_grad) for p in model.parameters()
    ]
    trace = planner.trace(clips, 4, zero3=False).trace
    planned = trace.flops(phase="forward") + trace.flops(phase="backward")
    assert planned == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert trace.flops(phase="decode") > 0
    assert planner.trace(clips, 4, zero3=True).trace.peak() > 0
    gpu = Planner(recipe, tokenizer, PROFILES["h100"], 1, 1)
    assert gpu.trace(clips, 4, zero3=True).trace.flops(phase="forward") > 0


# Each kind is in one of them; both parts are adapted, or trained whole.
TRAINED = [
    ("qwen2", "hubert", "lora"),
    ("qwen3", "wav2vec2 base", "full"),
    ("mistral", "whisper", "lora"),
    ("gemma", "hubert base", "full"),
    ("gemma2", "wav2vec2", "lora"),
    ("gemma3", "whisper", "full"),
]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_they_train_alike_in_zero_2_and_3(tuning: str, tmp_path: Path) -> None:
    """Losses that fall, a gradient for every trainable, trainables that move; the answers are decoded."""
    seed = int(np.random.default_rng().integers(2**31))
    pairs = [pair for pair in TRAINED if pair[2] == tuning]
    found = run_ranks("trained", 2, tmp_path, module="tests.dist_train.work_backbones", seed=seed, pairs=pairs)
    for name, stages in found.items():
        for losses in stages["losses"].values():
            assert losses[-1] < losses[0], (name, losses)
        assert stages["still"] == {"2": [], "3": []}, name
        two, three = (stages["losses"][stage] for stage in ("2", "3"))
        assert three == pytest.approx(two, rel=1e-3), name
        assert three[0] == pytest.approx(two[0], rel=1e-5), name
