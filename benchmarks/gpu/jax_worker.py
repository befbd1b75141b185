"""The worker that runs tasks in JAX: started by `command`, as a module."""

import dataclasses
import importlib
import os
from typing import Any

from benchmarks.gpu import workers

MODULES = {
    "environment": ("environment", "tasks"),
    "probe": ("probe", "tasks"),
    "correctness": ("correctness", "tasks"),
    "timings": ("timings", "tasks"),
    "condensed": ("condensed", "tasks"),
    "launches": ("launches", "tasks"),
    "tune": ("tuning", "tasks"),
    "costs": ("costs", "tasks"),
    "eight": ("timings", "more_tasks"),
    "tiles": ("correctness", "more_tasks"),
}
"""Module of a section, and its function that lists tasks."""


def answer(question: dict[str, Any], report: Any) -> Any:
    """List the tasks of a section, or run one."""
    section = question["section"]
    module, lister = MODULES[section]
    # Imported when it is asked for: an error there costs its own section only.
    found = importlib.import_module(f"benchmarks.gpu.{module}")
    if "settings" not in question:
        tasks = getattr(found, lister)(question["smoke"])
        return [dataclasses.asdict(task) for task in tasks]

    def tell(**row: Any) -> None:
        report(**row, line=found.line(row))

    found.run(dict(question["settings"]), tell)
    return None


def main() -> None:
    """Say what is there, then answer questions."""
    # Memory is taken as it is needed: torch runs on the same GPU.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    from benchmarks.gpu.device import device_answers

    device = jax.devices()[0]
    hello = {"device": device.device_kind, "platform": device.platform}
    workers.serve(hello | {"jax": jax.__version__}, answer, device_answers)


if __name__ == "__main__":
    main()
