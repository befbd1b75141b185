"""The server of `serve.py`: batches of fixed sizes, timings, and HTTP.

    engine = Engine(client, variables, sizes=(1, 8, 64))
    engine(["vom 1. Mai 1999 bis 2. Juni 2000"])        # one answer for each item
    with Server(("127.0.0.1", 8000), engine) as server:
        server.serve_forever()

The server reads requests in parallel and computes them one after the other. It answers
``POST /answer`` with ``{"answers": [...], "seconds": ...}``; what is wrong with a
request is said in ``{"error": ...}``, with a status of 400 to 413.
"""

import collections
import http.server
import json
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from typing import Any

import common
import jax
import numpy as np
from clients import Client, Variables
from tqdm import tqdm

MOST_BYTES = 16 * 2**20  # of a request

# Answers ----------------------------------------------------------------------------


class Meter:
    """Counts calls, and keeps the seconds of the latest ones."""

    def __init__(self) -> None:
        """Begin at zero."""
        self.calls, self.units, self.seconds = 0, 0, 0.0
        self._latest: collections.deque[float] = collections.deque(maxlen=10_000)

    def add(self, seconds: float, units: int) -> None:
        """Count a call that made so many units."""
        self.calls, self.units = self.calls + 1, self.units + units
        self.seconds += seconds
        self._latest.append(seconds)

    def row(self, unit: str) -> dict[str, Any]:
        """Return calls, median and 95th percentile in ms, and units per second."""
        middle, high = np.percentile(np.array(self._latest), [50, 95]) * 1e3
        speed = f"{self.units / self.seconds:,.0f}"
        row = {"calls": self.calls, "p50 ms": f"{middle:.2f}", "p95 ms": f"{high:.2f}"}
        return {**row, f"{unit} per s": speed}


class Engine:
    """A client with its weights, compiled for a few sizes of batches.

    Attributes:
      client: What is served.
      sizes: Sizes of batches, ascending.
      variables: The weights.
    """

    def __init__(self, client: Client, variables: Variables, sizes: Sequence[int]):
        """Compile for every size; this takes seconds each."""
        self.client, self.sizes = client, sorted(sizes)
        self._answer, self.variables = jax.jit(client.answer), variables
        self._lock = threading.Lock()
        self._meters = {size: Meter() for size in self.sizes}
        for size in tqdm(self.sizes, "compiling", disable=not sys.stderr.isatty()):
            blank = client.inputs([], size)
            jax.block_until_ready(self._answer(variables, blank))

    def __call__(self, items: Sequence[Any], first: int = 0) -> list[Any]:
        """Answer any number of items, in batches filled up to the next size.

        Args:
          items: Images or sentences.
          first: Number of the first item, for messages.

        Returns:
          Classes or sentences.

        Raises:
          ValueError: An item is malformed; the message says which and why.
        """
        answers = []
        for start in range(0, len(items), self.sizes[-1]):
            batch = items[start : start + self.sizes[-1]]
            size = next(size for size in self.sizes if size >= len(batch))
            inputs = self.client.inputs(batch, size, first + start)
            with self._lock:
                began = time.perf_counter()
                made = np.asarray(self._answer(self.variables, inputs))[: len(batch)]
                seconds = time.perf_counter() - began
                self._meters[size].add(seconds, self.client.count(made))
            answers += self.client.outputs(made)
        return answers

    def table(self) -> str:
        """Return times and speed of every size that was used."""
        used = {size: meter for size, meter in self._meters.items() if meter.calls}
        rows = [{"batch": size, **m.row(self.client.unit)} for size, m in used.items()]
        return common.format_table(rows)


# HTTP -------------------------------------------------------------------------------


class Refused(Exception):
    """A request that is not answered: its status and why."""

    def __init__(self, status: int, why: str):
        """Keep both."""
        super().__init__(why)
        self.status = status


class Server(http.server.ThreadingHTTPServer):
    """Answers ``POST /answer`` and ``GET /health``."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], engine: Engine):
        """Listen; port 0 takes a free one."""
        self.engine = engine
        self.meter, self.lock = Meter(), threading.Lock()
        super().__init__(address, Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print what went wrong, unless a client just left."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class Handler(http.server.BaseHTTPRequestHandler):
    """Handles the requests of one connection."""

    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]
    timeout = 30  # seconds without a byte
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Say what is served."""
        if self.path != "/health":
            return self._send(404, {"error": f"no {self.path}: POST to /answer"})
        facts = self.server.engine.client.facts
        what = {name: facts[name] for name in ("model", "library")}
        answered = {"requests": self.server.meter.calls}
        self._send(200, {**what, "field": self._field, **answered})

    def do_POST(self) -> None:
        """Answer the items of a request."""
        began = time.perf_counter()
        try:
            answers = self.server.engine(self._items())
        except Refused as error:
            self.close_connection = True  # what it still sends is not a request
            return self._send(error.status, {"error": str(error)})
        except ValueError as error:
            return self._send(400, {"error": str(error)})
        except Exception:
            traceback.print_exc()
            return self._send(500, {"error": "the server failed; it printed why"})
        seconds = time.perf_counter() - began
        with self.server.lock:
            self.server.meter.add(seconds, len(answers))
        self._send(200, {"answers": answers, "seconds": seconds})

    @property
    def _field(self) -> str:
        return self.server.engine.client.field

    def _items(self) -> list[Any]:
        """Read the body of a request."""
        if self.path != "/answer":
            raise Refused(404, f"no {self.path}: POST to /answer")
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            raise Refused(411, "the header Content-Length is missing or no number")
        if int(length) > MOST_BYTES:
            raise Refused(413, f"{length} bytes are more than {MOST_BYTES}")
        try:
            text = self.rfile.read(int(length))
        except TimeoutError:
            raise Refused(408, f"{length} bytes did not come in time") from None
        try:
            body = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the body is no JSON: {error}") from error
        items = body.get(self._field) if isinstance(body, dict) else None
        if not isinstance(items, list) or not items:
            raise ValueError(
                f'the body must be {{"{self._field}": [...]}} with at least one item'
            )
        return items

    def _send(self, status: int, content: dict[str, Any]) -> None:
        body = (json.dumps(content) + "\n").encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing: the latencies are printed at the end."""
