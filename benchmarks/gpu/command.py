"""The command: it plans tasks, hands them to workers and keeps what they find."""

import argparse
import datetime
import hashlib
import importlib.util
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timing

from benchmarks.gpu import pages, report
from benchmarks.gpu.workers import Absent, Json, Lost, Task, Worker

ROOT = Path(__file__).resolve().parents[2]

SECTIONS = (
    "environment",
    "probe",
    "correctness",
    "timings",
    "condensed",
    "launches",
    "tune",
    "costs",
    "eight",
    "tiles",
)

RESERVE = 20.0
"""Seconds before the end in which no task is started or waited for."""


TRIALS = 3
"""Times that a worker may fail to start."""


class Session:
    """A run of the command.

    Args:
      options: of the command line.
      start: starts the worker of a name, in so many seconds. It raises `Absent` where
        there is none, and `Lost` where it did not start.
    """

    def __init__(
        self, options: argparse.Namespace, start: Callable[[str, float], Worker]
    ):
        """Read earlier results, where they are wanted."""
        self.options = options
        self.start = start
        self.workers: dict[str, Worker | Exception] = {}
        self.trials: dict[str, int] = {}
        self.deadline = time.monotonic() + 60 * options.minutes
        self.kernels = hash_of_kernels()
        self.found: Json = {"machine": {}, "settings": {}, "bars": []}
        self.found |= {"tasks": [], "rows": []}
        self.found["settings"] = {
            "smoke": options.smoke,
            "minutes": options.minutes,
            "kernels": self.kernels,
        }
        self.path = options.out / "gpu.json"

    @property
    def left(self) -> float:
        """Seconds until no task may run any more."""
        return self.deadline - RESERVE - time.monotonic()

    def run(self, sections: Sequence[str]) -> bool:
        """Run sections; tell whether all tasks were run."""
        try:
            jax = self.worker("jax")
        except (Absent, Lost) as error:
            print(f"nothing can be run: {error}", flush=True)
            self.note("environment", "start", "failed", str(error))
            self.write()
            return False
        platform = jax.hello.get("platform")
        if platform != "gpu" and not self.options.smoke:
            print(f"JAX runs on {platform}: this needs a GPU (or --smoke)", flush=True)
            return False
        self.choose_path(str(jax.hello.get("device", "unknown")))
        complete = True
        for section in sections:
            complete = self.run_section(section) and complete
            self.lose("profile")  # for one section only
            self.write(pictures=True)
        return complete

    def choose_path(self, device: str) -> None:
        """Name the results after the device, and go on with those that are there."""
        name = re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")
        self.path = self.options.json or self.options.out / f"gpu_{name}.json"
        if self.options.resume is None:
            return
        given = self.options.resume
        source = self.path if given is True else Path(given)
        obstacle = self.go_on(source, device)
        done = f"{len(self.found['tasks'])} tasks of {source} are done"
        print(f"begun anew: {obstacle}" if obstacle else done, flush=True)

    def go_on(self, source: Path, device: str) -> str:
        """Take over earlier results, or say why not."""
        if not source.exists():
            return f"there is no {source}"
        earlier = json.loads(source.read_text())
        known = earlier["machine"].get("device", device)
        if known != device:
            return f"{source} is of {known}, this is {device}"
        if earlier["settings"].get("smoke") != self.options.smoke:
            return f"{source} is of another scale"
        done = {
            (t["section"], t["task"]): t
            for t in earlier["tasks"]
            if self.is_current(t)
            and t["section"] not in self.options.again
            and (t["status"] != "failed" or self.options.skip_failed)
        }
        self.found["tasks"] = list(done.values())
        self.found["rows"] = [
            row for row in earlier["rows"] if (row["section"], row["task"]) in done
        ]
        self.found["machine"] = earlier["machine"]
        return ""

    def is_current(self, task: Mapping[str, Any]) -> bool:
        """Tell whether a task's kernels are those of today, if it has some."""
        plain = task["worker"] == "torch" or task["section"] in ("environment", "costs")
        return plain or task["kernels"] == self.kernels

    def run_section(self, section: str) -> bool:
        """Run the tasks of a section; tell whether all were run."""
        tasks = self.plan(section)
        done = {(t["section"], t["task"]) for t in self.found["tasks"]}
        left = [task for task in tasks if (section, task.name) not in done]
        if not left:
            print(f"\n{section}: nothing is left to do", flush=True)
            return bool(tasks)
        print(f"\n{section}: {len(left)} tasks, {self.left:.0f} s left", flush=True)
        for i, task in enumerate(left):
            if self.left < task.seconds:
                print(f"{section}: {len(left) - i} tasks are left for --resume")
                return False
            self.run_task(task)
        return True

    def plan(self, section: str) -> list[Task]:
        """Ask for the tasks of a section."""
        question = {"section": section, "smoke": self.options.smoke}
        try:
            *_, last = self.worker("jax").ask(question, max(5.0, self.left))
        except (Absent, Lost) as error:
            self.lose("jax")
            last = {"end": None, "error": str(error)}
        if last["end"] is None:
            message = last.get("error") or last.get("absent")
            print(f"\n{section}: no tasks: {message}", flush=True)
            self.note(section, "plan", "failed", message)
            return []
        return [Task(**fields) for fields in last["end"]]

    def run_task(self, task: Task) -> None:
        """Run a task and keep its rows; what goes wrong is kept too."""
        start = time.monotonic()
        question = {"section": task.section, "settings": task.settings}
        status, message = "done", ""
        # Interpreted kernels take their time where other programs run too.
        patience = (10 if self.options.smoke else 1) * task.patience
        try:
            worker = self.worker(task.worker)
            for line in worker.ask(question, min(patience, self.left)):
                if "row" in line:
                    self.keep(task, line["row"])
                elif "absent" in line:
                    status, message = "absent", line["absent"]
                elif "error" in line:
                    status, message = "failed", line["error"]
                if line.get("lost"):
                    message += " (the device was lost; a new worker goes on)"
                    self.lose(task.worker)
        except Absent as error:
            status, message = "absent", str(error)
        except Lost as error:
            status, message = "failed", str(error)
            self.lose(task.worker)
        seconds = round(time.monotonic() - start, 2)
        if message:
            print(f"  {task.name}: {status}, {message}", flush=True)
        self.note(task.section, task.name, status, message, seconds, task.worker)
        self.write()

    def keep(self, task: Task, row: Json) -> None:
        """Keep a row and print it."""
        line = row.pop("line", "")
        names = [task.name, row.get("kernel")]
        if task.section in ("environment", "costs"):
            names = [task.name]
            if "device" in row:
                self.found["machine"] |= row
            elif "copy_gb_per_s" in row:
                self.found["machine"]["copy_gb_per_s"] = round(row["copy_gb_per_s"], 1)
        print(f"  {' | '.join(str(n) for n in names if n)}: {line}", flush=True)
        self.found["rows"].append({"section": task.section, "task": task.name} | row)

    def note(
        self,
        section: str,
        task: str,
        status: str,
        message: str | None = "",
        seconds: float = 0.0,
        worker: str = "jax",
    ) -> None:
        """Keep what became of a task."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        entry = {"section": section, "task": task, "status": status}
        entry |= {"message": message, "seconds": seconds, "worker": worker}
        self.found["tasks"].append(entry | {"date": now, "kernels": self.kernels})

    def worker(self, name: str) -> Worker:
        """Give the worker of a name, started where there is none.

        Raises:
          Absent: there is none.
          Lost: it does not start, after several trials.
        """
        found = self.workers.get(name)
        while found is None:
            try:
                found = self.started(name)
            except Lost as error:
                print(f"worker for {name}: {error}", flush=True)
                self.trials[name] = self.trials.get(name, 0) + 1
                if self.trials[name] == TRIALS:
                    found = error
                time.sleep(1)
            except Absent as error:
                found = error
        self.workers[name] = found
        if isinstance(found, Exception):
            raise found
        return found

    def started(self, name: str) -> Worker:
        """Start a worker."""
        worker = self.start(name, min(120.0, max(1.0, self.left)))
        print(f"worker: {json.dumps(worker.hello)}", flush=True)
        facts = ("torch", "cuSPARSELt")
        told = {k: worker.hello[k] for k in facts if k in worker.hello}
        self.found["machine"] |= told
        return worker

    def lose(self, name: str) -> None:
        """Forget a worker that ran and is lost; the next task gets a new one."""
        worker = self.workers.get(name)
        if isinstance(worker, Worker):
            worker.close()
            del self.workers[name]

    def write(self, pictures: bool = False) -> None:
        """Write the results: the JSON file, and at times the table and the plot."""
        self.found["bars"] = report.verdicts(self.found)
        replace(self.path, report.to_json(self.found))
        if not pictures:
            return
        try:
            replace(self.path.with_suffix(".md"), pages.to_markdown(self.found))
            pages.plot(self.found, self.path.with_suffix(".png"))
            if table := report.tiles_of(self.found):
                replace(self.options.out / "tiles.json", table)
        except Exception as error:  # noqa: BLE001 - the numbers are safe
            print(f"no table or plot: {type(error).__name__}: {error}", flush=True)

    def close(self) -> None:
        """End all workers."""
        for worker in self.workers.values():
            if isinstance(worker, Worker):
                worker.close()


def replace(path: Path, text: str) -> None:
    """Write a file at once: a run that is killed leaves the one before it."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def hash_of_kernels() -> str:
    """Name the sources that results of kernels depend on."""
    found = hashlib.sha256()
    folder = ROOT / "nmjax" / "kernels" / "gpu"
    for path in [*sorted(folder.glob("*.py")), ROOT / "nmjax/formats/images.py"]:
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()[:12]


