"""How many cores this process may use: the one rule, for threads that read files and for those that compute."""

import math
import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """Cores that this process may run on, or as many as its group's share of processor time comes to, rounded up."""
    allowed = len(os.sched_getaffinity(0))
    quota = _quota(_CGROUP)
    return allowed if quota is None else max(1, min(allowed, math.ceil(quota)))


def _quota(root: Path) -> float | None:
    """Cores' worth of time that a container's control group (version 2, then 1) grants; None: no limit is known."""
    try:
        limit, period = (root / "cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        try:
            limit = (root / "cpu" / "cpu.cfs_quota_us").read_text(encoding="ascii").strip()
            period = (root / "cpu" / "cpu.cfs_period_us").read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            return None
    if not limit.isdigit() or not period.isdigit() or int(period) == 0:  # "max", or -1
        return None
    return int(limit) / int(period)
