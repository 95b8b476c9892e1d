"""Run a command as the root of its own tree: what it leaves behind becomes this process's child.

    python cluster_reaper.py COMMAND ...

Stands in for a node's process 1 where a node has no process namespace of its own: slurmstepd and what it starts
detach themselves from slurmd, and are still found below this process when the node is to crash. Linux's
"child subreaper", see prctl(2).
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

PR_SET_CHILD_SUBREAPER = 36

if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
    sys.exit(f"prctl: {os.strerror(ctypes.get_errno())}")
subprocess.Popen(sys.argv[1:])
while True:  # until no child is left
    try:
        os.wait()
    except ChildProcessError:
        break
