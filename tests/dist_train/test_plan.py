"""The planner against real steps: FLOPs within 1 %, wire within 2 %, peak memory within 5 %; and what it tells."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerBase
from typer.testing import CliRunner

from dist_train.build import build_collator, build_model, fit_to_dataset, open_split, prepare_tokenizer
from dist_train.cli import app
from dist_train.global_loss import pack
from dist_train.plan import Plan, Planner, plan_as_is, predict_epoch
from dist_train.plan_corpus import corpus_of, load_of
from dist_train.plan_model import Clip, build_hollow, hollow_batch, trace_step
from dist_train.plan_pretrained import KNOWN, Sizes, without_weights
from dist_train.plan_search import make_plan
from dist_train.plan_table import plan_table
from dist_train.recipe import Recipe, validate
from sharding.errors import UserError
from sharding.hardware import GIB, PROFILES
from sharding.plan_trace import Tracer
from tests import tiny
from tests.dist_train.work_plan import clips_of
from tests.ranks import run_ranks

CPU, H100 = PROFILES["cpu"], PROFILES["h100"]
WIDE = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4, "num_hidden_layers": 4}
BUCKET = {"bucket_elements": 100_000}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_corpus(tmp_path_factory.mktemp("corpus") / "data", train=24)


FLOPS: dict[str, dict[str, Any]] = {
    "full, prefix, fp32": {},
    "full, answers, bf16": {"simulation": {"rollout": "generate"}, "precision": "bf16"},
    "frozen WavLM, LoRA, no rollout": {
        "audio": {"tuning": "frozen"},
        "text": {"tuning": "lora"},
        "simulation": {"rollout": "none"},
        "precision": "bf16",
    },
    "LoRA in both, checkpointed": {
        "audio": {"tuning": "lora", "activation_checkpointing": True},
        "text": {"tuning": "lora", "activation_checkpointing": True},
    },
    "DoRA and VeRA": {"audio": {"tuning": "vera"}, "text": {"tuning": "dora"}},
    "int8 base": {"text": {"tuning": "lora", "quantisation": "int8"}, "precision": "bf16"},
    "with ASR": {"loss": {"asr": 0.5}, "simulation": {"rollout": "generate"}},
    "WavLM trained to the waveform": {"audio": {"train_feature_encoder": True}, "text": {"tuning": "lora"}},
}


@pytest.mark.parametrize("name", FLOPS)
def test_flops_within_one_percent(name: str, corpus: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    changes = tiny.merge({"text": {"config": dict(WIDE)}, "data": {"batch": 6}}, json.loads(json.dumps(FLOPS[name])))
    recipe = fit_to_dataset(tiny.recipe(corpus, **changes))
    model = build_model(recipe, tokenizer).train()
    split = open_split(recipe, "train")
    samples = [{**split[index], "index": index, "real": True} for index in range(6)]
    batch = build_collator(recipe, tokenizer, model)(samples)
    batch["answer"] = torch.randint(3, len(tokenizer), (6, 4))
    batch["answer_mask"] = torch.ones(6, 4, dtype=torch.bool)
    with (
        FlopCounterMode(display=False) as counter,
        sdpa_kernel(SDPBackend.MATH),
    ):  # torch counts no fused kernel of CPUs
        rows = pack(model(batch), batch).rows
        (rows * torch.randn_like(rows)).sum().backward()

    hollow, tracer = build_hollow(recipe, tokenizer), Tracer(cuda=False)
    trace, *_ = trace_step(recipe, hollow, hollow_batch(recipe, hollow, clips_of(batch, 4), tracer), tracer, rows=6)
    found = trace.flops(phase="forward") + trace.flops(phase="backward")
    assert found == pytest.approx(counter.get_total_flops(), rel=0.01)


def case(stage: int, precision: str = "fp32", **changes: Any) -> dict[str, Any]:
    """Changes of tiny.recipe."""
    base: dict[str, Any] = {"text": {"config": WIDE}, "data": {"batch": 8}, "precision": precision}
    base = json.loads(json.dumps({**base, "zero": {"stage": stage, **BUCKET}}))
    return tiny.merge(base, changes)


LORA = {"text": {"tuning": "lora"}, "audio": {"tuning": "frozen"}}
STEPS: dict[str, dict[str, Any]] = {
    "0_full_prefix": case(0),
    "0_lora_bf16_generate": case(0, "bf16", **LORA, simulation={"rollout": "generate"}),
    "1_full_bf16": case(1, "bf16"),
    "1_full_accumulated": case(1, training={"accumulation": 2}),
    "2_full_adam": case(2, optimizer={"name": "adam", "weight_decay": 0.01}),
    "2_lora_bf16_checkpointed": case(2, "bf16", **tiny.merge({"text": {"activation_checkpointing": True}}, LORA)),
    "2_no_rollout_small_buckets": case(2, simulation={"rollout": "none"}, zero={"bucket_elements": 10_000}),
    "2_approximate": case(2, training={"accumulation": 2, "accumulated_loss": "approximate"}),
}
SYSTEMS: dict[str, dict[str, Any]] = {
    "2_vgmr_random": case(2, refine={"kind": "vgmr", "width": 16}, missing="random"),
    "2_promma": case(2, imagination={"kind": "promma", "heads": 2}),
    "2_cmpt": case(
        2, **tiny.merge({"imagination": {"kind": "cmpt", "heads": 2}, "simulation": {"rollout": "none"}}, LORA)
    ),
}
SHARDED: dict[str, dict[str, Any]] = {
    "3_full_prefix": case(3),
    "3_lora_bf16_persistent": case(3, "bf16", **LORA, zero={"persistence_threshold": 1000}),
    "3_full_accumulated_checkpointed": case(
        3, training={"accumulation": 2}, text={"activation_checkpointing": True}, simulation={"rollout": "none"}
    ),
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_trace_is_the_same_without_what_is_known_of_operations(
    name: str, corpus: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    class Forgetful(dict[Any, Any]):
        def __setitem__(self, key: Any, value: Any) -> None:
            pass

    recipe = fit_to_dataset(tiny.recipe(corpus, **json.loads(json.dumps(SYSTEMS[name]))))
    planner = Planner(recipe, tokenizer, CPU, 1, 2)
    clips = [Clip(9000, 8, 5, 4), Clip(5000, 3, 7, 2)]
    knowing = planner.trace(clips, 4, zero3=True).trace
    planner.traces.clear()
    planner.operations.known = Forgetful()
    anew = planner.trace(clips, 4, zero3=True).trace
    assert knowing == anew


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cases", "ranks"),
    [
        (dict(list(STEPS.items())[:4]), 2),
        (dict(list(STEPS.items())[4:]), 2),
        (SYSTEMS, 2),
        (SHARDED, 2),
        ({name: STEPS[name] for name in ("1_full_bf16", "2_full_adam")}, 1),
    ],
)
def test_memory_within_five_and_wire_within_two_percent(
    cases: dict[str, Any], ranks: int, corpus: Path, tmp_path: Path
) -> None:
    measured = run_ranks("measure", ranks, tmp_path, module="tests.dist_train.work_plan", data=str(corpus), cases=cases)
    for name, changes in cases.items():
        recipe = fit_to_dataset(tiny.recipe(corpus, **json.loads(json.dumps(changes))))
        planner = Planner(recipe, AutoTokenizer.from_pretrained(tmp_path / f"tokenizer_{name}"), CPU, 1, ranks)
        for rank, found in enumerate(measured[name]):
            clips = [[Clip(*clip) for clip in batch] for batch in found["clips"]]
            predicted = planner.predict(clips, rank=rank)
            assert predicted.peak_bytes == pytest.approx(found["peak"], rel=0.05), name
            sent, foreseen = sum(found["wire"].values()), sum(predicted.wire_bytes.values())
            assert foreseen == pytest.approx(sent, rel=0.02), name
            for collective, size in found["wire"].items():
                assert predicted.wire_bytes.get(collective, 0) == pytest.approx(size, rel=0.02, abs=100), name


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("name", ["2_lora_bf16_checkpointed", "2_full_adam", "0_full_prefix", "1_full_bf16"])
def test_peak_of_the_allocator_within_five_percent(name: str, corpus: Path, tmp_path: Path) -> None:
    wide = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_hidden_layers": 8}
    changes = tiny.merge(json.loads(json.dumps(STEPS[name])), {"text": {"config": wide}})
    found = run_ranks(
        "measure_on_gpu", 1, tmp_path, module="tests.dist_train.work_plan", data=str(corpus), changes=changes
    )
    recipe = fit_to_dataset(tiny.recipe(corpus, **changes))
    planner = Planner(recipe, AutoTokenizer.from_pretrained(tmp_path / "tokenizer"), H100, 1, 1)
    predicted = planner.predict([[Clip(*clip) for clip in batch] for batch in found["clips"]])
    assert predicted.peak_bytes == pytest.approx(found["peak"], rel=0.05)


def vicuna(**changes: Any) -> Recipe:
    """The joint recipe on models that are not here."""
    values: dict[str, Any] = {
        "precision": "bf16",
        "data": {"path": "not/there"},
        "audio": {"pretrained": "microsoft/wavlm-large"},
        "text": {"pretrained": "lmsys/vicuna-7b-v1.5", "tuning": "lora"},
        "simulation": {"rollout": "prefix"},
    }
    return validate(tiny.merge(values, changes))


def plan_run(recipe: Recipe, nodes: int, per_node: int) -> Plan:
    """The plan of the recipe as it is, on H100s."""
    recipe, corpus = corpus_of(recipe)
    planner = Planner(recipe, None, H100, nodes, per_node)
    return plan_as_is(planner, corpus, load_of(recipe, corpus, planner.world))


def test_seven_billion_parameters_without_weights() -> None:
    plan = plan_run(vicuna(), 4, 8)
    parameters = plan.predicted.parameters
    assert parameters["llm"]["all"] - parameters["llm"]["trained"] == 6_738_415_616
    assert parameters["audio"] == {"all": 315_453_120, "trained": 0}
    assert parameters["projector"]["all"] == 18_880_512
    assert 13.1 < plan.predicted.peak_parts["frozen weights"] / GIB < 13.2
    assert any("vicuna" in note for note in plan.notes) and any("wavlm" in note for note in plan.notes)
    # A frozen base has no weight gradients: backward does about as much as forward, not twice.
    llm = plan.predicted.flops_of_parts["llm"]
    tokens = llm / (2 * 2 * 6.476e9)
    assert plan.predicted.flops["backward"] < 1.2 * plan.predicted.flops["forward"]
    assert 10 < tokens < 5000


@pytest.mark.parametrize(("quantisation", "bits"), [("int8", 8), ("nf4", 4)])
def test_quantised_bases_hold_fewer_bits(quantisation: str, bits: int) -> None:
    recipe = vicuna(text={"quantisation": quantisation}, widths={"vision": 1024})
    predicted = Planner(recipe, None, H100, 1, 8).predict([[Clip(16_000, 5, 3, 5)]])
    linear, other = 6.476e9, 2 * 32000 * 4096 * 2 + 0.63e9  # embeddings and output in bf16, and WavLM
    scales = 0.02e9 if quantisation == "int8" else linear / 64 * 1.02
    assert predicted.peak_parts["frozen weights"] == pytest.approx(linear * bits / 8 + other + scales, rel=0.02)


def test_files_of_the_recipes_type_are_mapped_once_per_node(tmp_path: Path) -> None:
    loading = {}
    for stored in (torch.bfloat16, torch.float16):
        folder = tmp_path / str(stored)
        LlamaConfig(
            hidden_size=1024, num_attention_heads=8, num_hidden_layers=8, vocab_size=32000, dtype=stored
        ).save_pretrained(folder)
        recipe = vicuna(text={"pretrained": str(folder)}, widths={"vision": 1024})
        planner = Planner(recipe, Sizes(32000), H100, 1, 8)
        loading[stored] = planner.loading_bytes()
        weights = sum(p.numel() for n, p in planner.model.named_parameters() if "llm" in n and "lora_" not in n)
        told = [note for note in planner.notes if str(folder) in note]
        assert bool(told) == (stored is torch.float16)
    assert loading[torch.float16] - loading[torch.bfloat16] == 7 * 2 * weights


def test_known_shapes_are_whole() -> None:
    fields = dict(KNOWN["lmsys/vicuna-7b-v1.5"])
    assert fields.pop("model_type") == "llama"
    assert fields.keys() <= LlamaConfig().to_dict().keys()


def test_a_local_folder_is_read(tmp_path: Path) -> None:
    LlamaConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=2, vocab_size=300).save_pretrained(tmp_path)
    recipe = vicuna(text={"pretrained": str(tmp_path)})
    found, notes = without_weights(recipe)
    assert found.text.config is not None and found.text.config["hidden_size"] == 64
    assert not any(str(tmp_path) in note for note in notes)


def test_models_of_other_families_are_refused(tmp_path: Path) -> None:
    for kind, told in (("t5", r"what can be planned: causal"), ("qwen3_next", r"text\.pretrained: .*linear_attention")):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        with pytest.raises(UserError, match=told):
            without_weights(vicuna(text={"pretrained": str(tmp_path)}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "sew"}))
    with pytest.raises(UserError, match=r"audio\.pretrained: .*sew model.*whisper"):
        without_weights(vicuna(audio={"pretrained": str(tmp_path)}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(UserError, match="gpt2"):
        without_weights(vicuna(text={"pretrained": str(tmp_path)}))
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="local folder"):
        without_weights(vicuna(text={"pretrained": str(tmp_path)}))


def test_stages_and_micro_steps_trade_memory(corpus: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    recipe = fit_to_dataset(tiny.recipe(corpus, text={"config": WIDE}, zero=BUCKET))
    planner = Planner(recipe, tokenizer, H100, 1, 4)
    clips = [[Clip(9000, 8, 5, 4)] * 6]
    predicted = {
        stage: planner.predict(clips, zero=recipe.zero.model_copy(update={"stage": stage})) for stage in range(4)
    }
    at_rest = ("fp32 masters", "optimizer moments", "trained weights", "gradients")
    for part in at_rest[:2]:
        assert predicted[2].peak_parts[part] <= predicted[1].peak_parts[part]
    assert predicted[1].peak_parts["optimizer moments"] < predicted[0].peak_parts["optimizer moments"] / 3
    assert predicted[3].peak_parts["trained weights"] < predicted[2].peak_parts["trained weights"] / 3
    twice = planner.predict([clips[0][:3], clips[0][:3]])
    assert twice.peak_bytes < predicted[2].peak_bytes and twice.micro_steps == 2
    assert twice.seconds["compute"] > predicted[2].seconds["compute"]


def test_ranks_with_fewer_clips_exchange_as_many_rows(corpus: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    planner = Planner(fit_to_dataset(tiny.recipe(corpus)), tokenizer, H100, 1, 4)
    clips = [[Clip(9000, 8, 5, 4)] * 3]
    plain, padded = (planner.predict(clips, gathered=rows).wire_bytes["all_gather"] for rows in (None, 5))
    row = planner.trace(clips[0], 12, zero3=False).row_bytes
    assert padded - plain == 4 * 2 * row > 0


def test_the_rank_with_the_longest_answer_may_be_the_slowest(corpus: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Decoding goes token by token: one long clip takes longer than many short ones that are more to compute."""
    recipe = tiny.recipe(
        corpus,
        data={"batch": 12, "budget": {"audio_seconds": 9}},
        simulation={"rollout": "generate", "max_new_tokens": 200},
    )
    recipe, lengths = corpus_of(recipe)
    load = load_of(recipe, lengths, 4)
    planner = Planner(recipe, tokenizer, H100, 1, 4)
    found = predict_epoch(planner, load).seconds["step"]
    each = [
        planner.predict([load.worst], typical=one, gathered=load.gathered, of=12)
        for one in (load.typical, load.longest)
    ]
    assert found == max(one.seconds["step"] for one in each)
    assert max(clip.answer for clip in load.longest[0]) >= max(clip.answer for clip in load.typical[0])
    plain = recipe.model_copy(update={"simulation": recipe.simulation.model_copy(update={"rollout": "prefix"})})
    without = Planner(plain, tokenizer, H100, 1, 4)
    assert predict_epoch(without, load).seconds == without.predict(
        [load.worst], typical=load.typical, gathered=load.gathered, of=12
    ).seconds  # fmt: skip


