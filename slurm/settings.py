"""Where and how a run is launched on a cluster: a YAML file of its own beside the recipe, and options of `submit`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from sharding.errors import UserError, UserErrors
from sharding.files import MOST_YAML, read_bounded
from sharding.plain_yaml import check_yaml

EXAMPLE = "See recipes/slurm/2_nodes.yaml for a launch file."


def node_range(text: str) -> str:
    """A number of nodes, or a range such as 2-4."""
    match = re.fullmatch(r"([1-9]\d{0,5})(?:-([1-9]\d{0,5}))?", text)
    if match is None or (match[2] is not None and int(match[2]) < int(match[1])):
        raise ValueError("write a number of nodes such as 2, or a range from small to large such as 2-4")
    return text


def time_limit(text: str) -> str:
    """A time limit as Slurm writes it."""
    if minutes(text) is None:
        raise ValueError("write minutes, [HH:]MM:SS or D-HH[:MM[:SS]], e.g. 08:00:00 or 2-00:00:00")
    return text


def minutes(text: str) -> float | None:
    """Slurm's time format in minutes; None if it is none."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if match is None:
        return None
    days, *parts = match.groups()
    given = [int(part) for part in parts if part is not None]
    if days is not None:  # D-HH[:MM[:SS]]
        hours, mins, secs = (*given, 0, 0)[:3]
    elif len(given) == 1:
        hours, mins, secs = 0, given[0], 0
    elif len(given) == 2:
        hours, mins, secs = 0, *given
    else:
        hours, mins, secs = given
    total = int(days or 0) * 1440 + hours * 60 + mins + secs / 60
    return total or None


class LaunchSettings(BaseModel):
    """What Slurm is asked for, and what happens when a job is stopped or fails. An option of `dist-train submit` goes
    before the key of the same name.
    """

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, coerce_numbers_to_str=True)

    nodes: Annotated[str, AfterValidator(node_range)] = "1"
    """Nodes, or a range such as 2-4: after a requeue the job takes what is free, with the same global batch."""
    gpus_per_node: NonNegativeInt = 1
    """GPUs of each node, with one rank each. 0: a CPU partition, with `ranks_per_node` ranks."""
    ranks_per_node: PositiveInt | None = None
    """Ranks of each node. Default: one per GPU."""
    cpus_per_rank: PositiveInt = 4
    """CPU cores of each rank, for it and its data workers."""
    memory: str | None = None
    """Main memory of each node, e.g. 200G; 0: all of it. Default: the partition's."""
    time: Annotated[str, AfterValidator(time_limit)] = "04:00:00"
    """Time limit of one attempt. A run that needs longer saves, is requeued and goes on."""
    partition: str | None = None
    """Default: the cluster's."""
    account: str | None = None
    """Which account pays."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features that nodes must have, e.g. a100&ib."""
    exclude: str | None = None
    """Nodes not to use, e.g. gpu[03-04]. Nodes that preflight or repeated failures find bad are added on requeue."""
    reservation: str | None = None
    """Name of a reservation."""
    exclusive: bool = False
    """Whole nodes. Wise from two nodes on: a neighbour's traffic slows every step of all ranks."""
    sbatch: dict[str, str | bool] = Field(default_factory=dict)
    """Further options of sbatch by their long names, e.g. {switches: "1@30:00", comment: thesis}."""
    srun: list[str] = Field(default_factory=list)
    """Further arguments of srun, e.g. --container-image=/shared/train.sqsh, --container-mounts=/data:/data."""
    setup: list[str] = Field(default_factory=list)
    """Lines of the batch script before srun, e.g. module load cuda/12.8."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Environment variables of all ranks, e.g. {NCCL_SOCKET_IFNAME: ib0}."""
    signal_seconds: PositiveInt = 180
    """Before the time limit ends, seconds left for saving: twice the time of a checkpoint, and a minute, since Slurm
    may send the signal a minute early or late."""
    max_restarts: NonNegativeInt = 20
    """Failures after which the run is given up. Time limits, preemptions and requeues by hand are no failures."""
    same_failures: PositiveInt = 3
    """Attempts in a row that end at the same step with the same error, after which the run is given up."""
    preflight: bool = True
    """Look at every node before the first step."""

    @property
    def ranks(self) -> int:
        """Ranks of each node."""
        return self.ranks_per_node or max(self.gpus_per_node, 1)

    @property
    def node_counts(self) -> tuple[int, int]:
        """Fewest and most nodes."""
        low, _, high = self.nodes.partition("-")
        return int(low), int(high or low)

    @property
    def minutes(self) -> float:
        """Time limit of one attempt in minutes."""
        return minutes(self.time) or 0.0


def load_settings(launch: Path | None = None, **options: Any) -> LaunchSettings:
    """Reads a launch file, if one is given; options that are not None go before its keys.

    Raises:
        UserError: the file cannot be read as YAML.
        UserErrors: each key that is wrong.
    """
    values: Any = {}
    if launch is not None:
        try:
            text = read_bounded(launch, MOST_YAML, EXAMPLE).decode()
            check_yaml(text)
            values = yaml.safe_load(text) or {}
        except OSError as error:
            raise UserError(str(launch), f"cannot be read ({error.strerror})", EXAMPLE) from None
        except (yaml.YAMLError, ValueError) as error:
            raise UserError(str(launch), f"is not YAML ({' '.join(str(error).split())})", EXAMPLE) from None
        if not isinstance(values, dict):
            raise UserError(str(launch), "is not a mapping of keys to values", EXAMPLE)
    given = {key: value for key, value in options.items() if value is not None}
    try:
        return LaunchSettings.model_validate({**values, **given})
    except ValidationError as error:
        raise UserErrors([told(found, given, launch) for found in error.errors()]) from None


def told(found: Any, options: dict[str, Any], path: Path | None) -> UserError:
    """One of pydantic's findings, in the user's terms."""
    key = ".".join(map(str, found["loc"]))
    option = f"--{key.replace('_', '-')}"
    where = option if key in options else f"{path}: {key}"
    if found["type"] == "extra_forbidden":
        return UserError(where, "is no key of a launch file", f"Known: {', '.join(LaunchSettings.model_fields)}.")
    message = found["msg"].removeprefix("Value error, ")
    return UserError(where, f"is {found['input']!r}: {message}", EXAMPLE if where != option else "Correct the option.")
