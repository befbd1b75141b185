"""Workers: processes that run tasks one by one and may die or hang while they do.

The supervisor sends one line of JSON per question; a worker answers with lines of JSON,
one for each row, and a last one with the key "end". Whatever else it prints goes to the
log.
"""

import collections
import dataclasses
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

Json = dict[str, Any]

TAIL = 12
"""Lines of a worker's log that the message about its death quotes."""


LOG = 4_000_000
"""Characters that a log has at most."""


class Lost(Exception):
    """A worker died or did not answer in time; the message says what was seen."""


class Worker:
    """A process that answers questions.

    Args:
      command: how to start it.
      log: where its error stream is appended.
      environment: variables that are set beside those of this process.
      patience: seconds until it must have said what it is.

    Attributes:
      hello: its first line, such as versions.
    """

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        environment: Mapping[str, str] | None = None,
        patience: float = 120.0,
    ):
        """Start the process and wait for its first line."""
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=os.environ | dict(environment or {}),
        )
        self.log = log
        self.tail: collections.deque[str] = collections.deque(maxlen=TAIL)
        self.lines: queue.Queue[str | None] = queue.Queue()
        assert self.process.stdout is not None and self.process.stderr is not None
        self.threads = [
            threading.Thread(target=self._answers, args=(self.process.stdout,)),
            threading.Thread(target=self._errors, args=(self.process.stderr,)),
        ]
        for thread in self.threads:
            thread.daemon = True
            thread.start()
        try:
            self.hello = self._next(time.monotonic() + patience)
        except Lost:
            self.close()
            raise

    def ask(self, question: Json, seconds: float) -> Iterator[Json]:
        """Ask, and give each line of the answer as it comes; the last one has "end".

        Args:
          question: what can be written as JSON.
          seconds: until when the last line must have come.

        Yields:
          The lines.

        Raises:
          Lost: the process died or was killed because it did not answer.
        """
        deadline = time.monotonic() + seconds
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
        except OSError:
            raise Lost(self._epitaph()) from None
        while True:
            line = self._next(deadline)
            yield line
            if "end" in line:
                return

    def close(self) -> None:
        """End the process: give it a moment, then kill it."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.close()
            self.process.wait(5)
        except (OSError, subprocess.TimeoutExpired):
            self.kill()
        for thread in self.threads:
            thread.join(1)  # they close what they read

    def kill(self) -> None:
        """Kill the process; a kernel that never ends goes with it."""
        self.process.kill()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            print(f"process {self.process.pid} cannot be killed", file=sys.stderr)

    def _next(self, deadline: float) -> Json:
        try:
            line = self.lines.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            self.kill()
            raise Lost(f"no answer in time, killed{self._quoted()}") from None
        if line is None:
            raise Lost(self._epitaph())
        return json.loads(line)

    def _epitaph(self) -> str:
        try:
            status = self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.kill()
            status = "none: it had closed its output"
        time.sleep(0.1)  # for the last lines of the log
        return f"the process died, exit status {status}{self._quoted()}"

    def _quoted(self) -> str:
        return "; its last lines: " + " | ".join(self.tail) if self.tail else ""

    def _answers(self, stream: IO[str]) -> None:
        with stream:
            for line in stream:
                self.lines.put(line)
        self.lines.put(None)

    def _errors(self, stream: IO[str]) -> None:
        with self.log.open("a") as file, stream:
            for line in stream:
                if file.tell() < LOG:
                    file.write(line)
                    file.flush()
                self.tail.append(line.rstrip()[:300])


# The side of the worker --------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Task:
    """Something that a worker can run.

    Attributes:
      section: the section it belongs to.
      name: its name, unique in the section.
      settings: arguments of the function that runs it, as JSON has them.
      seconds: how long it should take; it is not started where less time is left.
      worker: "jax", "torch" or "profile", which is one for JAX too.
    """

    section: str
    name: str
    settings: Json
    seconds: float = 10.0
    worker: str = "jax"

    @property
    def patience(self) -> float:
        """Seconds after which it is taken to hang."""
        return 30.0 + 3 * self.seconds


class Absent(Exception):
    """What a task needs is not there; the message says what."""


Report = Callable[..., None]
"""Called with the entries of a row, as keywords."""


def serve(
    hello: Json,
    answer: Callable[[Json, Report], Any],
    still_alive: Callable[[], bool],
) -> None:
    """Answer questions until the input ends.

    Args:
      hello: the first line.
      answer: takes a question and a function that reports rows; what it returns is the
        value of "end".
      still_alive: tells after an error whether the device can still be used. Where it
        cannot, the process ends.
    """
    # Libraries print to the standard output too: keep it for the answers.
    sys.stdout.flush()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(line: Json) -> None:
        answers.write(json.dumps(line) + "\n")
        answers.flush()

    say(hello)
    for line in sys.stdin:
        try:
            end = {"end": answer(json.loads(line), lambda **row: say({"row": row}))}
        except (Absent, NotImplementedError) as error:
            end = {"end": None, "absent": short(error)}
        except Exception as error:  # noqa: BLE001 - every failure is a result
            import traceback

            traceback.print_exc()
            end = {"end": None, "error": short(error)}
            if not still_alive():
                say(end | {"lost": True})
                os._exit(3)  # not through the libraries' own ends, which may hang
        say(end)


def short(error: BaseException) -> str:
    """Give the type and the message of an error, cut where it is long."""
    text = " ".join(str(error).split())
    name = (
        "" if isinstance(error, Absent | NotImplementedError) else type(error).__name__
    )
    text = f"{name}: {text}" if name and text else text or type(error).__name__
    return text if len(text) <= 600 else f"{text[:400]} ... {text[-190:]}"
