"""Energy that the processors of this machine took, where the kernel says it (Intel's and AMD's RAPL)."""

from __future__ import annotations

from pathlib import Path

COUNTERS = Path("/sys/class/powercap")


def joules() -> float | None:
    """Of all processor packages since an unknown moment, in J; None where it cannot be read. Differences count; a counter wraps after hours at full load."""
    total = 0.0
    packages = [folder for folder in COUNTERS.glob("intel-rapl:*") if folder.name.count(":") == 1]
    for folder in packages:
        try:
            total += int((folder / "energy_uj").read_text()) / 1e6
        except (OSError, ValueError):
            return None
    return total if packages else None