def cuda_root() -> Path | None:
    """Find a CUDA toolkit for the compilers of JAX; None where they find one.

    They look for ptxas and libdevice in pip's packages and in CUDA_ROOT.
    """
    if os.environ.get("CUDA_ROOT"):
        return None
    for name in ("nvidia.cu13", "nvidia.cuda_nvcc"):
        try:
            spec = importlib.util.find_spec(name)
        except ImportError:
            continue
        for folder in (spec and spec.submodule_search_locations) or []:
            if is_toolkit(Path(folder)):
                return None
    found = [shutil.which(tool) for tool in ("ptxas", "nvcc")]
    places = [Path(tool).resolve().parents[1] for tool in found if tool]
    places += [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))]
    places += [Path("/usr/local/cuda"), *Path("/usr/local").glob("cuda-*")]
    return next(filter(is_toolkit, places), None)


def is_toolkit(folder: Path) -> bool:
    """Tell whether a folder has what compilers need."""
    return (folder / "bin/ptxas").exists() and (folder / "nvvm/libdevice").exists()


def starter(options: argparse.Namespace, log: Path) -> Callable[[str, float], Worker]:
    """Give a function that starts workers."""
    paths = [str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    if (root := cuda_root()) is not None:
        environment |= {"CUDA_ROOT": str(root)}
        environment["PATH"] = os.pathsep.join([f"{root}/bin", os.environ["PATH"]])
        print(f"CUDA_ROOT={root}", flush=True)
    if options.smoke:
        environment["JAX_PLATFORMS"] = "cpu"
        environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"

    def start(name: str, patience: float) -> Worker:
        python = sys.executable
        if name == "torch":
            found = timing.python_with("torch", options.peer_python)
            if found is None:
                raise Absent("torch is not importable (--peer-python names another)")
            python = found
        module = "torch_worker" if name == "torch" else "jax_worker"
        command = [python, "-m", f"benchmarks.gpu.{module}"]
        return Worker(command, log, environment, patience)

    return start


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="check and time the GPU kernels of nmjax",
    )
    parser.add_argument(
        "--sections", nargs="+", default=list(SECTIONS), metavar="SECTION",
        help=f"which, in this order: {', '.join(SECTIONS)}; commas work too",
    )  # fmt: skip
    parser.add_argument(
        "--resume", nargs="?", const=True, metavar="FILE",
        help="skip what is done in a JSON file of earlier results (that of this run)",
    )  # fmt: skip
    parser.add_argument(
        "--skip-failed", action="store_true", help="with --resume: what failed, too"
    )
    parser.add_argument(
        "--again", nargs="+", default=[], metavar="SECTION",
        help="with --resume: run these anew, say with other tiles",
    )  # fmt: skip
    parser.add_argument("--minutes", type=float, default=9.0, help="end before (9)")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results", metavar="FOLDER",
        help="where everything is written (benchmarks/results)",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="name of the results")
    parser.add_argument("--peer-python", metavar="PATH", help="interpreter with torch")
    parser.add_argument(
        "--smoke", action="store_true", help="every code path, tiny, on a CPU"
    )
    options = parser.parse_args(argv)
    sections, options.again = (
        [section for given in lists for section in given.split(",") if section]
        for lists in (options.sections, options.again)
    )
    for section in (*sections, *options.again):
        if section not in SECTIONS:
            parser.error(f"section {section!r} is none of {', '.join(SECTIONS)}")
    options.out.mkdir(parents=True, exist_ok=True)
    log = options.out / "gpu.log"
    log.write_text("")
    session = Session(options, starter(options, log))
    begun = time.monotonic()
    try:
        complete = session.run(sections)
    finally:
        session.close()
    print(report.summary(session.found))
    if not session.found["tasks"]:
        return 1
    took = time.monotonic() - begun
    state = "complete" if complete else "not complete: go on with --resume"
    print(f"\n{took:.0f} s, {state}; results: {session.path}, log: {log}")
    return 0
