"""The tracer against real tensors, the arithmetic of ZeRO and of rings against loops, profiles of hardware."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from sharding.errors import UserError, UserErrors
from sharding.hardware import PROFILES, Hardware, load_hardware, read_bytes, ring_bytes, wire_seconds, work_seconds
from sharding.meter import Meter
from sharding.plan_gather import Gathering
from sharding.plan_ledger import Ledger, Optimizer, Schedule, Weight, Wire
from sharding.plan_run import Operations, on, tensors_in
from sharding.plan_trace import Event, Trace, Tracer, Work
from sharding.plan_zero import STAGES
from sharding.zero import ZeroSettings


class Attend(nn.Module):
    """Attention, and one branch that reads whole numbers."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.project, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, states: Tensor, lengths: Tensor) -> Tensor:
        query, key, value = self.project(states).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(query, key, value, dropout_p=self.dropout)
        mixed = self.out(attended.transpose(1, 2).flatten(2)) + states
        kept = torch.arange(states.shape[1]) < lengths[:, None]
        return mixed[kept] if int(lengths.min()) < states.shape[1] else mixed.flatten(0, 1)


class Net(nn.Module):
    """A little of everything: convolution, norm, attention, an embedding, and a checkpointed layer."""

    def __init__(self, width: int, heads: int, dropout: float, *, recompute: bool) -> None:
        super().__init__()
        self.recompute = recompute
        self.convolve = nn.Conv1d(width, width, 3, padding=1)
        self.norm = nn.LayerNorm(width)
        self.table = nn.Embedding(11, width)
        self.attend = Attend(width, heads, dropout)
        self.head = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(0.2), nn.Linear(4 * width, 3))

    def forward(self, states: Tensor, ids: Tensor, lengths: Tensor) -> Tensor:
        states = self.convolve(states.transpose(1, 2)).transpose(1, 2) + self.table(ids)
        states = self.norm(states)
        if self.recompute:
            return self.head(checkpoint(self.attend, states, lengths, use_reentrant=False))
        return self.head(self.attend(states, lengths))


shapes = st.tuples(
    st.integers(1, 4), st.integers(2, 40), st.sampled_from([8, 16, 48]), st.sampled_from([1, 2, 4]), st.booleans()
)


