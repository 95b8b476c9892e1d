"""Whether a rank's device computes rightly, is as fast as the others, and free; and what nvidia-smi says of it."""

from __future__ import annotations

import re
import shutil
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

import torch
from pydantic import BaseModel, Field

from sharding.hardware import GIB
from slurm.preflight.findings import Finding, findings_of, severity_of

CHECK, SMI_CHECK = "device", "nvidia-smi"
SLOWER = {"cuda": 2.0, "cpu": 3.0}  # times the median; the cores of a CPU are shared, and their speed wavers
SIZE = {"cuda": 4096, "cpu": 256}  # small enough that a product on a CPU ends before another process has its turn
SECONDS = 0.5  # of matrix products, while an idle GPU raises its clock
HELD = 2 * GIB  # bytes by which others' memory on a device may exceed the median
SLOW_REMEDY = "See what holds it back: nvidia-smi -q -d PERFORMANCE, or other processes."
ASK_SECONDS = 3.0  # for an answer of nvidia-smi
# A driver leaves out fields that it does not know; the old names of the clocks' fields are known to all of them.
SMI_FIELDS = (
    "uuid",
    "driver_version",
    "temperature.gpu",
    "clocks.current.sm",
    "clocks.max.sm",
    "ecc.errors.uncorrected.volatile.total",
    "retired_pages.pending",
    "clocks_throttle_reasons.hw_thermal_slowdown",
    "clocks_throttle_reasons.hw_power_brake_slowdown",
)
ROW_FIELDS = ("gpu_uuid", "remapped_rows.uncorrectable", "remapped_rows.pending", "remapped_rows.failure")
UNKNOWN_FIELD = re.compile(r'Field "([^"]+)" is not a valid field to query')
LOST = re.compile(r"Unable to determine the device handle for GPU.*")


class Device(BaseModel):
    """What one rank found of its device."""

    name: str
    kind: str = Field(description="cuda or cpu.")
    uuid: str | None = None
    products: int = Field(description="Matrix products made.")
    wrong: int = Field(description="Of them, with a wrong result.")
    flops: float = Field(description="FLOP/s of the fastest of them; of a CPU on one core.")
    total: int | None = Field(None, description="Bytes of a GPU's memory.")
    free: int | None = None
    held: int | None = Field(None, description="Bytes in use that this process did not allocate (its context counts).")


class Smi(BaseModel):
    """What nvidia-smi tells of a node: of each GPU (by UUID) the fields that it knows; GPUs that it lost."""

    gpus: dict[str, dict[str, str]] = Field(default_factory=dict)
    lost: list[str] = Field(default_factory=list)

    @property
    def driver(self) -> str | None:
        """Version of the driver."""
        return next((gpu["driver_version"] for gpu in self.gpus.values() if "driver_version" in gpu), None)


def measure_device(device: torch.device) -> Device:
    """Multiplies matrices on the device, and checks and times it.

    The entries are -1, 0 and 1, so that every sum is a whole number that bf16 holds, in whatever order it is taken: the
    result is exact. It is compared on the CPU by Freivalds' method, (A B) x = A (B x), in fp64, which holds these
    numbers too; the products after the first must equal it.
    """
    size, cuda = SIZE[device.type], device.type == "cuda"
    free = total = held = None
    if cuda:
        free, total = torch.cuda.mem_get_info(device)
        held = total - free - torch.cuda.memory_reserved(device)
    draw = torch.Generator().manual_seed(size)
    a, b = (entries(size, draw).to(device, torch.bfloat16 if cuda else torch.float32) for _ in range(2))
    with nullcontext() if cuda else one_thread():
        first = a @ b
        x = torch.randint(-1000, 1001, (size,), generator=draw).double()
        right = torch.equal(first.cpu().double() @ x, a.cpu().double() @ (b.cpu().double() @ x))
        made, wrong, fastest = 1, 0 if right else 1, float("inf")
        calls = 10 if cuda else 1  # so that launching takes no part of the time
        ends = time.perf_counter() + SECONDS
        while time.perf_counter() < ends:
            began = time.perf_counter()
            for _ in range(calls):
                product = a @ b
            if cuda:
                torch.cuda.synchronize(device)
            fastest = min(fastest, (time.perf_counter() - began) / calls)
            made, wrong = made + 1, wrong + int(not torch.equal(product, first))
    properties = torch.cuda.get_device_properties(device) if cuda else None
    return Device(
        name=properties.name if properties else "cpu",
        kind=device.type,
        uuid=str(getattr(properties, "uuid", "")).removeprefix("GPU-") or None,
        products=made,
        wrong=wrong,
        flops=2 * size**3 / fastest,
        total=total,
        free=free,
        held=held,
    )


