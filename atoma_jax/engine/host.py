"""What this machine is: free memory, instructions; and what its C library does with memory. Imports no JAX."""

import ctypes
import os
from pathlib import Path
from typing import Final

# Of glibc's malloc.h: a number of pieces that have mappings of their own; how much free memory at the heap's end is
# given back; how much more than is asked for the heap grows by.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_KEEPING: Final = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 64 << 20))


def keep_freed_memory() -> None:
    """Has the process keep memory that it frees, for its next step.

    XLA:CPU asks for a program's temporary memory in every call. From some megabytes on glibc would have the system map
    it anew, page by page and cleared, which takes longer than computing in it. Without effect for other C libraries.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return
    for option, value in _KEEPING:
        mallopt(option, value)


def free_host_bytes() -> int:
    """Bytes of memory that this machine can give without swapping; page cache counts as free."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def cpu_multiplies_bfloat16() -> bool:
    """Whether the processor has bfloat16 matrix tiles (AMX), with which XLA's products are two to three times as fast.

    AVX-512's bfloat16 dot products alone are not enough: XLA is slower with them than with float32 at few rows.
    """
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return False
    flags = next((line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")), "")
    return "amx_bf16" in flags.split()
