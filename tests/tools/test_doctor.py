"""The doctor finds what is there, names what is missing and what mends it, and survives anything's absence."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import tools.doctor as module
from sharding.errors import UserError
from slurm.probe import Partition, SlurmStatus
from tools import machine
from tools.doctor import Check, doctor, examine

REPOSITORY = Path(__file__).resolve().parents[2]


def found(name: str, checks: list[Check]) -> Check:
    """The one check of that name."""
    (check,) = [check for check in checks if check.name == name]
    return check


@pytest.fixture
def no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "probe", lambda: SlurmStatus(dict.fromkeys(("sbatch", "srun", "sinfo", "sacct"))))


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose nvidia-smi lists two cards, the second of them old, under a driver for CUDA 12.4."""
    script = tmp_path / "nvidia-smi"
    cards = "0, Big Card, 143771, 143000, 9.0\\n1, Old Card, 16160, [N/A], 7.0\\n"
    script.write_text(f"""#!/bin/sh\n[ $# -gt 0 ] && printf '{cards}' || echo '| Driver 550  CUDA Version: 12.4 |'\n""")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")


def fake_torch(cuda: str | None, devices: int) -> Any:
    """A torch that would raise AttributeError for anything that makes a CUDA context."""
    distributed = SimpleNamespace(
        is_available=lambda: True, is_gloo_available=lambda: True, is_nccl_available=lambda: cuda is not None
    )
    runtime = SimpleNamespace(device_count=lambda: devices, nccl=SimpleNamespace(version=lambda: (2, 27, 5)))
    return SimpleNamespace(
        __version__="2.13.0", version=SimpleNamespace(cuda=cuda), distributed=distributed, cuda=runtime
    )


def test_json_is_what_examine_finds(no_slurm: None, capsys: pytest.CaptureFixture[str]) -> None:
    doctor(as_json=True)
    answer = json.loads(capsys.readouterr().out)
    assert answer["cpu_training"] is True
    rows = {row["name"]: row for row in answer["checks"]}
    assert len(rows) == len(answer["checks"])
    assert rows["torch"]["detail"].startswith(sys.modules["torch"].__version__)
    assert {"deepspeed", "gloo", "NCCL", "flash-attn", "ninja", "libaio", "Slurm", "CPU cores", "disk"} <= set(rows)
    for row in rows.values():
        assert row["needed_for"]
        assert not (row["state"] == "found" and row["remedy"])


def test_table_says_that_training_works(no_slurm: None, capsys: pytest.CaptureFixture[str]) -> None:
    doctor(as_json=False)
    assert "Training on the CPU works here." in capsys.readouterr().out


@pytest.mark.parametrize("as_json", [True, False])
def test_bare_python_without_any_package_or_path(as_json: bool) -> None:
    code = f"""
import sys
sys.path.insert(0, {str(REPOSITORY)!r})
from sharding.errors import UserError
from tools.doctor import doctor
try:
    doctor({as_json})
except UserError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
"""
    command = [sys.executable, "-I", "-S", "-c", code]
    done = subprocess.run(
        command, capture_output=True, text=True, env={"PATH": "/nonexistent"}, timeout=60, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    for name in ("torch", "deepspeed", "transformers", "peft", "webdataset", "C++ compiler"):
        assert name in done.stderr.partition("Mend with")[0]
        assert name in done.stdout


def test_missing_compiler_blocks_and_is_named(
    no_slurm: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "beside").mkdir()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "beside" / "python"))
    with pytest.raises(UserError) as error:
        doctor(as_json=False)
    assert error.value.problem.endswith("because of: ninja, C++ compiler")
    assert "g++" in error.value.remedy
    assert "works here" not in capsys.readouterr().out
    ninja = tmp_path / "beside" / "ninja"
    ninja.write_text("#!/bin/sh\n")
    ninja.chmod(0o755)
    with pytest.raises(UserError) as error:
        doctor(as_json=True)
    assert error.value.problem.endswith("because of: C++ compiler")