@contextmanager
def one_thread() -> Iterator[None]:
    """A core alone: several threads wait for each other, and where cores are shared for whole turns of others."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def entries(size: int, draw: torch.Generator) -> torch.Tensor:
    """[size, size] of -1, 0, 0 and 1, each as often. A sum over 4096 products of them has the standard deviation 32,
    and bf16 holds whole numbers up to 256.
    """
    first, second = (torch.randint(0, 2, (size, size), generator=draw, dtype=torch.int8) for _ in range(2))
    return first - second


def ask_smi() -> Smi | None:
    """What nvidia-smi says; None where there is none, or it says nothing of use."""
    if shutil.which("nvidia-smi") is None:
        return None
    fields = list(SMI_FIELDS)
    text = _smi(f"--query-gpu={','.join(fields)}")
    while (unknown := UNKNOWN_FIELD.search(text)) and unknown[1] in fields:
        fields.remove(unknown[1])
        text = _smi(f"--query-gpu={','.join(fields)}")
    rows = _smi(f"--query-remapped-rows={','.join(ROW_FIELDS)}")
    found = Smi(gpus=parse_smi(text, fields), lost=[line.strip() for line in LOST.findall(text)])
    for uuid, values in parse_smi(rows, ROW_FIELDS).items():
        found.gpus.setdefault(uuid, {}).update(values)
    return found


def parse_smi(text: str, fields: Sequence[str]) -> dict[str, dict[str, str]]:
    """Lines of `--format=csv,noheader,nounits`, the first field a UUID: what is known of each GPU. Fields that a GPU
    does not have ("[N/A]", "[Not Supported]", "[Unknown Error]") are left out, and lines of other text.
    """
    found = {}
    for line in text.splitlines():
        values = [value.strip() for value in line.split(",")]
        if len(values) == len(fields) and values[0].startswith("GPU-"):
            known = {name: value for name, value in zip(fields, values, strict=True) if is_known(value)}
            found[known.pop(fields[0]).removeprefix("GPU-")] = known
    return found


def is_known(value: str) -> bool:
    """Whether a value of nvidia-smi is one."""
    return bool(value) and value[0] != "[" and value not in ("N/A", "ERR!")


def _smi(query: str) -> str:
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=ASK_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + done.stderr


def judge_devices(devices: Mapping[int, Device], smi: Mapping[str, Smi], nodes: Sequence[str]) -> Iterator[Finding]:
    """Findings about the devices of the ranks.

    Args:
        devices: of each rank that could examine its own.
        smi: of each node where nvidia-smi answers.
        nodes: name of the node of each rank.
    """
    wrong = {
        rank: f"{one.name} computes wrongly: {one.wrong} of {one.products} matrix products have a wrong result"
        for rank, one in devices.items()
        if one.wrong
    }
    yield from findings_of(nodes, CHECK, wrong, "Have the node examined.", "bad node")
    yield from findings_of(nodes, CHECK, slow_devices(devices), SLOW_REMEDY, "bad node")
    yield from findings_of(
        nodes, CHECK, held_devices(devices), "See nvidia-smi on it: a process of somebody else holds it.", "bad node"
    )
    yield from judge_visible(devices, smi, nodes)
    for node, one in smi.items():
        ranks = {device.uuid: rank for rank, device in devices.items() if nodes[rank] == node and device.uuid}
        yield from (Finding(node, None, CHECK, f"{line}. Have the node examined.", "note") for line in one.lost)
        for uuid, values in one.gpus.items():
            if uuid in ranks:
                yield from judge_gpu(values, node, ranks[uuid])


def slow_devices(devices: Mapping[int, Device]) -> dict[int, str]:
    """Ranks whose device is much slower than most of the same kind."""
    found = {}
    for name in {one.name for one in devices.values()}:
        same = {rank: one for rank, one in devices.items() if one.name == name}
        usual = statistics.median(one.flops for one in same.values())
        for rank, one in same.items():
            if one.flops * SLOWER[one.kind] < usual:
                found[rank] = (
                    f"{name} multiplies matrices at {one.flops / 1e12:.3g} TFLOP/s, "
                    f"{usual / one.flops:.1f} times slower than most ({usual / 1e12:.3g})"
                )
    return found


def held_devices(devices: Mapping[int, Device]) -> dict[int, str]:
    """Ranks on whose GPU others hold memory: this process's context takes about the same on all."""
    held = {rank: one.held for rank, one in devices.items() if one.held is not None}
    usual = statistics.median(held.values()) if len(held) > 1 else 0
    return {
        rank: f"{size / GIB:.1f} GiB of the GPU's memory are in use before anything begins"
        for rank, size in held.items()
        if size > usual + HELD
    }


