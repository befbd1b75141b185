"""Environment: what the numbers were measured on, and how fast memory is there."""

import datetime
import importlib.metadata
import os
import platform
import shutil
import subprocess

import jax
import jax.numpy as jnp
import timing

from benchmarks.gpu.workers import Json, Report, Task
from nmjax.kernels.rotation import SERIAL, Program

PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "numpy", "torch")

QUERY = {
    "gpu": "name",
    "driver": "driver_version",
    "memory": "memory.total",
    "clock now": "clocks.sm",
    "clock at most": "clocks.max.sm",
    "memory clock": "clocks.mem",
    "power limit": "power.limit",
    "temperature": "temperature.gpu",
}
"""What nvidia-smi is asked for; nothing is set."""


def tasks(smoke: bool) -> list[Task]:
    """List the tasks."""
    return [
        Task("environment", "machine", {"kind": "machine"}, 5),
        Task("environment", "copy", {"kind": "copy", "smoke": smoke}, 5),
    ]


def run(settings: Json, report: Report) -> None:
    """Describe the machine, or time copies."""
    if settings["kind"] == "machine":
        report(**machine())
        return
    size = 2**16 if settings["smoke"] else 2**30
    sets = [(jnp.full(size // 4, i, jnp.float32),) for i in range(2)]
    program = Program(lambda x: x + 1, sets, 2, SERIAL)
    twice = {"copy": program, "again": program}
    found = timing.measure(twice, "copy", 5, 0.02)["copy"]
    us = 1e3 * found.ms / program.calls
    report(us=us, copy_gb_per_s=2 * size / us / 1e3, bytes=2 * size)


def machine() -> Json:
    """Describe the machine: everything that can be found out."""
    device = jax.devices()[0]
    found = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device.device_kind,
        "platform": device.platform,
        "capability": str(getattr(device, "compute_capability", "")),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    try:
        found["memory_bytes"] = (device.memory_stats() or {}).get("bytes_limit")
    except Exception:  # noqa: BLE001 - not every platform tells
        pass
    return found | from_nvidia_smi()


def from_nvidia_smi() -> Json:
    """Ask nvidia-smi, where it is there; it only reads."""
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERY.values())}"]
    try:
        done = subprocess.run(
            [*command, "--format=csv,noheader", "--id=0"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        return {"nvidia-smi": str(error)[:200]}
    values = [value.strip() for value in done.stdout.splitlines()[0].split(",")]
    return dict(zip(QUERY, values, strict=False))


def line(row: Json) -> str:
    """Say in a line what a row found."""
    if "copy_gb_per_s" in row:
        return f"{row['copy_gb_per_s']:.0f} GB/s read and written by a copy"
    return ", ".join(f"{name} {value}" for name, value in row.items())