def test_compiled_ops_are_looked_for_where_they_are_kept(
    no_slurm: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "new"))
    assert found("CPU communication op", examine()).state == "missing"
    (tmp_path / "new" / "deepspeed_shm_comm").mkdir(parents=True)
    (tmp_path / "new" / "deepspeed_shm_comm" / "deepspeed_shm_comm.so").touch()
    checks = examine()
    assert found("CPU communication op", checks).state == "found"
    assert found("CPU Adam op", checks).state == "missing"
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/dev/null/ops")
    check = found("CPU communication op", examine())
    assert check.state == "problem"
    assert check.blocks


@pytest.mark.parametrize(
    ("cuda", "devices", "state", "words"),
    [
        (None, 0, "problem", "CPU build"),
        ("13.0", 2, "problem", "the driver knows CUDA 12.4, torch needs 13.0"),
        ("12.8", 0, "problem", "0 of 2 visible"),
        ("12.8", 1, "found", "1 of 2 visible"),
    ],
)
@pytest.mark.usefixtures("gpu", "no_slurm")
def test_gpus(monkeypatch: pytest.MonkeyPatch, cuda: str | None, devices: int, state: str, words: str) -> None:
    torch = fake_torch(cuda, devices)
    monkeypatch.setattr(machine, "import_torch", lambda: torch)
    checks = examine()
    assert found("GPU 0", checks).detail == "Big Card, 140.4 GiB, 139.6 GiB free, bf16"
    assert found("GPU 1", checks).state == "problem"
    assert found("torch on GPU", checks).state == state
    assert words in found("torch on GPU", checks).detail
    assert found("NCCL", checks).state == ("missing" if cuda is None else "found")


def test_broken_torch_is_told_not_raised(no_slurm: None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "torch":
                raise OSError("libcudart.so.99: cannot open shared object file\nmore")

    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    check = found("torch", examine())
    assert check.detail == "cannot be imported: libcudart.so.99: cannot open shared object file"
    assert check.blocks


def test_version_outside_the_tested_range(no_slurm: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        machine, "requirements", lambda extras=False: {"peft": "peft>=999", "no-such-thing": "no-such-thing>=1"}
    )
    checks = examine()
    assert found("peft", checks).state == "problem"
    assert found("peft", checks).remedy == "pip install 'peft>=999'"
    assert not found("peft", checks).blocks
    assert found("transformers", checks).state == "found"
    assert found("other libraries", checks).detail == "no-such-thing"


@pytest.mark.parametrize("version", ["2.8.3", None])
def test_what_this_version_does_not_use_is_never_asked_for(
    no_slurm: None, monkeypatch: pytest.MonkeyPatch, version: str | None
) -> None:
    real = machine.package_version
    unused = {"submitit"}
    monkeypatch.setattr(machine, "package_version", lambda name, of=None: version if name in unused else real(name, of))
    checks = examine()
    for name in unused:
        check = found(name, checks)
        assert (check.group, check.remedy, check.blocks) == ("Not used yet", "", False)
        assert (check.state, check.detail) == (("found", version) if version else ("missing", "not installed"))


def test_only_extras_that_exist_are_named(no_slurm: None, monkeypatch: pytest.MonkeyPatch) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    monkeypatch.setattr(machine, "package_version", lambda name, of=None: None)
    text = " ".join(f"{check.needed_for} {check.remedy}" for check in examine())
    named = set(re.findall(r"extra: ([\w-]+)|dist-train\[([\w-]+)\]", text))
    assert named
    assert {a or b for a, b in named} <= set(project["optional-dependencies"])


def test_slurm_and_its_partitions(monkeypatch: pytest.MonkeyPatch) -> None:
    partition = Partition("long", True, True, "2-00:00:00", 3, ["gpu:h100:8"], {"idle": 1, "alloc": 2})
    commands: dict[str, str | None] = dict.fromkeys(("sbatch", "srun", "sinfo", "sacct"), "/usr/bin/x")
    monkeypatch.setattr(module, "probe", lambda: SlurmStatus(commands, "slurm 24.11", True, [partition], False))
    checks = examine()
    assert found("Slurm", checks).state == "found"
    assert found("partition long (default)", checks).detail == "3 nodes (1 idle, 2 alloc), gpu:h100:8, limit 2-00:00:00"
    assert found("accounting", checks).state == "missing"
    monkeypatch.setattr(module, "probe", lambda: SlurmStatus(commands, problem="controller not reachable: no answer"))
    assert found("Slurm", examine()).state == "problem"
