from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, Wav2Vec2FeatureExtractor, WavLMConfig, WavLMModel

from dist_train.adapters import LoraSettings
from dist_train.audio import AudioEncoder, AudioSettings
from dist_train.speech_encoders import normalise, shortest_waveform
from sharding.errors import UserError
from tests import tiny

LAYERS = 3


def config(*, stable: bool = True, **changes: Any) -> dict[str, Any]:
    return {**(tiny.recipe(Path("none")).audio.config or {}), "do_stable_layer_norm": stable, **changes}


def settings(*, stable: bool = True, **changes: Any) -> AudioSettings:
    return AudioSettings(**{"config": config(stable=stable), "layer": -2, "tuning": "full", **changes})


def build(*, needs_last: bool = True, **changes: Any) -> AudioEncoder:
    """An encoder whose weights are far from their small initial values, so that every part matters."""
    encoder = AudioEncoder(settings(**changes), minimum_frames=5, needs_last=needs_last).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return encoder


def clips(count: int = 4) -> list[Tensor]:
    return [torch.randn(int(torch.randint(2000, 9000, ()))) * 0.3 + 0.1 for _ in range(count)]


def pad(waveforms: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Padding is loud: only the mask can keep it out."""
    padded = pad_sequence(waveforms, batch_first=True, padding_value=7.0)
    return padded, torch.arange(padded.shape[1]) < torch.tensor([len(x) for x in waveforms])[:, None]


@pytest.mark.parametrize("stable", [True, False])
def test_states_are_those_of_the_stock_model_run_on_each_clip_alone(stable: bool) -> None:
    chosen = clips()
    for layer in (0, 1, -2, -1):
        encoder = build(stable=stable, layer=layer)
        reference = WavLMModel(encoder.model.config).eval()
        reference.load_state_dict(encoder.model.state_dict())
        stream, last, mask, _ = encoder(*pad(chosen))
        for row, clip in enumerate(chosen):
            exact = (clip - clip.mean()) / torch.sqrt(clip.var(correction=0) + 1e-7)
            with torch.no_grad():
                expected = reference(exact[None], output_hidden_states=True)
            assert int(mask[row].sum()) == expected.last_hidden_state.shape[1]
            assert mask[row, : int(mask[row].sum())].all()
            # The state of the top layer is the encoder's output, after its final norm.
            wanted = expected.last_hidden_state if layer == -1 else expected.hidden_states[layer]
            torch.testing.assert_close(stream[row, mask[row]], wanted[0], rtol=0, atol=2e-5)
            torch.testing.assert_close(last[row, mask[row]], expected.last_hidden_state[0], rtol=0, atol=2e-5)


def test_layers_count_from_the_bottom_or_the_top() -> None:
    top = build(layer=-2)
    bottom = build(layer=LAYERS + 1 - 2)
    bottom.load_state_dict(top.state_dict())
    batch = pad(clips())
    assert torch.equal(top(*batch).stream, bottom(*batch).stream)
    for layer in (LAYERS + 1, -LAYERS - 2):
        with pytest.raises(UserError, match=r"audio\.layer.*from -4 to 3"):
            build(layer=layer)


@pytest.mark.parametrize("stable", [True, False])
def test_an_encoder_cut_above_its_layer_gives_the_same_stream_and_has_no_idle_parameters(stable: bool) -> None:
    batch = pad(clips())
    for layer in range(LAYERS + 1):
        whole = build(stable=stable, layer=layer, train_feature_encoder=True)
        cut = build(stable=stable, layer=layer, train_feature_encoder=True, needs_last=False)
        cut.load_state_dict(whole.state_dict(), strict=False)
        assert len(cut.model.encoder.layers) == layer
        states = cut(*batch)
        torch.testing.assert_close(states.stream, whole(*batch).stream, rtol=0, atol=1e-6)
        states.stream.square().sum().backward()
        idle = [name for name, p in cut.named_parameters() if p.requires_grad and p.grad is None]
        assert not idle


def test_normalisation_is_that_of_the_feature_extractor() -> None:
    extractor = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True, padding_value=0.0)
    chosen = clips(5)
    expected = extractor([x.numpy() for x in chosen], sampling_rate=16_000, padding=True, return_tensors="pt")
    padded, mask = pad(chosen)
    assert torch.equal(mask.long(), expected.attention_mask.long())
    torch.testing.assert_close(normalise(padded, mask), expected.input_values, rtol=0, atol=1e-5)
    silence = normalise(torch.zeros(1, 400), torch.ones(1, 400, dtype=torch.bool))
    assert silence.isfinite().all()


def test_the_shortest_waveform_gives_just_so_many_frames() -> None:
    kernels, strides = torch.randint(2, 11, (2, 7)).tolist()
    strides = [min(pair) for pair in zip(kernels, strides, strict=True)]
    made = WavLMConfig(feat_extract_norm="layer", conv_dim=[4] * 7, conv_kernel=kernels, conv_stride=strides)
    with torch.device("meta"):
        front = WavLMModel(made).feature_extractor
        for frames in (1, 5, 12):
            length = shortest_waveform(made, frames=frames)
            assert front(torch.empty(1, length)).shape[2] == frames
            if frames > 1:
                assert front(torch.empty(1, length - 1)).shape[2] == frames - 1
    assert shortest_waveform(WavLMConfig(), frames=5) == 4 * 320 + 400


def test_loading_from_a_folder(tmp_path: Path) -> None:
    saved = WavLMModel(WavLMConfig(**config(layerdrop=0.9, mask_time_prob=0.0)))
    saved.save_pretrained(tmp_path / "wavlm")
    encoder = AudioEncoder(
        AudioSettings(pretrained=str(tmp_path / "wavlm"), layer=1, tuning="frozen"), minimum_frames=1, needs_last=True
    )
    assert encoder.model.config.layerdrop == 0
    loaded = encoder.model.state_dict()
    assert saved.state_dict().keys() == loaded.keys()
    assert all(torch.equal(value, loaded[name]) for name, value in saved.state_dict().items())


def test_what_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    llama = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9)
    LlamaForCausalLM(llama).save_pretrained(tmp_path / "llama")
    WavLMModel(WavLMConfig(**config())).save_pretrained(tmp_path / "damaged")
    weights = tmp_path / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    (tmp_path / "empty").mkdir()
    for folder in ("llama", "damaged", "empty", "absent"):
        with pytest.raises(UserError, match=rf"audio\.pretrained.*{folder}"):
            build(config=None, pretrained=str(tmp_path / folder))


def test_a_frozen_encoder_stays_in_evaluation_mode_and_gets_no_gradient() -> None:
    encoder = build(tuning="frozen", config=config(hidden_dropout=0.5)).train()
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    first, second = (encoder(*batch) for batch in [pad(clips())] * 2)
    assert torch.equal(first.stream, second.stream)
    assert not first.stream.requires_grad and not first.last.requires_grad


def test_layers_are_never_dropped_nor_frames_masked() -> None:
    encoder = build(config=config(layerdrop=1.0, mask_time_prob=0.9, mask_feature_prob=0.9))
    batch = pad(clips())
    assert torch.equal(encoder(*batch).last, encoder.train()(*batch).last)


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_the_convolutions_are_left_out_of_the_graph_unless_asked_for(tuning: str) -> None:
    lora = LoraSettings(target_modules=["output_dense"])
    for asked in (False, True):
        encoder = build(tuning=tuning, lora=lora, train_feature_encoder=asked).train()
        seen: list[Tensor] = []
        encoder.model.feature_extractor.register_forward_hook(
            lambda module, args, output, seen=seen: seen.append(output)
        )
        encoder(*pad(clips())).last.square().sum().backward()
        trained = asked and tuning == "full"
        assert seen[0].requires_grad == trained
        assert all((p.grad is not None) == trained for p in encoder.model.feature_extractor.parameters())
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.model.encoder.parameters())
