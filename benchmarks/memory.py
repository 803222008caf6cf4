"""Peak memory of a call, and how the C library gives freed memory back."""

from __future__ import annotations

import ctypes
import re
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def keep_freed_memory() -> None:
    """Have glibc reuse freed blocks of any size, so that nobody's temporaries pay for page faults in each call.

    Unset, code with many large temporaries (the textbook formula) looks several times slower than it is.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def return_freed_memory() -> None:
    """Have glibc give freed blocks back to the system at once, so that the resident memory is what is in use.

    To be called before `keep_freed_memory`, if at all: blocks kept once stay where they are.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_THRESHOLD, 128 << 10)
        libc.mallopt(M_TRIM_THRESHOLD, 128 << 10)
        libc.malloc_trim(0)


def peak_bytes(call: Callable[[], Any], device: str = "cpu") -> int | None:
    """Most memory in use during a call beyond what was in use before it; None where the system cannot tell.

    On a GPU that of torch's allocator. On the CPU that of the whole process, as Linux counts resident pages: it
    includes what no allocator of torch knows of. What is measured right should have run once before.
    """
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if sys.platform != "linux":
        return None
    return_freed_memory()
    try:
        CLEAR_REFS.write_text("5")  # the high-water mark starts anew
        before = _kilobytes("VmRSS")
    except OSError:  # not in every container
        return None
    call()
    return max(_kilobytes("VmHWM") - before, 0) * 1024


def available_bytes() -> int:
    """Memory that a process can have without anybody being swapped out or killed."""
    return _kilobytes("MemAvailable", Path("/proc/meminfo")) * 1024


def limit_memory(share: float) -> int:
    """Limit this process to `share` of the memory available now; beyond it an allocation raises. Returns the bytes.

    Without it Linux kills a process, any process, when memory runs out.
    """
    limit = int(share * available_bytes())
    in_use = _kilobytes("VmSize") * 1024
    resource.setrlimit(resource.RLIMIT_AS, (in_use + limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
    return limit


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on a GPU or on the CPU."""
    text = str(error).lower()
    said = "can't allocate memory", "not enough memory", "bad_alloc", "out of memory", "cannot allocate memory"
    return isinstance(error, torch.cuda.OutOfMemoryError | MemoryError) or any(words in text for words in said)


def _kilobytes(field: str, file: Path = STATUS) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB", file.read_text(), re.MULTILINE)
    if match is None:
        raise OSError(f"{file} has no {field}")
    return int(match[1])
