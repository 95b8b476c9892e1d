"""`dist-train`: a thin dispatcher that imports a command's code when the command is called."""

# ruff: noqa: PLC0415

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from dist_train import launch_commands
from dist_train.launch_commands import OtherBaseOption
from dist_train.shard_commands import shards
from sharding.errors import UserError, UserErrors

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False, help=__doc__)
app.add_typer(shards, name="shards")

RunArgument = Annotated[Path, typer.Argument(metavar="DIR", help="Run directory (the --output of train).")]
RanksOption = Annotated[int | None, typer.Option(min=1, help="Local ranks to start. Default: one per GPU, or one.")]
# What a place says that is full, not ours, out of order, or cannot exist.
REFUSED = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.EIO, errno.ESTALE, errno.ENAMETOOLONG),
)
REMEDY = "Free space or name another place; what was saved before is whole."


def known_format(name: str) -> str:
    """Refuses a format that convert does not write, as soon as the command line is read."""
    from tools.convert.formats import by_name

    return by_name(name).name if name else name  # nothing, while a command line is only looked at


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe, e.g. recipes/quickstart.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Recipe overrides.")] = None,
    output: Annotated[Path, typer.Option(help="Run directory to make.")] = ...,  # type: ignore[assignment]
    ranks: RanksOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --output.")] = False,
    accept_other_base: OtherBaseOption = False,
) -> None:
    """Train. Inside torchrun or srun this process joins that world; alone it starts local ranks."""
    from dist_train.run_directory import RunDirectory
    from dist_train.world_size import foresee
    from sharding.launch import launched, run_local
    from sharding.world import read_world

    run = RunDirectory(output)
    world = read_world(os.environ)
    if world is not None:
        from sharding.ops import prepare_ops

        prepare_ops(print if world.rank == 0 else lambda text: None)  # before anything imports DeepSpeed
        from dist_train.rank import end, run_training

        end(
            run_training(
                world,
                recipe,
                overrides or [],
                run,
                fresh=not launched(),
                resume=resume,
                accept_other_base=accept_other_base,
            )
        )
    ranks = ranks or default_ranks()
    foresee(recipe, overrides or [], ranks)
    if resume:
        run.open()
    else:
        run.create()
    try:
        raise SystemExit(run_local(again(), ranks, run.logs))
    finally:
        run.discard_unstarted()


launch_commands.add_to(app)


@app.command()
def preflight(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe that is to be trained.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Recipe overrides.")] = None,
    output: Annotated[Path, typer.Option(help="Run directory, new or not.")] = ...,  # type: ignore[assignment]
    ranks: RanksOption = None,
) -> None:
    """Examine the nodes, network, disks and shards of a training before it; inside torchrun or srun those of all ranks.

    Writes slurm/preflight.json in the run directory.
    """
    from dist_train.run_directory import RunDirectory
    from dist_train.world_size import foresee
    from sharding.launch import run_local
    from sharding.world import read_world

    run = RunDirectory(output)
    world = read_world(os.environ)
    if world is not None:
        from sharding.ops import choose_accelerator

        choose_accelerator()
        from dist_train.rank import end
        from slurm.preflight.rank import run_preflight

        end(run_preflight(world, recipe, overrides or [], run))
    ranks = ranks or default_ranks()
    foresee(recipe, overrides or [], ranks)
    if output.exists() and not output.is_dir():
        raise UserError(str(output), "is not a directory", "Give another --output.")
    raise SystemExit(run_local(again(), ranks, run.path / "slurm" / "logs"))


