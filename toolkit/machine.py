"""What this machine can give: processors and disk space, as this process may use them."""

from __future__ import annotations

import contextlib
import errno
import functools
import math
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from toolkit.errors import DiskFullError, StorageError


def usable_cpus() -> int:
    """Processors this process may use: affinity and the cgroup's quota, whichever is less."""
    try:
        n = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows have no affinity call
        n = os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            n = min(n, max(1, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):
        pass  # no cgroup v2 here: affinity alone decides
    return n


def has_accelerator() -> bool:
    """Whether torch could find an accelerator here; it is not loaded to ask it."""
    if sys.platform == "linux":
        return any(Path(node).exists() for node in ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd"))
    if sys.platform == "win32":
        root = os.environ.get("SYSTEMROOT", r"C:\Windows")
        return (Path(root) / "System32" / "nvcuda.dll").exists()
    # Apple's own processors have one.
    return platform.machine() == "arm64"


def n_gpus() -> int:
    """GPUs of NVIDIA that this process may use; torch is not loaded to count them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return _n_listed_gpus()
    return len([name for name in visible.split(",") if name.strip() not in ("", "-1")])


@functools.cache
def _n_listed_gpus() -> int:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return 0
    try:
        listed = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return 0  # a driver that does not answer will not embed either
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def free_bytes(path: Path) -> int:
    """Free bytes of the disk that holds ``path``, or would hold it once it is made."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


@contextlib.contextmanager
def mapped_write(path: Path, n_bytes: int = 0) -> Iterator[None]:
    """Turn what the system says of a write into this package's errors.

    Args:
        path: What is written.
        n_bytes: About how much, 0 when unknown.

    Raises:
        DiskFullError: If there is no space, or no quota.
        StorageError: If the write is refused for another reason.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(str(path), n_bytes, free_bytes(path.parent)) from error
        raise StorageError(f"cannot write {path}: {error.strerror}") from error
