"""What a machine can do, and how long work and exchange take on it: a roofline per operation, rings for collectives."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sharding.errors import UserError, UserErrors
from sharding.files import MOST_YAML, read_bounded
from sharding.plain_yaml import check_yaml
from sharding.plan_trace import Work

GIB = 2**30
UNITS = {
    "B": 1,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}


class Hardware(BaseModel):
    """A profile: one accelerator, and how accelerators are joined."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    name: str = Field(description="For the report.")
    kind: Literal["cuda", "cpu"] = Field("cuda", description="Which kernels torch chooses.")
    memory: float = Field(gt=0, description="Bytes of device memory.")
    flops_16bit: float = Field(gt=0, description="Peak FLOP/s of dense matrix products in bf16.")
    flops_32bit: float = Field(gt=0, description="Peak FLOP/s of matrix products in fp32 (TF32 is off).")
    bandwidth: float = Field(gt=0, description="Bytes/s of device memory.")
    matrix_efficiency: float = Field(0.75, gt=0, le=1, description="Share of the peak that large products reach.")
    bandwidth_efficiency: float = Field(0.8, gt=0, le=1, description="Share of the bandwidth that is reached.")
    launch_seconds: float = Field(6e-6, ge=0, description="Least seconds of an operation in eager mode.")
    zero3_seconds: float = Field(
        1e-4, ge=0, description="Least seconds of a module under ZeRO-3: DeepSpeed's hooks, which run on the host."
    )
    link: float = Field(gt=0, description="Bytes/s an accelerator sends to the others of its node, one direction.")
    network: float = Field(gt=0, description="Bytes/s a node sends to other nodes, one direction.")
    link_efficiency: float = Field(0.8, gt=0, le=1, description="Share of link and network that is reached.")
    collective_seconds: float = Field(30e-6, ge=0, description="Least seconds of a collective.")
    host_link: float = Field(gt=0, description="Bytes/s between host and device.")
    host_bandwidth: float = Field(gt=0, description="Bytes/s of host memory, per process (updates of offloaded state).")
    reserved: float = Field(ge=0, description="Bytes that CUDA, NCCL and cuBLAS take beside torch's tensors.")
    fragmentation: float = Field(
        0.04, ge=0, description="Share of the peak that the allocator holds besides, in gaps and rounded sizes."
    )
    slowdown: dict[str, float] = Field(
        default_factory=dict,
        description="How much longer a quantised product takes than one in bf16: int8, int8_mixed (with columns in "
        "16 bits), nf4.",
    )


# Peaks: NVIDIA's data sheets (SXM). Slowdowns: bitsandbytes' benchmark of Llama-3.1-8B (benchmarking/README.md, 0.45):
# H100 bf16 1228 tokens/s, int8 586, with decomposition 371, NF4 659; the same factors are taken for the A100.
_HOPPER = {
    "flops_16bit": 989e12, "flops_32bit": 67e12, "link": 450e9, "network": 400e9, "host_link": 55e9,
    "host_bandwidth": 30e9, "reserved": 2.0 * GIB, "slowdown": {"int8": 2.1, "int8_mixed": 3.3, "nf4": 1.9},
}  # fmt: skip
PROFILES = {
    "h100": Hardware(name="H100 SXM 80 GB", memory=80 * GIB, bandwidth=3.35e12, **_HOPPER),
    "h200": Hardware(name="H200 SXM 141 GB", memory=139 * GIB, bandwidth=4.8e12, **_HOPPER),
    "a100": Hardware(
        name="A100 SXM 80 GB", memory=80 * GIB, bandwidth=2.04e12, flops_16bit=312e12, flops_32bit=19.5e12,
        link=300e9, network=200e9, host_link=25e9, host_bandwidth=20e9, reserved=2.0 * GIB,
        slowdown={"int8": 2.1, "int8_mixed": 3.3, "nf4": 1.9},
    ),
    "cpu": Hardware(
        name="one core of a server CPU", kind="cpu", memory=8 * GIB, bandwidth=10e9, flops_16bit=60e9, flops_32bit=40e9,
        launch_seconds=10e-6, link=2e9, network=1e9, collective_seconds=200e-6, host_link=10e9, host_bandwidth=10e9,
        reserved=0.0, slowdown={"int8": 4.0, "int8_mixed": 6.0, "nf4": 4.0},
    ),
}  # fmt: skip


