"""Fixtures for tests against a real Slurm: `cluster`, `idle_cluster` and `cluster_without_accounting`."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.slurm import cluster_install
from tests.slurm.cluster_lifecycle import Cluster
from tests.slurm.cluster_settings import VARIABLE, NotInThisMode, Settings
from tests.slurm.runs import SubmittedRun, write_tiny


def pytest_configure() -> None:
    # Debian keeps the daemons where ordinary users do not look
    os.environ["PATH"] = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))


def pytest_collection_modifyitems(items: Iterable[pytest.Item]) -> None:
    """Tests marked `slurm` are skipped, and said to be, where Slurm is not installed."""
    missing = cluster_install.missing()
    if not missing:
        return
    reason = f"{', '.join(missing)} not found; `python -m tests.slurm.cluster install` gets them"
    for item in items:
        if item.get_closest_marker("slurm"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failed test shows the last lines of the cluster's logs."""
    report = yield
    for name, found in getattr(item, "funcargs", {}).items():
        if report.failed and name != "idle_cluster" and isinstance(found, Cluster):
            daemons = ("slurmctld", "slurmdbd", *found.nodes)
            report.sections.append((f"logs of {name}", "\n".join(map(found.processes.tail, daemons))))
    return report


class LabCluster(Cluster):
    """A cluster as tests see it: what this machine cannot do is skipped."""

    def cut(self, node: str) -> None:
        try:
            super().cut(node)
        except NotInThisMode as error:
            pytest.skip(str(error))


@contextmanager
def owned(directory: Path) -> Iterator[bool]:
    """Whether this process owns the lab directory from now on: no other one has its lock, which ends with its owner."""
    with (directory / "owner").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def labs() -> Path:
    """Where the clusters of this checkout's test runs are."""
    usual = Settings.from_environment().directory
    folder = usual.with_name(f"{usual.name}-tests")
    folder.mkdir(mode=0o755, exist_ok=True)
    return folder


def take_down_leftovers() -> None:
    """Clusters of test runs that were killed before they could take their own down."""
    for directory in labs().glob("*"):
        settings = Settings.load(directory)
        if settings is not None:
            with owned(directory) as left_over:
                if left_over:
                    Cluster(settings).down()
                    shutil.rmtree(directory)


def started(**settings: object) -> Iterator[LabCluster]:
    take_down_leftovers()
    directory = Path(tempfile.mkdtemp(dir=labs()))
    directory.chmod(0o755)
    with owned(directory):
        cluster = LabCluster(Settings.from_environment(directory=directory, **settings))
        cluster.up()
        yield cluster
        cluster.down()
        shutil.rmtree(directory)


@pytest.fixture(scope="session")
def cluster() -> Iterator[LabCluster]:
    """A real Slurm of two nodes: the one of `cluster run` or `cluster env`, else one that lasts as long as the tests.

    For each test that asks for it, SLURM_CONF is set in os.environ.
    """
    given = os.environ.get(VARIABLE + "DIRECTORY")
    if given and os.environ.get("SLURM_CONF") == str(Path(given) / "etc/slurm.conf"):
        settings = Settings.load(Path(given))
        if settings is not None:
            yield LabCluster(settings)
            return
    yield from started()


@pytest.fixture(scope="session")
def cluster_without_accounting() -> Iterator[LabCluster]:
    """A Slurm of one node where sacct refuses; SLURM_CONF is set for each test that asks for it."""
    yield from started(nodes=1, accounting="none")


@pytest.fixture
def idle_cluster(cluster: LabCluster) -> LabCluster:
    """The cluster, cleaned of what earlier tests left: all nodes run and are idle, no job is left."""
    cluster.clean()
    return cluster


class Undisturbed(NamedTuple):
    """A run on two nodes that nobody disturbs: its recipe, and what it ends with."""

    recipe: Path
    result: dict[str, Any]


@pytest.fixture(scope="module")
def undisturbed(cluster: LabCluster, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """Made once for each file of tests, on a cluster cleaned of what the file before it left."""
    cluster.clean()
    folder = tmp_path_factory.mktemp("undisturbed")
    recipe = write_tiny(folder)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in cluster.settings.environment.items():
            patch.setenv(name, value)
        run = SubmittedRun(recipe, folder / "run")
        found = run.result()
    assert [(attempt.nodes, attempt.ranks) for attempt in run.attempts] == [(["node1", "node2"], 2)]
    return Undisturbed(recipe, found)


@pytest.fixture(autouse=True)
def slurm_environment(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """SLURM_CONF for the tests that asked for a cluster, and nothing of a Slurm job that the tests may run in."""
    for name in ("cluster", "cluster_without_accounting"):
        if name in request.fixturenames:
            found: Cluster = request.getfixturevalue(name)
            for variable in list(os.environ):
                if variable.startswith(("SLURM_", "SBATCH_", "SRUN_", "SALLOC_")):
                    monkeypatch.delenv(variable)
            for variable, value in found.settings.environment.items():
                monkeypatch.setenv(variable, value)
            return
