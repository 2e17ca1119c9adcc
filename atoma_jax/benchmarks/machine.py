"""Where a number was measured: versions, device, processor, date; and how much memory the process took. For Linux."""

import datetime
import os
import platform
import resource
from pathlib import Path
from typing import Any

from atoma_jax import __version__


def describe_machine() -> dict[str, Any]:
    """Keys of a benchmark's JSON object that name the software, the device and the time. Starts JAX's backend."""
    import jax

    device = jax.devices()[0]
    return {
        "versions": {
            "atoma_jax": __version__,
            "jax": jax.__version__,
            "python": platform.python_version(),
        },
        "platform": device.platform,
        "device": device.device_kind,
        "num_devices": jax.device_count(),
        **describe_host(),
    }


def describe_host() -> dict[str, Any]:
    """Processor, the cores that this process may use, load and date."""
    return {
        "cpu": _cpu_model(),
        "cpu_cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def peak_rss_bytes() -> int:
    """The most memory that this process has ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.machine()
