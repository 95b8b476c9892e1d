"""The commands that submit, and their options. Code is imported when a command is called."""

# ruff: noqa: PLC0415

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from sharding.errors import UserError

OtherBaseOption = Annotated[
    bool, typer.Option("--accept-other-base", help="Take a checkpoint although the frozen weights are others now.")
]
HardwareOption = Annotated[
    str | None, typer.Option(help="GPUs, for the planner: h100, h200, a100, cpu, or a YAML file.")
]
ClusterOption = Annotated[str, typer.Option(help="slurm, or local: in the background on this machine.")]
# Arguments of `slurm.settings.load_settings`: a launch file, and what goes before its keys.
LAUNCH_OPTIONS: dict[str, Any] = {
    "launch": Annotated[Path | None, typer.Option(help="Launch file, e.g. recipes/slurm/2_nodes.yaml.")],
    "nodes": Annotated[str | None, typer.Option(help="Nodes, or a range such as 2-4.")],
    "gpus_per_node": Annotated[int | None, typer.Option(min=0, help="One rank each. 0: a CPU partition.")],
    "ranks_per_node": Annotated[int | None, typer.Option(min=1, help="Default: one per GPU.")],
    "cpus_per_rank": Annotated[int | None, typer.Option(min=1, help="CPU cores of each rank. Default: 4.")],
    "memory": Annotated[str | None, typer.Option(help="Of each node, e.g. 200G; 0: all.")],
    "time": Annotated[str | None, typer.Option(help="Limit of one attempt, e.g. 08:00:00; a longer run goes on.")],
    "partition": Annotated[str | None, typer.Option()],
    "account": Annotated[str | None, typer.Option()],
    "qos": Annotated[str | None, typer.Option()],
    "constraint": Annotated[str | None, typer.Option(help="Features that nodes must have.")],
    "exclude": Annotated[str | None, typer.Option(help="Nodes not to use, e.g. gpu[03-04].")],
    "reservation": Annotated[str | None, typer.Option()],
    "exclusive": Annotated[bool | None, typer.Option("--exclusive", help="Whole nodes.")],
    "preflight": Annotated[bool | None, typer.Option(help="Look at every node first. Default: yes.")],
}


def with_launch_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command of typer these options in place of its parameter `options`, which holds their values by name."""
    own = inspect.signature(command, eval_str=True).parameters
    parameters = []
    for name, parameter in own.items():
        if name == "options":
            kind = inspect.Parameter.KEYWORD_ONLY
            parameters += [
                inspect.Parameter(key, kind, default=None, annotation=option) for key, option in LAUNCH_OPTIONS.items()
            ]
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    @functools.wraps(command)
    def called(**given: Any) -> None:
        options = {key: given.pop(key) for key in LAUNCH_OPTIONS}
        command(**given, options=options)

    called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what typer reads
    return called


def add_to(app: typer.Typer) -> None:
    """Adds the commands of this file."""
    app.command()(submit)
    app.command()(sweep)


@with_launch_options
def submit(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe, e.g. recipes/mosei/joint_7b_lora.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Recipe overrides.")] = None,
    *,
    output: Annotated[Path, typer.Option(help="Run directory to make, on a disk that all nodes share.")],
    options: dict[str, Any],
    hardware: HardwareOption = None,
    cluster: ClusterOption = "slurm",
    then: Annotated[
        list[str] | None,
        typer.Option(
            metavar="COMMAND",
            help="What follows if all went well, e.g. evaluate, or 'convert --to huggingface'; {run} is the run "
            "directory. Again for what comes after it.",
        ),
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Until all is over; the exit code is the run's.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, print the batch script, queue nothing.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --output.")] = False,
    accept_other_base: OtherBaseOption = False,
) -> None:
    """Check a run, freeze code and recipe, and submit it to Slurm; it survives time limits, preemption and failures."""
    from slurm.settings import load_settings

    settings = load_settings(**options)
    from slurm.submit import Request, cluster_named, submit_run, tell
    from slurm.wait import wait_for

    request = Request(
        recipe,
        overrides or [],
        output,
        settings,
        cluster=cluster_named(cluster),
        hardware=hardware,
        resume=resume,
        accept_other_base=accept_other_base,
        then=then or [],
    )
    say = speaker(dry_run)
    submission = submit_run(request, say, dry_run=dry_run)
    if submission is not None:
        tell(submission, request, say)
        if wait:
            raise SystemExit(wait_for(request.run, say))


@with_launch_options
def sweep(
    grid: Annotated[
        Path | None, typer.Argument(metavar="[GRID]", help="Grid file, e.g. recipes/sweeps/learning_rate.yaml.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Recipe overrides of all points.")
    ] = None,
    *,
    output: Annotated[Path | None, typer.Option(help="Directory to make; each point is a run directory in it.")] = None,
    options: dict[str, Any],
    hardware: HardwareOption = None,
    cluster: ClusterOption = "slurm",
    parallel: Annotated[
        int | None, typer.Option(min=1, help="At once: on Slurm points of an array, with --cluster local ranks.")
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Queue it and return; do not follow it.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, print points and scripts, queue nothing.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Run what is not finished of the sweep in --output.")
    ] = False,
    status: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Look at a sweep, and write its table anew.")
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="With --status: until all is over.")] = False,
) -> None:
    """Train every point of a grid, as a Slurm job array or a few at once on this machine; one table of the results."""
    if (status is None) == (grid is None) or (status is None) == (output is None):
        raise UserError("sweep", "takes a grid file and --output, or --status", "Write GRID --output DIR.")
    say = speaker(dry_run)
    if status is not None:
        from slurm.sweep_command import look_at

        raise SystemExit(look_at(status, say, watch=watch))
    from slurm.settings import load_settings

    settings = load_settings(**options)
    from slurm.submit import cluster_named
    from slurm.sweep import SweepRequest
    from slurm.sweep_command import start

    assert grid is not None and output is not None
    request = SweepRequest(
        grid,
        overrides or [],
        output,
        settings,
        cluster=cluster_named(cluster),
        hardware=hardware,
        parallel=parallel,
        resume=resume,
    )
    raise SystemExit(start(request, say, dry_run=dry_run, detach=detach))


def speaker(aside: bool) -> Callable[[str], None]:
    """Prints a line as it is, on stderr if `aside`."""
    from rich.console import Console

    console = Console(stderr=aside)
    return lambda text: console.print(text, soft_wrap=True, markup=False, highlight=False)