def test_fillers_are_gathered_but_not_compared(corpus: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    planner = Planner(fit_to_dataset(tiny.recipe(corpus)), tokenizer, CPU, 1, 4)
    clips = [[Clip(9000, 8, 5, 4)] * 3]
    padded, real = (planner.predict(clips, gathered=500, of=of) for of in (None, 12))
    assert padded.wire_bytes == real.wire_bytes
    assert real.seconds["compute"] < padded.seconds["compute"] and real.peak_bytes < padded.peak_bytes
    bare = planner.predict(clips).seconds["compute"]  # 12 rows gathered: the pairs of 2000 rows are what costs
    assert real.seconds["compute"] - bare < 0.1 * (padded.seconds["compute"] - bare)


def test_offload_moves_state_to_the_host(corpus: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    recipe = fit_to_dataset(tiny.recipe(corpus, text={"config": WIDE}, zero=BUCKET))
    planner = Planner(recipe, tokenizer, H100, 1, 4)
    zero = recipe.zero.model_copy(update={"offload_optimizer": "cpu"})
    there, here = planner.predict([[Clip(9000, 8, 5, 4)]], zero=zero), planner.predict([[Clip(9000, 8, 5, 4)]])
    assert there.host_bytes > 0 == here.host_bytes
    assert "optimizer moments" not in there.peak_parts
    assert there.peak_bytes < here.peak_bytes


def test_what_does_not_fit_is_said(corpus: Path) -> None:
    recipe = tiny.recipe(corpus, text={"config": WIDE}, zero=BUCKET, data={"batch": 8})
    roomy = make_plan(recipe, H100, 1, 2)
    assert roomy.best is not None and roomy.candidates[roomy.best].verdict == "best"
    assert len(roomy.scaling) == 3 and roomy.scaling[0].efficiency == 1
    tight = H100.model_copy(update={"memory": H100.reserved + 2**20})
    plan = make_plan(recipe, tight, 1, 2)
    assert plan.best is None
    assert {candidate.micro_steps for candidate in plan.candidates} == {1, 2, 4}
    assert all("too much" in candidate.verdict for candidate in plan.candidates)
    console = Console(record=True, width=120)
    console.print(plan_table(plan))
    text = console.export_text()
    assert "does not fit" in text and "activations of" in text and "feeds at most 8 GPUs" in text


def test_budgets_decide_micro_steps(corpus: Path) -> None:
    recipe = tiny.recipe(corpus, text={"config": WIDE}, data={"batch": 8, "budget": {"audio_seconds": 1.5}})
    plan = plan_run(recipe, 1, 2)
    assert plan.predicted.micro_steps > 1


def test_the_command_writes_json(corpus: Path, tmp_path: Path) -> None:
    path, out = tmp_path / "recipe.yaml", tmp_path / "plan.json"
    path.write_text(json.dumps(tiny.recipe(corpus).model_dump(mode="json")))
    options = ["--nodes", "1", "--gpus-per-node", "2", "--gpu-memory", "40GiB", "--hardware", "a100"]
    result = CliRunner().invoke(app, ["plan", str(path), "data.batch=8", *options, "--json", "--output", str(out)])
    assert result.exit_code == 0, result.output
    plan = Plan.model_validate_json(out.read_text())
    assert plan.hardware.memory == 40 * GIB and plan.predicted.world == 2
    assert Plan.model_validate_json(result.stdout[result.stdout.index("{") :]) == plan
    for place in (tmp_path, tmp_path / "absent" / "plan.json"):
        refused = CliRunner().invoke(app, ["plan", str(path), "--output", str(place)])
        assert isinstance(refused.exception, UserError) and "cannot be written" in str(refused.exception)


def test_planning_allocates_nothing() -> None:
    """A model is planned that most machines could not hold."""
    recipe = vicuna(text={"tuning": "full"}, audio={"tuning": "full"}, widths={"vision": 1024})
    predicted = Planner(recipe, None, H100, 1, 1).predict([[Clip(16_000, 5, 3, 5)]])
    assert predicted.peak_bytes > 100 * GIB  # 16 bytes per trained parameter, 7 billion of them
    assert predicted.checkpoint_bytes == 12 * sum(part["trained"] for part in predicted.parameters.values())


def test_prepare_tokenizer_is_not_needed(corpus: Path, tmp_path: Path) -> None:
    recipe = fit_to_dataset(tiny.recipe(corpus))
    prepare_tokenizer(recipe, tmp_path)
    real = Planner(recipe, AutoTokenizer.from_pretrained(tmp_path), CPU, 1, 1)
    stand_in = Planner(recipe, None, CPU, 1, 1)
    clips = [[Clip(9000, 8, 5, 4)]]
    assert stand_in.predict(clips).peak_bytes == pytest.approx(real.predict(clips).peak_bytes, rel=0.05)
