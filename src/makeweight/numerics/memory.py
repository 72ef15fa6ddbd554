"""The process's own memory: how much it took, and how it asks for it."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress
from pathlib import Path

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 * 2**20
"""glibc refuses more than half of its largest heap."""


def keep_freed_memory() -> None:
    """Ask glibc to reuse freed buffers instead of handing them back and fetching zeroed pages again.

    Every optimiser step frees and takes the same few megabytes per weight, which would otherwise be mapped and zeroed
    by the kernel again each time. Does nothing on other systems.
    """
    if (libc := _glibc()) is not None:
        libc.mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        libc.mallopt(_TRIM_THRESHOLD, 2**30)


def release_freed_memory() -> None:
    """Hand freed buffers back after all, where the work that follows takes others; nothing on other systems."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """Return the C library where it is glibc: only that has both of these."""
    if not sys.platform.startswith("linux"):
        return None
    with suppress(OSError, AttributeError):  # another libc
        libc = ctypes.CDLL("libc.so.6")
        return libc if libc.mallopt and libc.malloc_trim else None
    return None


def machine_memory() -> int | None:
    """Return the bytes that this machine has, or its container may take, and None where the system does not tell."""
    sizes: list[int] = []
    with suppress(OSError, ValueError, AttributeError):
        sizes.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with suppress(OSError, ValueError):  # "max" where there is no limit
        sizes.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(sizes, default=None)


def reset_peak_memory() -> None:
    """Start counting `peak_memory` anew, where the system can (Linux); elsewhere it counts from the process's start."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Return the largest resident size of this process in bytes, since the last reset; 0 where nobody tells."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
