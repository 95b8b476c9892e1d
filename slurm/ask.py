"""Slurm's own commands, asked with a bound on time."""

from __future__ import annotations

import os
import subprocess


def ask(command: list[str], timeout: float) -> tuple[bool, str]:
    """Run `command`; return (it succeeded in time, stdout or the last line of what it complained about)."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "LC_ALL": "C"},
        )
    except subprocess.TimeoutExpired:
        return False, f"no answer within {timeout:g} s"
    except FileNotFoundError:
        return False, "not found on PATH"
    except OSError as error:
        return False, str(error)
    if done.returncode == 0:
        return True, done.stdout.strip()
    complaint = (done.stderr.strip() or done.stdout.strip()).splitlines()
    return False, complaint[-1] if complaint else f"exit code {done.returncode}"
