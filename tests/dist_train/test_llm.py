from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, WavLMConfig, WavLMModel

from dist_train.llm import Block, LanguageModel, TextFeatures, load_tokenizer
from dist_train.packed import Tokens
from dist_train.projector import Projector
from dist_train.rollout import SimulationSettings
from sharding.errors import UserError
from tests.dist_train.tiny_llm import LAYERS, WIDTH, all_of, build, imagine, ragged_audio, stock, text_settings


def ragged_text(*lengths: int, bos: int = 1) -> Tokens:
    """BOS and random tokens; padded with a token that must not matter."""
    rows = [torch.tensor([bos, *torch.randint(3, 300, (length - 1,)).tolist()]) for length in lengths]
    ids = pad_sequence(rows, batch_first=True, padding_value=5)
    return Tokens(ids, torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None])


@pytest.mark.parametrize("layers", [1, LAYERS, LAYERS + 1])
def test_real_text_is_the_sum_of_the_last_states_of_the_stock_model(
    layers: int, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = build(tokenizer, layers=layers)
    text = ragged_text(1, 7, 4)
    found = model.read([Block(None, text)])[0].last(layers)
    assert torch.equal(found.mask, text.mask)
    for row, mask in enumerate(text.mask):
        states = stock(model)(text.ids[row : row + 1, mask], output_hidden_states=True).hidden_states
        expected = sum(states[len(states) - layers :][i][0] for i in range(layers))
        torch.testing.assert_close(found.states[row, mask], expected, rtol=0, atol=1e-5)


def test_projector_stacks_five_frames_and_drops_the_rest() -> None:
    settings = SimulationSettings(projector_width=11)
    projector = Projector(3, 4, settings)
    frames, lengths = torch.randn(4, 23, 3), torch.tensor([23, 20, 9, 4])
    found = projector(frames, torch.arange(23) < lengths[:, None])
    assert found.states.shape == (4, 4, 4)
    assert found.mask.sum(1).tolist() == [4, 4, 1, 0]
    for row in range(4):
        for position in range(4):
            stacked = torch.cat([frames[row, 5 * position + i] for i in range(5)])
            hidden = torch.relu(projector.linear1.weight @ stacked + projector.linear1.bias)
            expected = projector.linear2.weight @ hidden + projector.linear2.bias
            torch.testing.assert_close(found.states[row, position], expected)


def test_the_projector_of_the_paper_has_its_size() -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in Projector(1024, 4096, SimulationSettings()).parameters()) == 18_880_512


@pytest.mark.parametrize("layer", [1, -1])
def test_prefix_states_are_those_at_the_audio_positions_before_the_prompt(
    layer: int, tokenizer: PreTrainedTokenizerBase
) -> None:
    model, audio = build(tokenizer, {"layer": layer, "rollout": "prefix"}), ragged_audio(6, 2, 4)
    found, _ = imagine(model, audio)
    prompt = torch.tensor([tokenizer.bos_token_id, *tokenizer("Say:", add_special_tokens=False).input_ids])
    for row in range(3):
        clip = audio.states[row, audio.mask[row]]
        inputs = torch.cat([clip, model.causal.get_input_embeddings()(prompt)])
        states = stock(model)(inputs_embeds=inputs[None], output_hidden_states=True).hidden_states[layer]
        torch.testing.assert_close(found.states[row, audio.mask[row]], states[0, : len(clip)], rtol=0, atol=1e-5)


def test_imagined_text_trains_the_projector_and_the_model(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    projector = Projector(3, WIDTH, SimulationSettings(projector_width=8)).double()
    frames, mask = torch.randn(3, 30, 3, dtype=torch.float64), torch.arange(30) < torch.tensor([[30], [12], [5]])
    for rollout in ("generate", "cached", "prefix"):
        model: Any = build(tokenizer, {"rollout": rollout}).train()
        projector.zero_grad()
        imagine(model, projector(frames, mask))[0].states.square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in projector.parameters())
        assert model.causal.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0
        assert all(module.training for module in model.modules())


def build_without_noise(tokenizer: PreTrainedTokenizerBase, **text: Any) -> LanguageModel:
    simulation = SimulationSettings(layer=-2, prompt="Say:", max_new_tokens=6)
    return LanguageModel(text_settings(**text), simulation, tokenizer).eval().double()