@app.command()
def evaluate(
    directory: RunArgument,
    checkpoint: Annotated[str, typer.Option(help="best, last, or the path of a checkpoint.")] = "best",
    split: Annotated[str, typer.Option(help="train, valid or test.")] = "test",
    ranks: RanksOption = None,
    robustness: Annotated[
        bool, typer.Option("--robustness", help="With modalities missing (all patterns, all rates) and noisy instead.")
    ] = False,
    text_from: Annotated[
        str | None, typer.Option(metavar="FIELD", help="Read KEY.json's FIELD, say of a recogniser, as the transcript.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    accept_other_base: OtherBaseOption = False,
) -> None:
    """Evaluate a checkpoint on a split: both flows, gap and floors; predictions are written to the run directory."""
    from dist_train.run_directory import RunDirectory
    from sharding.launch import run_local
    from sharding.world import read_world

    run = RunDirectory(directory)
    world = read_world(os.environ)
    if robustness and text_from is not None:
        raise UserError("--text-from", "does not go with --robustness", "Leave one of them out.")
    if world is not None:
        from sharding.ops import choose_accelerator

        choose_accelerator()
        from dist_train.rank import end, run_evaluation

        code = run_evaluation(
            world,
            run,
            checkpoint,
            split,
            as_json=as_json,
            accept_other_base=accept_other_base,
            robustness=robustness,
            text_from=text_from,
        )
        end(code)
    run.open()
    raise SystemExit(run_local(again(), ranks or default_ranks(), run.logs))


@app.command()
def recipe(
    path: Annotated[Path | None, typer.Argument(metavar="[RECIPE]", help="Recipe to check and print resolved.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Recipe overrides.")] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of recipes.")] = False,
) -> None:
    """Check a recipe and print it with all defaults, or print the schema."""
    import json

    import yaml

    from dist_train.recipe import Recipe, load_recipe

    if schema:
        print(json.dumps(Recipe.model_json_schema(), indent=1))
    elif path is None:
        raise UserError("recipe", "no recipe is given", "Write dist-train recipe RECIPE, or --schema.")
    else:
        print(yaml.safe_dump(load_recipe(path, overrides or []).model_dump(mode="json"), sort_keys=False))


@app.command()
def plan(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe, e.g. recipes/mosei/joint_7b_lora.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Recipe overrides.")] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs per node.")] = 8,
    gpu_memory: Annotated[str | None, typer.Option(help="Of a GPU, e.g. 80GiB. Default: the profile's.")] = None,
    hardware: Annotated[str, typer.Option(help="h100, h200, a100, cpu, or a YAML profile.")] = "h100",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    output: Annotated[Path | None, typer.Option(help="JSON file to write; with --scale, a figure beside it.")] = None,
    scale: Annotated[
        str | None, typer.Option(metavar="A..B", help="Weak and strong scaling over A to B GPUs, e.g. 8..512.")
    ] = None,
) -> None:
    """Foretell memory, traffic and time of a recipe before anything is allocated, and say which settings fit best."""
    from rich.console import Console

    from dist_train.plan_search import make_plan
    from dist_train.plan_table import plan_table
    from dist_train.recipe import load_recipe
    from sharding.hardware import load_hardware, read_bytes

    if output is not None and (output.is_dir() or not os.access(output.parent, os.W_OK)):  # told before it takes long
        raise UserError(str(output), "cannot be written", "Name a file in a directory you may write to.")
    profile = load_hardware(hardware)
    if gpu_memory is not None:
        profile = profile.model_copy(update={"memory": read_bytes(gpu_memory, "--gpu-memory")})
    settings = load_recipe(recipe, overrides or [])
    if scale is not None:
        from dist_train.scaling_curve import curve_table, write_curve
        from dist_train.scaling_model import model_scaling, read_scale

        if nodes != 1:
            raise UserError("--nodes", "has no meaning with --scale", "Write --scale A..B and --gpus-per-node.")
        curve = model_scaling(settings, profile, read_scale(scale, gpus_per_node), gpus_per_node)
        if output is not None:
            write_curve(curve, output)
        if as_json:
            print(curve.model_dump_json(indent=1))
        else:
            Console().print(curve_table(curve))
        return
    made = make_plan(settings, profile, nodes, gpus_per_node)
    if output is not None:
        made.write(output)
    if as_json:
        print(made.model_dump_json(indent=1))
    else:
        Console().print(plan_table(made))


@app.command()
def convert(
    src: Annotated[Path, typer.Argument(metavar="SRC", help="Run directory, checkpoint, or a foreign file or folder.")],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="Folder to make.")],
    to: Annotated[
        str, typer.Option(callback=known_format, help="Format to write, e.g. huggingface; docs/conversion.md has all.")
    ],
    run: Annotated[Path | None, typer.Option(help="Run directory that tells what SRC does not.")] = None,
    base: Annotated[Path | None, typer.Option(help="Folder of the frozen model, if not the one SRC names.")] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32 or bf16. Default: the format's.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Tell what would be written; write nothing.")] = False,
) -> None:
    """Convert a checkpoint to or from other formats; the result is read again before it counts."""
    from tools.convert.command import convert as carry_out

    carry_out(src, dst, to, run=run, base=base, dtype=dtype, dry_run=dry_run)


