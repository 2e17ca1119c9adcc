"""What this machine is: free memory, instructions. Imports no JAX."""

import os
from pathlib import Path


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
