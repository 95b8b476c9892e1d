from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, WavLMConfig, WavLMModel

from dist_train.batch import Batch, Collator
from dist_train.build import build_collator, build_model
from dist_train.fusion import FlowOutput
from dist_train.global_loss import global_loss, pack
from dist_train.losses import rank_n_contrast
from dist_train.model import DoubleFlow
from dist_train.packed import TextStates
from dist_train.recipe import Recipe
from dist_train.rollout import remember
from tests import tiny
from tests.ranks import run_ranks

FEATURES = {"audio": 7, "text": 6, "simulated": 6, "vision": tiny.VISION_WIDTH}
EVERYTHING = {"audio": True, "text": True, "vision": True}
RAGGED = [EVERYTHING, {**EVERYTHING, "text": False}, {**EVERYTHING, "audio": False}, {**EVERYTHING, "vision": False}]
NOTHING = dict.fromkeys(EVERYTHING, False)


def recipe(**changes: Any) -> Recipe:
    return tiny.recipe(Path("none"), widths=FEATURES, **changes)


def build(made: Recipe, tokenizer: PreTrainedTokenizerBase) -> tuple[DoubleFlow, Collator]:
    """A model whose weights are far from their small initial values, and its collator."""
    model = build_model(made, tokenizer).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(2) if "fusion" in name else parameter.normal_(std=0.3)
    return model, build_collator(made, tokenizer, model)


def clips(made: Recipe, has: list[dict[str, bool]], seed: int | None = None) -> list[dict[str, Any]]:
    """Samples that have the named modalities, as the recipe wants them."""
    rng = np.random.default_rng(seed)
    found = []
    for index, kinds in enumerate(has):
        sample = {"key": f"k{index}", "index": index, "real": True, **tiny.clip(rng, **kinds)}
        for kind, field in (("audio", "audio"), ("text", "text_features")):
            if getattr(made, kind).input == "features" and kinds[kind]:
                sample[field] = rng.normal(size=(rng.integers(1, 30), FEATURES[kind])).astype(np.float32)
        if kinds["audio"]:
            sample["simulated"] = rng.normal(size=(rng.integers(1, 30), FEATURES["simulated"])).astype(np.float32)
        found.append(sample)
    return found


