"""What the kernel says about this process's memory (Linux only)."""

from __future__ import annotations

from pathlib import Path


def reset_peak() -> int | None:
    """Let the kernel forget the highest resident size so far; answer the present one, or ``None`` if it cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        return status_bytes("VmRSS")
    except OSError:
        return None


def status_bytes(field: str) -> int:
    """Answer a size of ``/proc/self/status`` in bytes: ``VmRSS``, ``VmHWM``."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise OSError(f"/proc/self/status has no {field}")