@app.command()
def extract(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe with the models that make the features.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory of shards to make, or to go on with.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Recipe overrides.")] = None,
    ranks: RanksOption = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Run directory, or a checkpoint of it, that holds what the recipe trains.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float16 or float32, of the stored features.")] = "float16",
    samples_per_shard: Annotated[int, typer.Option(min=1, help="Clips per tar, which one rank makes in one go.")] = 256,
) -> None:
    """Extract the features of frozen models once, into shards; stopped, the same command goes on."""
    from tools.extract import extract as carry_out

    carry_out(
        recipe,
        overrides or [],
        out,
        again(),
        ranks=ranks or default_ranks(),
        checkpoint=checkpoint,
        dtype=dtype,
        samples_per_shard=samples_per_shard,
    )


@app.command()
def report(
    directories: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Run directories, or a folder of them.")],
    scaling: Annotated[bool, typer.Option("--scaling", help="Compare runs of several world sizes.")] = False,
    output: Annotated[Path | None, typer.Option(help="Of a comparison: directory. Default: the runs' folder.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Of a comparison: print JSON.")] = False,
) -> None:
    """Write report.html, one self-contained page, and the figures of each run; of several, also how they compare."""
    from rich.console import Console

    if not scaling:
        from dist_train.report import write_report

        if len(directories) == 1 and (output is not None or as_json):
            raise UserError("report", "--output and --json belong to a comparison", "Name several runs, or --scaling.")
        for directory in directories:
            written = write_report(directory)
            if not as_json:
                print(written)
        if len(directories) > 1:
            from dist_train.compare_page import comparison_table, write_comparison

            compared, page = write_comparison(directories, output)
            if as_json:
                print(compared.model_dump_json(indent=1))
            else:
                Console().print(comparison_table(compared))
                print(page)
        return
    from dist_train.scaling_page import scaling_table, write_scaling

    found, page = write_scaling(directories, output)
    if as_json:
        print(found.model_dump_json(indent=1))
    else:
        Console().print(scaling_table(found))
        print(page)


@app.command()
def status(
    directories: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Run directories; several: a line each.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, a list with an object for each run.")] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Refresh until the runs are over; Ctrl-C leaves them be.")
    ] = False,
) -> None:
    """Tell how runs are: state and why, progress, restarts, errors of the ranks, and what to do next."""
    from slurm.status_table import show

    raise SystemExit(show(directories, as_json=as_json, watch=watch))


@app.command()
def logs(
    directory: RunArgument,
    rank: Annotated[int | None, typer.Option(min=0, help="Whose output to print. Default: 0.")] = None,
    every: Annotated[bool, typer.Option("--all", help="All ranks, each line after its rank.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="Last lines of each file.")] = 40,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as it is written, over requeues.")] = False,
    only_errors: Annotated[
        bool, typer.Option("--errors", help="Reports, tracebacks and stacks of ranks alone.")
    ] = False,
) -> None:
    """Print what the ranks of a run have written."""
    from slurm.logs import show

    raise SystemExit(show(directory, rank, every=every, lines=lines, follow=follow, only_errors=only_errors))


@app.command()
def cancel(
    directory: RunArgument,
    now: Annotated[bool, typer.Option("--now", help="End it at once; what is not saved is lost.")] = False,
) -> None:
    """Cancel a submitted run and what follows it: it saves first, ends, and is not requeued."""
    from slurm.cancel import cancel as carry_out

    raise SystemExit(carry_out(directory, now=now))


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Tell what this machine can do, and what is missing for what."""
    from tools.doctor import doctor as examine

    examine(as_json=as_json)


def again() -> list[str]:
    """This command once more, for a rank."""
    return [sys.executable, "-m", "dist_train.cli", *sys.argv[1:]]


def default_ranks() -> int:
    """One per GPU, or one."""
    import torch

    return max(torch.cuda.device_count(), 1)


def main(**extra: Any) -> None:
    """Runs a command; a user's mistake becomes one line per error on stderr and exit code 2."""
    from sharding.launch import INTERRUPTED, report_errors

    try:
        app(**extra)
    except KeyboardInterrupt:  # before typer, which answers the same, has built its commands
        sys.exit(INTERRUPTED)
    except (UserError, UserErrors, OSError) as error:
        if isinstance(error, OSError):
            if error.errno not in REFUSED:
                raise
            error = UserError(error.filename or "disk", error.strerror or str(error), REMEDY)
        report_errors(error.errors if isinstance(error, UserErrors) else [error])
        sys.stdout.flush()
        os._exit(2) if "RANK" in os.environ else sys.exit(2)


if __name__ == "__main__":
    main()