def test_a_frozen_model_stays_in_evaluation_mode(tokenizer: PreTrainedTokenizerBase) -> None:
    config = {**(text_settings().config or {}), "attention_dropout": 0.5}
    frozen = build_without_noise(tokenizer, config=config, tuning="frozen").train()
    assert not any(module.training for module in frozen.modules())
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    imagine(frozen, ragged_audio(2, 3))
    assert not any(module.training for module in frozen.modules())


@pytest.mark.parametrize(
    ("rollout", "layer"), [("prefix", 2), ("prefix", -1), ("generate", 1), ("cached", -2), ("none", -4)]
)
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_nothing_trainable_is_out_of_reach_when_the_real_text_is_features(
    rollout: str, layer: int, tuning: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    lora = {"target_modules": ["q_proj", "down_proj"]}
    for tied in (False, True):
        config = {**(text_settings().config or {}), "tie_word_embeddings": tied}
        model = build(
            tokenizer, {"rollout": rollout, "layer": layer}, input="features", tuning=tuning, lora=lora, config=config
        )
        if rollout != "none":
            imagine(model, ragged_audio(3, 2))[0].states.square().sum().backward()
        idle = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert not idle
        assert any(p.requires_grad for p in model.parameters()) == (rollout != "none")


def test_all_blocks_in_one_pass_are_what_each_is_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    model, audio, text = build(tokenizer), ragged_audio(6, 2, 4), ragged_text(3, 1, 8)
    calls: list[int] = []
    model.causal.get_decoder().register_forward_hook(lambda *_: calls.append(1))
    model.causal.get_input_embeddings().register_forward_hook(lambda *_: calls.append(2))
    answers = model.answers(audio, all_of(audio), None)
    blocks = [
        Block(None, text),
        model.question(audio, text, all_of(audio)),
        model.question(audio, answers, all_of(audio))._replace(whole_way=False),
    ]
    calls.clear()
    together = model.read(blocks)
    assert sorted(calls) == [1, 2]
    for block, found in zip(blocks, together, strict=True):
        (alone,) = model.read([block])
        assert len(found.states) == (LAYERS + 1 if block.whole_way else model.imagined_layer + 1)
        for layer in range(len(found.states)):
            for part, expected in zip(found.layer(layer), alone.layer(layer), strict=True):
                torch.testing.assert_close(part, expected, rtol=0, atol=1e-10)


def test_clips_that_are_not_whole_cost_two_positions_and_stay_in_the_graph(tokenizer: PreTrainedTokenizerBase) -> None:
    model, audio = build(tokenizer), ragged_audio(6, 2)
    states = audio.states.requires_grad_()
    nothing = torch.zeros(2, dtype=torch.bool)
    answers = model.answers(audio, nothing, None)
    (found,) = model.read([model.question(audio, answers, nothing)])
    assert len(found.states[0]) == 4
    read = found.layer(-2)
    assert read.mask.tolist() == [[True], [True]]
    (read.states * 0).sum().backward()
    assert states.grad is not None and model.causal.get_input_embeddings().weight.grad is not None


@pytest.mark.parametrize("tuning", ["full", "frozen"])
def test_activation_checkpointing_changes_no_gradient(tuning: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """A frozen model, too, keeps activations for the projector's sake."""
    plain = build(tokenizer, tuning=tuning).train()
    saving = build(tokenizer, tuning=tuning, activation_checkpointing=True).train()
    saving.causal.load_state_dict(plain.causal.state_dict())
    audio, text = ragged_audio(6, 2, 4), ragged_text(2, 5, 3)
    passes, gradients = [], []
    for model in (plain, saving):
        model.causal.model.layers[1].self_attn.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
        states = audio.states.detach().clone().requires_grad_()
        heard = audio._replace(states=states)
        (found,) = model.read([model.question(heard, text, all_of(heard))])
        passes.clear()
        found.layer(-1).states.square().sum().backward()
        assert len(passes) == (model is saving)
        gradients.append([states.grad, *(p.grad for p in model.parameters() if p.requires_grad and p.grad is not None)])
    assert len(gradients[0]) == len(gradients[1])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_transcription_is_the_cross_entropy_of_the_stock_model(tokenizer: PreTrainedTokenizerBase) -> None:
    """[audio ; prompt ; transcript], transcript and EOS to be said; a clip that lacks one of them counts nothing."""
    model, audio, text = build(tokenizer, transcribes=True), ragged_audio(6, 2, 4, 1), ragged_text(3, 1, 8, 5)
    whole = torch.tensor([True, True, True, False])
    said = model.transcript(text, whole)
    (spoken,) = model.read([model.question(audio, said, whole)])
    found = model.transcription(spoken, said, whole)
    causal = stock(model)
    for row in range(3):
        target = torch.tensor([*text.ids[row, text.mask[row]].tolist()[1:], tokenizer.eos_token_id])
        embed = causal.get_input_embeddings()
        prefix = torch.cat([audio.states[row, audio.mask[row]], embed(model.prompt), embed(target)])
        logits = causal(inputs_embeds=prefix[None]).logits[0, -len(target) - 1 : -1]
        expected = torch.stack([cross_entropy(logits, target, reduction="sum"), torch.tensor(len(target))])
        torch.testing.assert_close(found[row], expected, rtol=1e-6, atol=1e-5)
    assert found[3].tolist() == [0, 0]


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_the_output_layer_is_trained_by_asr_alone(tuning: str, tokenizer: PreTrainedTokenizerBase) -> None:
    for transcribes in (False, True):
        model = build(tokenizer, {"rollout": "prefix"}, transcribes=transcribes, tuning=tuning)
        names = {name for name, p in model.named_parameters() if p.requires_grad}
        assert ("causal.lm_head.weight" in names) == (transcribes and tuning == "full")


def test_logits_are_computed_where_the_transcript_is_said_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    model, audio, text = build(tokenizer, transcribes=True), ragged_audio(6, 2, 4), ragged_text(3, 1, 8)
    seen: list[int] = []
    model.causal.lm_head.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    said = model.transcript(text, all_of(audio))
    (spoken,) = model.read([model.question(audio, said, all_of(audio))])
    model.transcription(spoken, said, all_of(audio))
    assert seen == [3 + 1 + 8]


def test_text_features_enter_through_a_linear_layer() -> None:
    layer, features = TextFeatures(5, WIDTH), torch.randn(2, 3, 5)
    mask = torch.ones(2, 3, dtype=torch.bool)
    found = layer(features, mask)
    torch.testing.assert_close(found.states, features @ layer.linear.weight.T + layer.linear.bias)
    assert found.mask is mask


def test_layers_outside_the_model_are_refused_where_they_are_used(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match=r"text\.layers.*at most 4"):
        build(tokenizer, layers=LAYERS + 2)
    for layer in (LAYERS + 1, -LAYERS - 2):
        with pytest.raises(UserError, match=r"simulation\.layer.*from -4 to 3"):
            build(tokenizer, {"layer": layer})
    build(tokenizer, {"rollout": "none", "layer": 30})
    build(tokenizer, layers=30, input="features")


def test_a_tokenizer_larger_than_the_model_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match=r"text\.tokenizer: has 3\d\d tokens, the language model knows 100"):
        build(tokenizer, config={**(text_settings().config or {}), "vocab_size": 100})


def test_what_cannot_be_loaded_is_named(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    small: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
    }
    WavLMModel(WavLMConfig(**small, conv_dim=[4] * 7, num_conv_pos_embedding_groups=2)).save_pretrained(
        tmp_path / "wavlm"
    )
    LlamaForCausalLM(LlamaConfig(**small, vocab_size=400)).save_pretrained(tmp_path / "cut")
    LlamaConfig(**{**small, "num_hidden_layers": 2}, vocab_size=400).save_pretrained(tmp_path / "cut")
    for folder in ("wavlm", "cut", "absent"):
        with pytest.raises(UserError, match=rf"text\.pretrained.*{folder}"):
            build(tokenizer, config=None, pretrained=str(tmp_path / folder))
    (tmp_path / "text.model").write_text("no model")
    for name in ("text.model", "absent", "wavlm"):
        with pytest.raises(UserError, match=rf"text\.tokenizer.*{name}"):
            load_tokenizer(str(tmp_path / name))