def example(batch: int, length: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of Net."""
    lengths = torch.randint(1, length + 1, (batch,))
    return torch.randn(batch, length, width), torch.randint(0, 11, (batch, length)), lengths


def traced(model: nn.Module, inputs: tuple[Tensor, ...]) -> Trace:
    """The trace of a forward and backward pass."""
    tracer = Tracer(cuda=False)
    inputs = tuple(value.to("meta") if value.is_floating_point() else value for value in inputs)
    with tracer.recording(model, inputs) as trace:
        loss = model(*inputs).square().mean()
        tracer.phase = "backward"
        loss.backward()
        del loss
    return trace


@given(shapes)
@settings(max_examples=15, deadline=None)
def test_peak_and_gradients_are_those_of_real_tensors(shape: tuple[int, int, int, int, bool]) -> None:
    batch, length, width, heads, recompute = shape
    inputs = example(batch, length, width)
    real = Net(width, heads, 0.0, recompute=recompute)
    real.table.weight.requires_grad_(False)

    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    for parameter in real.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(drop)
    with Meter() as meter:
        before = meter.now
        real(*inputs).square().mean().backward()
    with torch.device("meta"):
        hollow = Net(width, heads, 0.0, recompute=recompute)
    hollow.table.weight.requires_grad_(False)
    trace = traced(hollow, inputs)
    assert trace.peak() == pytest.approx(meter.peak - before, rel=0.01, abs=64)
    gradients = [event.index for event in trace.events if event.kind == "gradient"]
    assert sorted(gradients) == [i for i, parameter in enumerate(real.parameters()) if parameter.requires_grad]


@given(shapes)
@settings(max_examples=15, deadline=None)
def test_flops_are_those_torch_counts(shape: tuple[int, int, int, int, bool]) -> None:
    batch, length, width, heads, recompute = shape
    inputs = example(batch, length, width)
    dropout = 0.1  # the unfused kernel, whose products torch counts
    with torch.device("meta"):
        hollow = Net(width, heads, dropout, recompute=recompute)
    trace = traced(hollow, inputs)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        Net(width, heads, dropout, recompute=recompute)(*inputs).square().mean().backward()
    assert trace.flops() == counter.get_total_flops()


@given(shapes)
@settings(max_examples=15, deadline=None)
def test_what_is_known_of_a_result_is_what_torch_says(shape: tuple[int, int, int, int, bool]) -> None:
    """Every result is made twice: as remembered, and anew."""
    batch, length, width, heads, recompute = shape
    with torch.device("meta"):
        hollow = Net(width, heads, 0.1, recompute=recompute)
    inputs = tuple(value.to("meta") if value.is_floating_point() else value for value in example(batch, length, width))
    found = {"remembered": 0}

    def layout(result: Any) -> list[Any]:
        return [(out.shape, out.stride(), out.dtype, out.is_meta, out.storage_offset()) for out in tensors_in([result])]

    class Checked(Operations):
        def on_meta(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
            before = len(self.known)
            result = super().on_meta(func, args, kwargs, tensors)
            assert layout(result) == layout(on("meta", func, args, kwargs)), func
            found["remembered"] += len(self.known) == before
            return result

    tracer = Tracer(cuda=False, operations=Checked())
    with tracer.recording(hollow, inputs):
        for _ in range(2):
            hollow(*inputs).square().mean().backward()
    assert found["remembered"] > 20


def test_work_belongs_to_parts_and_phases_and_repeats() -> None:
    with torch.device("meta"):
        model = Net(16, 2, 0.0, recompute=False)
    inputs = tuple(value.to("meta") if value.is_floating_point() else value for value in example(2, 9, 16))
    tracer = Tracer(cuda=True)
    with tracer.recording(model, inputs) as trace:
        with tracer.repeated(5), torch.no_grad():
            model(*inputs)
        forward = trace.flops()
        model(*inputs)
    assert forward == 5 * (trace.flops() - forward) > 0
    assert {"convolve", "attend", "head"} <= {work.part for work in trace.work if work.flops}
    assert sum(trace.flops(part=part) for part in {work.part for work in trace.work}) == trace.flops()


def model_events(modules: list[set[int]], weights: list[Weight]) -> Trace:
    """A trace of modules that run one after the other, forward and backward, each with its own weights."""
    trace = Trace(modules=modules)
    trace.events.append(Event("phase", part="forward"))
    for number in range(len(modules)):
        trace.events += [Event("enter", index=number), Event("memory", 100, "m"), Event("leave", index=number)]
    trace.events.append(Event("phase", part="backward"))
    for number in reversed(range(len(modules))):
        trace.events.append(Event("enter", index=number))
        trace.events += [Event("gradient", index=i) for i in sorted(modules[number]) if weights[i].trained]
        trace.events += [Event("memory", -100, "m"), Event("leave", index=number)]
    return trace


@st.composite
def runs(draw: st.DrawFn) -> dict[str, Any]:
    sizes = draw(st.lists(st.integers(1, 400), min_size=1, max_size=12))
    trained = draw(st.lists(st.booleans(), min_size=len(sizes), max_size=len(sizes)).filter(any))
    size = draw(st.sampled_from([2, 4]))
    weights = [Weight(elements, size, train) for elements, train in zip(sizes, trained, strict=True)]
    cuts = draw(st.integers(1, len(sizes)))
    modules = [set(map(int, part)) for part in np.array_split(np.arange(len(sizes)), cuts)]
    return {
        "weights": weights,
        "trace": model_events(modules, weights),
        "world": draw(st.integers(1, 7)),
        "settings": {
            "bucket_elements": draw(st.integers(1, 1000)),
            "persistence_threshold": draw(st.integers(0, 400)),
        },
        "schedule": Schedule(micro_steps=draw(st.integers(1, 4)), replays=draw(st.booleans())),
    }


@given(runs())
@settings(deadline=None)
def test_zero_conserves_weights_gradients_and_state(run: dict[str, Any]) -> None:
    weights, world, schedule = run["weights"], run["world"], run["schedule"]
    optimizer = Optimizer(state=8, scratch=4, at_once=False)
    trained = sum(weight.elements for weight in weights if weight.trained)
    size = weights[0].size
    for number, kind in STAGES.items():
        zero = ZeroSettings(stage=number, **run["settings"])
        ranks = [kind(weights, zero, world, rank, optimizer) for rank in range(world)]
        replays = [rank.run([run["trace"]], schedule) for rank in ranks]
        for replay in replays:
            assert all(held >= 0 for held in replay.memory.held.values())
            assert replay.memory.held["optimizer moments"] * (world if number else 1) >= 8 * trained
            assert replay.memory.peak >= replay.memory.total
        reduced = replays[0].wire.bytes["all_reduce"] + replays[0].wire.bytes["reduce_scatter"]
        times = schedule.micro_steps if number >= 2 else 1
        padding = size * times * world * len(weights) if number == 3 else 0
        assert trained * size * times <= reduced <= trained * size * times + padding
        if number in (1, 2):
            gathered, whole = replays[0].wire.bytes["all_gather"], trained * size
            assert whole <= gathered < whole + 2 * world * size if world > 1 else gathered == 0


class Books:
    """What Gathering writes into."""

    def __init__(self) -> None:
        self.memory, self.wire, self.times = Ledger(), Wire(), 1.0


@given(runs(), st.sampled_from(["all", "forward", "none"]))
@settings(deadline=None)
def test_gathered_weights_are_there_when_used_and_gone_in_the_end(run: dict[str, Any], foresight: Any) -> None:
    books, trace = Books(), run["trace"]
    gathering = Gathering(run["weights"], set(), run["world"], trace, books, foresight)
    for event in trace.events:
        if event.kind == "enter":
            gathering.fetch(event.index)
            assert trace.modules[event.index] <= gathering.there.keys()
        elif event.kind == "leave":
            gathering.release(event.index)
    gathering.finish()
    assert books.memory.held["gathered weights"] == 0
    whole = sum(weight.bytes for weight in run["weights"])
    assert (books.wire.bytes["all_gather"] >= whole) == (run["world"] > 1)


def ring(sizes: list[int], reduce: bool) -> int:
    """Chunks that one rank passes on in a ring, by doing it."""
    world, sent = len(sizes), 0
    for _ in range(world - 1):  # reduce-scatter or all-gather
        sent += sizes[0]
    for _ in range(world - 1 if reduce else 0):
        sent += sizes[0]
    return sent


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 1000))
def test_rings_send_what_a_ring_sends(nodes: int, per_node: int, chunk: int) -> None:
    world = nodes * per_node
    wire = Counter({"all_reduce": world * chunk, "all_gather": world * chunk})
    found = ring_bytes(wire, nodes, per_node)
    for name, link in found.items():
        sent = ring([chunk] * world, name == "all_reduce")
        assert link.inside == pytest.approx(sent if per_node > 1 else 0)
        assert link.between == pytest.approx(sent if nodes > 1 else 0)
    alone = wire_seconds(wire, 3, PROFILES["h100"], nodes, per_node)
    assert (alone == 0) == (world == 1)


def test_an_operation_takes_its_longest_resource() -> None:
    h100 = PROFILES["h100"]
    product = Work("a", "forward", flops=10**15, moved=1, times=2, unit="16")
    copy = Work("a", "forward", flops=0, moved=10**12, times=1, unit="16")
    tiny = Work("a", "forward", flops=0, moved=1, times=7, unit="16")
    assert work_seconds([product], h100) == pytest.approx(2 * 1e15 / (989e12 * h100.matrix_efficiency))
    assert work_seconds([copy], h100) == pytest.approx(1e12 / (3.35e12 * h100.bandwidth_efficiency))
    assert work_seconds([tiny], h100) == pytest.approx(7 * h100.launch_seconds)
    mixed = Work("a", "forward", flops=10**15, moved=1, times=1, unit="int8_mixed")
    assert work_seconds([mixed], h100) == pytest.approx(3.3 * work_seconds([product], h100) / 2)


def test_profiles_by_name_and_file(tmp_path: Path) -> None:
    own = tmp_path / "ours.yaml"
    own.write_text("like: a100\nnetwork: 25.0e+9\n")
    found = load_hardware(str(own))
    assert found.network == 25e9 and found.memory == PROFILES["a100"].memory
    assert isinstance(load_hardware("h200"), Hardware)
    with pytest.raises(UserError, match="h100, h200, a100, cpu"):
        load_hardware("h9000")
    own.write_text("like: a100\nnetwork: fast\nspeed: 3\n")
    with pytest.raises(UserErrors) as caught:
        load_hardware(str(own))
    assert "network" in str(caught.value) and "speed" in str(caught.value)
    own.write_text("- 3")
    with pytest.raises(UserError, match="not a mapping"):
        load_hardware(str(own))
    own.write_text("like: tpu")
    with pytest.raises(UserError, match="tpu"):
        load_hardware(str(own))


@pytest.mark.parametrize(("text", "size"), [("80GiB", 80 * 2**30), ("1.5TB", 1.5e12), ("512B", 512), ("3 GB", 3e9)])
def test_sizes(text: str, size: float) -> None:
    assert read_bytes(text, "--gpu-memory") == size


@pytest.mark.parametrize("text", ["80 Gigs", "GiB", "", "-", "80", "nanGiB", "-5GiB", "0GiB", "1e400GiB"])
def test_wrong_sizes(text: str) -> None:
    with pytest.raises(UserError, match="--gpu-memory"):
        read_bytes(text, "--gpu-memory")