def judge_visible(devices: Mapping[int, Device], smi: Mapping[str, Smi], nodes: Sequence[str]) -> Iterator[Finding]:
    """GPUs that several ranks share, and GPUs that torch does not use."""
    places = Counter((nodes[rank], one.uuid) for rank, one in devices.items())
    shared = {
        rank: "several ranks have the same GPU, which NCCL refuses"
        for rank, one in devices.items()
        if one.uuid is not None and places[nodes[rank], one.uuid] > 1
    }
    yield from findings_of(nodes, CHECK, shared, "Start as many ranks per node as it has GPUs.", "stop")
    unused = {
        rank: "the node has GPUs, and torch sees none"
        for rank, one in devices.items()
        if one.kind == "cpu" and nodes[rank] in smi and smi[nodes[rank]].gpus
    }
    remedy = (
        "Install a CUDA build of torch that fits the driver, and ask Slurm for GPUs; `dist-train doctor` tells more."
    )
    yield from findings_of(nodes, CHECK, unused, remedy, severity_of({nodes[rank] for rank in unused}, nodes))


def judge_gpu(values: Mapping[str, str], node: str, rank: int) -> Iterator[Finding]:
    """Findings about what nvidia-smi says of a rank's GPU."""

    def finding(problem: str, remedy: str, *, bad: bool = False) -> Finding:
        return Finding(node, rank, CHECK, f"{problem}. {remedy}", "bad node" if bad else "note")

    def says(field: str) -> bool:
        value = values.get(field, "0")
        return value in ("Yes", "Active") or (value.isdecimal() and int(value) > 0)

    if says("remapped_rows.failure"):
        yield finding("a row of the GPU's memory could not be remapped", "Have the GPU exchanged.", bad=True)
    # The driver contains what it knows of, and leaves the place out (NVML, nvmlDeviceGetRemappedRows).
    if says("remapped_rows.pending") or says("retired_pages.pending"):
        yield finding("the GPU's memory waits for a repair that only a reset carries out", "Have the GPU reset.")
    if says("ecc.errors.uncorrected.volatile.total"):
        count = values["ecc.errors.uncorrected.volatile.total"]
        yield finding(
            f"{count} uncorrected errors of the GPU's memory since the driver was loaded", "Have the GPU reset."
        )
    if says("clocks_throttle_reasons.hw_thermal_slowdown"):
        heat = values.get("temperature.gpu", "?")
        yield finding(f"the GPU is slowed down because it is too hot ({heat} °C)", "Have its cooling examined.")
    if says("clocks_throttle_reasons.hw_power_brake_slowdown"):
        yield finding("the GPU is slowed down by its power supply", "Have the node's power supply examined.")