def assert_alike(left: FlowOutput, right: FlowOutput) -> None:
    """Of models in float64, whose RMS norms round to fp32 all the same."""
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("rollout", "kind"),
    [("prefix", "waveform"), ("generate", "waveform"), ("generate", "features"), ("features", "features")],
)
def test_a_prediction_does_not_depend_on_batch_neighbours(
    rollout: str, kind: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    text = {"input": "features", "config": None} if rollout == "features" else {}
    made = recipe(simulation={"rollout": rollout}, audio={"input": kind}, text=text)
    model, collate = build(made, tokenizer)
    model.double()  # so that nothing but a real dependence is above the tolerance
    chosen = clips(made, [*RAGGED, NOTHING, EVERYTHING])
    with torch.no_grad():
        together = model(collate(chosen))
        for row, sample in enumerate(chosen):
            alone = model(collate([sample]))
            for flow in ("complete", "missing"):
                whole = FlowOutput(*(part[row : row + 1] for part in getattr(together, flow)))
                assert_alike(whole, getattr(alone, flow))
    assert together.complete.prediction.std() > 0.01 and together.missing.prediction.std() > 0.01


@pytest.mark.parametrize("asr", [0.0, 0.3])
@pytest.mark.parametrize("rollout", ["prefix", "generate", "none"])
def test_the_transcript_cannot_reach_the_missing_flow(
    rollout: str, asr: float, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Nor its gradient, though both flows and ASR share one pass of the language model. Other lengths change how the
    pass is cut, and so its rounding; but for Llama's RMS norm everything is in float64.
    """
    if rollout == "none" and asr:
        return  # refused: there is no projector
    made = recipe(simulation={"rollout": rollout}, loss={"asr": asr})
    model, collate = build(made, tokenizer)
    model.train().double()
    samples = clips(made, RAGGED)
    outputs, gradients = [], []
    for text in ("the plot was really awful", None, "good", "a lovely film " * 9):
        flows = model(collate([{**sample, "text": text} for sample in samples]))
        outputs.append(flows)
        model.zero_grad()
        missing = flows.missing
        (missing.prediction.square().mean() + rank_n_contrast(missing.rnc, torch.arange(4.0), 2.0)).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    for flows, gradient in zip(outputs[1:], gradients[1:], strict=True):
        for found, expected in zip(flows.missing, outputs[0].missing, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert gradient.keys() == gradients[0].keys()
        for name, value in gradient.items():
            torch.testing.assert_close(value, gradients[0][name], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(flows.complete.prediction, outputs[0].complete.prediction)
        if asr:
            assert not torch.allclose(flows.asr[0], outputs[0].asr[0])


@pytest.mark.parametrize("rollout", ["prefix", "generate"])
def test_no_gradient_of_the_missing_flow_arrives_at_the_transcript(
    rollout: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Exactly none, and some at the imagined text."""
    made = recipe(simulation={"rollout": rollout}, loss={"asr": 1.0})
    model, collate = build(made, tokenizer)
    seen: list[torch.Tensor] = []
    model.llm.causal.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    batch = collate(clips(made, RAGGED))
    flows = model(batch)
    inputs = seen[-1]  # transcripts, transcripts to be said, imagined text
    assert inputs.shape[1] == int(flows.tokens)
    real, owners = int(batch["text_mask"].sum()), []
    for output in (flows.complete.prediction, flows.asr[:, 0], flows.missing.prediction):
        (gradient,) = torch.autograd.grad(output.sum(), inputs, retain_graph=True)
        owners.append((gradient[0].abs().sum(1) > 0).nonzero().flatten().tolist())
    complete, said, missing = owners
    assert complete and said and missing
    assert max(complete) < real <= min(said) and max(said) < min(missing)


def test_imagination_acts_in_the_missing_flow_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    made = recipe()
    model, collate = build(made, tokenizer)
    batch = collate(clips(made, RAGGED))
    before = model(batch)
    for module in (model.fusion.pooled_imagination, model.fusion.views_imagination):
        torch.nn.init.normal_(module.get_parameter("text.decoder.bias"))
    after = model(batch)
    assert torch.equal(before.complete.prediction, after.complete.prediction)
    assert not torch.allclose(before.missing.prediction, after.missing.prediction)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Folders of a tiny WavLM and Llama."""
    folder, made = tmp_path_factory.mktemp("pretrained"), tiny.recipe(Path("none"))
    WavLMModel(WavLMConfig(**(made.audio.config or {}))).save_pretrained(folder / "audio")
    llama = LlamaConfig(**(made.text.config or {}), vocab_size=len(tokenizer))
    LlamaForCausalLM(llama).save_pretrained(folder / "text")
    return {"audio": str(folder / "audio"), "text": str(folder / "text")}


TUNINGS = [("frozen", "frozen"), ("full", "full"), ("lora", "lora")]


@pytest.mark.parametrize("rollout", ["prefix", "generate", "cached", "features", "none"])
@pytest.mark.parametrize("imagines", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_every_batch_gives_every_trainable_parameter_a_gradient(
    rollout: str, imagines: bool, pretrained: dict[str, str], tokenizer: PreTrainedTokenizerBase, world_of_one: None
) -> None:
    """What ZeRO relies on: whatever clips lack, the same parameters get a gradient, by the same losses."""
    batches = [RAGGED, [NOTHING] * 2, *([{**EVERYTHING, kind: False}] * 2 for kind in EVERYTHING)]
    for text, audio, tuning in product(["transcript", "features"], ["waveform", "features"], TUNINGS):
        if rollout == "features" and text == "transcript":
            continue  # refused: two language models
        unread = rollout in ("none", "features") and text == "features"  # no language model
        if unread and tuning[1] != "frozen":
            continue
        folder = None if unread else pretrained["text"]
        made = recipe(
            simulation={"rollout": rollout, "max_new_tokens": 2},
            imagination={"enabled": imagines},
            audio={"input": audio, "pretrained": pretrained["audio"], "config": None, "tuning": tuning[0]},
            text={"input": text, "pretrained": folder, "config": None, "tuning": tuning[1]},
        )
        model = build_model(made, None if unread else tokenizer).train()
        collate = build_collator(made, None if unread else tokenizer, model)
        wanted = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert any(name.startswith("fusion") for name in wanted)
        assert any(name.startswith("llm") for name in wanted) == (tuning[1] != "frozen")
        for has in batches if (audio, tuning[0]) == ("waveform", "full") else batches[:2]:
            batch = collate(clips(made, has))
            model.zero_grad()
            packed = pack(model(batch), batch)
            global_loss([packed], made.loss).surrogate(0, packed).backward()
            reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
            assert reached == wanted, (text, audio, tuning, wanted - reached)
            assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


ASR_ALONE = {**dict.fromkeys(("mse_complete", "mse_missing", "mkd1", "mkd2", "rs", "rnc"), 0.0), "asr": 1.0}
JUDGED = {"select_on": "transcription"}


@pytest.mark.parametrize("loss", [{"asr": 0.5}, ASR_ALONE])
@pytest.mark.parametrize("tuning", TUNINGS)
def test_asr_gives_every_trainable_parameter_a_gradient(
    loss: dict[str, float],
    tuning: tuple[str, str],
    pretrained: dict[str, str],
    tokenizer: PreTrainedTokenizerBase,
    world_of_one: None,
) -> None:
    """Also in a batch in which no clip has both audio and transcript. ASR alone trains no fusion network."""
    for rollout, audio in product(["prefix", "generate"], ["waveform", "features"]):
        made = recipe(
            simulation={"rollout": rollout, "max_new_tokens": 2},
            audio={"input": audio, "pretrained": pretrained["audio"], "config": None, "tuning": tuning[0]},
            text={"pretrained": pretrained["text"], "config": None, "tuning": tuning[1]},
            loss=loss,
            training=JUDGED,
        )
        model = build_model(made, tokenizer).train()
        collate = build_collator(made, tokenizer, model)
        wanted = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert any(name.startswith("fusion") for name in wanted) == (loss is not ASR_ALONE)
        assert any(name.startswith("projector") for name in wanted)
        for has in (RAGGED, [NOTHING] * 2, [{**EVERYTHING, "text": False}] * 2):
            batch = collate(clips(made, has))
            model.zero_grad()
            packed = pack(model(batch), batch)
            found = global_loss([packed], made.loss)
            found.surrogate(0, packed).backward()
            reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
            assert reached == wanted, (rollout, audio, wanted ^ reached)
            assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
            assert (found.terms["asr"] > 0) == (has is RAGGED)


def test_asr_is_normalised_by_the_tokens_of_all_micro_steps(
    tokenizer: PreTrainedTokenizerBase, world_of_one: None
) -> None:
    """Loss and gradient of unequal micro-batches are those of one batch."""
    made = recipe(loss=ASR_ALONE, training=JUDGED)
    model, collate = build(made, tokenizer)
    model.train().double()
    samples = clips(made, [*RAGGED, EVERYTHING])
    samples[0]["text"] = "a lovely film " * 9
    found = []
    for parts in ([samples], [samples[:1], samples[1:]]):
        batches = [collate(part) for part in parts]
        packed = [pack(model(batch), batch) for batch in batches]
        loss = global_loss(packed, made.loss)
        model.zero_grad()
        torch.stack([loss.surrogate(i, part) for i, part in enumerate(packed)]).sum().backward()
        found.append([loss.loss, *(p.grad for p in model.parameters() if p.grad is not None)])
    for one, many in zip(*found, strict=True):
        torch.testing.assert_close(one.double(), many.double(), rtol=1e-4, atol=1e-6)


def test_asr_is_normalised_by_the_tokens_of_all_ranks(tmp_path: Path) -> None:
    data = tiny.write_corpus(tmp_path / "shards")
    found = run_ranks("asr", 2, tmp_path, module="tests.dist_train.work_llm", data=str(data))
    assert found["loss"] == pytest.approx(found["expected"], rel=1e-5)
    assert found["distance"] < 1e-5
    assert found["apart"] == 2  # the ranks had other numbers of tokens


def test_asr_learns(tokenizer: PreTrainedTokenizerBase, world_of_one: None) -> None:
    made = recipe(loss=ASR_ALONE, training=JUDGED)
    model = build_model(made, tokenizer).train()
    batch = build_collator(made, tokenizer, model)(clips(made, [EVERYTHING] * 6))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        packed = pack(model(batch), batch)
        loss = global_loss([packed], made.loss)
        loss.surrogate(0, packed).backward()
        optimizer.step()
        losses.append(float(loss.loss))
    assert losses[-1] < 0.7 * losses[0]


def test_answers_at_hand_are_not_decoded_again(tokenizer: PreTrainedTokenizerBase) -> None:
    made = recipe(simulation={"rollout": "cached"})
    model, collate = build(made, tokenizer)
    batch = collate(clips(made, [*RAGGED, NOTHING]))
    first = model(batch)
    remember(batch, first.answers)

    def decoded(*_: Any, **__: Any) -> None:
        raise AssertionError("decoded")

    model.llm.causal.generate = decoded
    again = model(batch)
    assert_alike(first.missing, again.missing)
    batch["answer_mask"] = batch["answer_mask"].clone()
    batch["answer_mask"][2] = False  # a clip without audio is never decoded
    assert_alike(first.missing, model(batch).missing)
    batch["answer_mask"][1] = False
    with pytest.raises(AssertionError, match="decoded"):
        model(batch)
    batch["answer_mask"][1, 0] = True  # another answer
    assert not torch.allclose(first.missing.views[1], model(batch).missing.views[1])


def test_wavlm_runs_once_per_step_for_both_flows(tokenizer: PreTrainedTokenizerBase, world_of_one: None) -> None:
    made = recipe()
    model, collate = build(made, tokenizer)
    calls: list[int] = []
    model.audio.get_submodule("wavlm").register_forward_hook(lambda *_: calls.append(1))
    for has in (RAGGED, [NOTHING] * 2):
        batch = collate(clips(made, has))
        packed = pack(model(batch), batch)
        global_loss([packed], made.loss).surrogate(0, packed).backward()
    assert len(calls) == 2


def test_a_clip_without_audio_has_one_zero_position_of_imagined_text(tokenizer: PreTrainedTokenizerBase) -> None:
    for rollout in ("prefix", "generate", "none"):
        made = recipe(simulation={"rollout": rollout})
        model, collate = build(made, tokenizer)
        found = imagined(model, collate(clips(made, [EVERYTHING, {**EVERYTHING, "audio": False}])))
        assert found.mask[1].sum() == 1 and found.mask[1, 0]
        assert found.states[1].abs().sum() == 0
        assert (found.states[0].abs().sum() > 0) == (rollout != "none")


def imagined(model: DoubleFlow, batch: Batch) -> TextStates:
    """The simulated text that reaches the fusion network."""
    seen: list[TextStates] = []
    hook = model.fusion.register_forward_pre_hook(lambda _, args: seen.append(args[1].text))
    model(batch)
    hook.remove()
    return seen[0]


def test_the_shortest_clip_still_has_a_position_of_imagined_text(tokenizer: PreTrainedTokenizerBase) -> None:
    """However many frames the recipe stacks into one."""
    for kind, stack in (("waveform", 9), ("features", 9), ("waveform", 5)):
        made = recipe(simulation={"stack_frames": stack}, audio={"input": kind})
        model, collate = build(made, tokenizer)
        sample = clips(made, [EVERYTHING])[0]
        sample["audio"] = sample["audio"][:1]
        batch = collate([sample])
        assert model.audio(batch["audio"], batch["audio_mask"]).mask.sum() == stack
        assert imagined(model, batch).mask.sum() == 1
        assert model(batch).missing.prediction.isfinite().all()
        made = recipe(simulation={"rollout": "none"}, audio={"input": "features"})
        assert build(made, tokenizer)[0].audio.minimum_samples == 1


def test_tokens_are_the_positions_of_the_packed_pass(tokenizer: PreTrainedTokenizerBase) -> None:
    for rollout in ("prefix", "generate"):
        made = recipe(audio={"input": "features"}, simulation={"rollout": rollout})
        model, collate = build(made, tokenizer)
        samples = clips(made, [EVERYTHING] * 3)
        words = sum(len(tokenizer(sample["text"]).input_ids) for sample in samples)
        heard = sum(max(len(sample["audio"]), 5) // 5 for sample in samples)
        flows = model(collate(samples))
        said = 0 if flows.answers is None else int(flows.answers.mask.sum()) + 3 * (len(model.llm.prompt) - 1)
        assert int(flows.tokens) == words + heard + said


def test_all_weights_have_the_precision_of_the_recipe(tokenizer: PreTrainedTokenizerBase) -> None:
    made = recipe(precision="bf16", simulation={"rollout": "generate"})
    model = build_model(made, tokenizer)
    collate = build_collator(made, tokenizer, model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    flows = model(collate(clips(made, [*RAGGED, NOTHING])))
    assert flows.missing.prediction.dtype == torch.bfloat16
    assert all(part.isfinite().all() for flow in (flows.complete, flows.missing) for part in flow)


def test_weights_depend_on_the_seed_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    first, second, other = (build_model(recipe(seed=seed), tokenizer).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert not torch.equal(first["fusion.head.weight"], other["fusion.head.weight"])