def load_hardware(name: str) -> Hardware:
    """A profile by name, or from a YAML file with the fields of Hardware; `like: h100` takes over another's.

    Raises:
        UserError, UserErrors: there is no such profile or file, or fields are wrong.
    """
    if name in PROFILES:
        return PROFILES[name]
    path = Path(name)
    try:
        text = read_bounded(path, MOST_YAML, "Give a YAML file.").decode()
        check_yaml(text)
        values = yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            "--hardware", f"{name} is no profile ({', '.join(PROFILES)}) and cannot be read as YAML ({reason})",
            "Name a profile, or give a YAML file with the fields of sharding.hardware.Hardware.",
        ) from None  # fmt: skip
    if not isinstance(values, dict):
        raise UserError("--hardware", f"{name} is not a mapping of fields to values", "Write e.g. like: h100.")
    like = values.pop("like", None)
    if like is not None and not (isinstance(like, str) and like in PROFILES):
        raise UserError(f"{name}: like", f"cannot be {like!r}", f"Write one of {', '.join(PROFILES)}.")
    base = PROFILES[like].model_dump() if like else {}
    try:
        return Hardware.model_validate({"name": path.stem, **base, **values})
    except ValidationError as error:
        raise UserErrors(
            [
                UserError(f"{name}: {'.'.join(map(str, one['loc']))}", one["msg"], "See sharding.hardware.Hardware.")
                for one in error.errors()
            ]
        ) from None


def read_bytes(text: str, where: str) -> float:
    """`80GiB` → bytes.

    Raises:
        UserError: it is no size.
    """
    number = text.rstrip("KMGTiB")
    try:
        size = float(number) * UNITS[text[len(number) :].strip()]
    except (ValueError, KeyError):
        size = math.nan
    if not 0 < size < math.inf:
        raise UserError(where, f"cannot be {text!r}", "Write a size with its unit, such as 80GiB.")
    return size


def work_seconds(work: Iterable[Work], hardware: Hardware) -> float:
    """Each operation takes as long as its arithmetic, its memory traffic or its launch, whichever is longest."""
    rates = {"16": hardware.flops_16bit, "32": hardware.flops_32bit}
    moves = hardware.bandwidth * hardware.bandwidth_efficiency
    total = 0.0
    for one in work:
        rate = rates.get(one.unit, hardware.flops_16bit) * hardware.matrix_efficiency
        longest = max(one.flops / rate, one.moved / moves, hardware.launch_seconds)
        total += one.times * longest * hardware.slowdown.get(one.unit, 1.0)
    return total


class Ring(NamedTuple):
    """Bytes that one accelerator sends inside its node, and one node to the next, in a step."""

    inside: float
    between: float


def ring_bytes(wire: Counter[str], nodes: int, per_node: int) -> dict[str, Ring]:
    """For each collective, what a ring over all ranks sends per link.

    An all-reduce of n bytes sends 2 n (N - 1) / N over every link of the ring, the others half of it. Each node is
    entered once and left once.
    """
    world = nodes * per_node
    found = {}
    for name, size in wire.items():
        sent = size * (2 if name == "all_reduce" else 1) * (world - 1) / world
        found[name] = Ring(sent if per_node > 1 else 0.0, sent if nodes > 1 else 0.0)
    return found


def wire_seconds(wire: Counter[str], calls: float, hardware: Hardware, nodes: int, per_node: int) -> float:
    """Seconds of a step's collectives, one after the other; the slower of link and network decides."""
    if nodes * per_node == 1:
        return 0.0
    rings = ring_bytes(wire, nodes, per_node).values()
    inside = sum(ring.inside for ring in rings) / (hardware.link * hardware.link_efficiency)
    between = sum(ring.between for ring in rings) / (hardware.network * hardware.link_efficiency)
    return max(inside, between) + calls * hardware.collective_seconds
