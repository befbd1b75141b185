"""The worker that times torch's products: cuBLAS, cuSPARSELt and cuSPARSE.

Weights of torch are its own, drawn like those of JAX. On a GPU all sets of operands are
multiplied in a CUDA graph, several times, and its replays are timed by events; without
one, a dry run multiplies them one after the other.
"""

import functools
import math
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import timing
import torch  # pyright: ignore[reportMissingImports]

from benchmarks.gpu import workers
from benchmarks.gpu.workers import Json, Report, short

CACHE = 50e6
"""Bytes of the L2 cache; sets together are three times as large."""

CALLS = 96
"""Largest number of products in a graph."""

FEWEST_ROWS = 16
"""Rows of x that cuSPARSELt and products of 8 bits get; fewer are filled up."""

ALGORITHMS = 32
"""More ids of cuSPARSELt's algorithms than there are; the first that fails ends it."""

Call = Callable[[], Any]


class Replay:
    """Calls on several sets of operands, as a graph where there is a GPU.

    Args:
      calls: one for each set.
      passes: times that each is called.

    Attributes:
      count: calls in a run.
      graphed: whether a graph is replayed; some libraries cannot be captured.
    """

    def __init__(self, calls: Sequence[Call], passes: int):
        """Run once, and capture."""
        self.count = passes * len(calls)
        self.graphed = False

        def run() -> list[Any]:
            return [call() for _ in range(passes) for call in calls]

        self.run: Callable[[], Any] = run
        for call in calls:
            call()
        if not torch.cuda.is_available():
            return
        try:
            self.run = self.capture(run, calls)
            self.graphed = True
        except RuntimeError as error:
            print(f"not captured: {short(error)}")
            torch.cuda.synchronize()
            run()
        torch.cuda.synchronize()

    def capture(self, run: Call, calls: Sequence[Call]) -> Call:
        """Capture a graph and replay it once."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries allocate for a stream at first
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.kept = run()
        graph.replay()
        torch.cuda.synchronize()
        return graph.replay

    def seconds(self, repeats: int) -> float:
        """Return the mean time of a run, of all its calls, in seconds."""
        if not torch.cuda.is_available():
            start = time.perf_counter()
            for _ in range(repeats):
                self.run()
            return (time.perf_counter() - start) / repeats
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        for _ in range(repeats):
            self.run()
        after.record()
        after.synchronize()
        return before.elapsed_time(after) / 1e3 / repeats


def answer(question: Json, report: Report) -> None:
    """Time what a task asks for."""
    settings = dict(question["settings"])
    kind, smoke = settings.pop("kind"), settings.pop("smoke")

    def tell(**row: Any) -> None:
        report(**row, line=line(row))

    try:
        {"2:4": time_groups, "CSR": time_csr}[kind](settings, smoke, tell)
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


# 2:4 ---------------------------------------------------------------------------------


def time_groups(settings: Json, smoke: bool, report: Report) -> None:
    """Time dense products and those of cuSPARSELt, with every algorithm."""
    features, inputs, batch = (settings[k] for k in ("outputs", "inputs", "batch"))
    dtype = getattr(torch, settings["dtype"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    touched = (features * inputs // 2 + batch * inputs) * dtype.itemsize
    operations = 2 * features * inputs * batch
    count = 2 if smoke else max(2, min(32, math.ceil(3 * CACHE / touched)))
    guess = 2e-6 + max(operations / 6e14, touched / 3e12)
    passes = max(1, min(round(1.5e-3 / (count * guess)), CALLS // count))
    passes = 1 if smoke else passes
    weights = [draw_groups((features, inputs), dtype, device) for _ in range(count)]
    rows = [draw((batch, inputs), dtype, device) for _ in range(count)]
    replays: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    filled = [fill(x) for x in rows]
    usual = dtype in (torch.bfloat16, torch.float16)
    calls = dense_calls(weights, rows if usual else filled)
    replays["torch dense"] = Replay(calls, passes)
    most, small = algorithm_count(), []
    if most:
        try:
            small = [torch._cslt_compress(w) for w in weights]
        except Exception as error:  # noqa: BLE001 - torch may be built without it
            most, skipped["cuSPARSELt"] = 0, short(error)
    else:
        skipped["cuSPARSELt"] = "torch was built without it, or there is no GPU"
    for algorithm in range(most):
        name = f"cuSPARSELt {algorithm}"
        try:
            # The order (F, batch) is the one that it computes in.
            calls = sparse_calls(small, filled, algorithm, dtype)
            replays[name] = Replay(calls, passes)
            if not smoke:
                check(name, calls[0](), weights[0], filled[0])
        except Exception as error:  # noqa: BLE001 - ids that are not there
            replays.pop(name, None)
            if not alive():
                raise
            skipped[name] = short(error)
            if algorithm and len(replays) == 1 + algorithm:
                break  # all before it were there: this was the last one
    del weights
    base = "torch dense"
    rounds, target = (2, 0.0) if smoke else (7, 0.015)
    found = timing.measure(replays, base, rounds, target)
    read = {base: (features * inputs + batch * inputs) * dtype.itemsize}
    for name, replay in replays.items():
        result = found[name]
        row = settings | {"kernel": name, "us": 1e3 * result.ms / replay.count}
        row |= {"ratio": result.ratio, "low": result.low, "high": result.high}
        # 2:4 weights have two bits of position for a value.
        lean = touched + features * inputs // 8
        row["graph"] = replay.graphed
        written = batch * features * 2
        report(**row, bytes=read.get(name, lean) + written, operations=operations)
    for name, reason in skipped.items():
        report(**settings, kernel=name, absent=reason)


def draw(shape: tuple[int, int], dtype: Any, device: str) -> Any:
    """Draw normal numbers, or int8 numbers that are all as likely."""
    if dtype == torch.int8:
        return torch.randint(-127, 128, shape, dtype=dtype, device=device)
    return torch.randn(shape, dtype=torch.float32, device=device).to(dtype)


def draw_groups(shape: tuple[int, int], dtype: Any, device: str) -> Any:
    """Draw weights that keep two of every four entries of a row, any two."""
    pairs = [[i in (a, b) for i in range(4)] for a in range(4) for b in range(a)]
    table = torch.tensor(pairs, device=device)
    choices = torch.randint(6, (shape[0], shape[1] // 4), device=device)
    mask = table[choices].view(shape)
    w = draw(shape, dtype, device)
    bits = w if dtype.itemsize > 1 else w.view(torch.int8)
    return (bits * mask.to(bits.dtype)).view(dtype)


def fill(x: Any) -> Any:
    """Fill up with rows of zeros."""
    if x.shape[0] >= FEWEST_ROWS:
        return x
    full = torch.zeros((FEWEST_ROWS, x.shape[1]), dtype=x.dtype, device=x.device)
    full[: x.shape[0]] = x
    return full


def dense_calls(weights: Sequence[Any], rows: Sequence[Any]) -> list[Call]:
    """Make calls of the fastest dense product that torch has for a dtype."""
    dtype, device = rows[0].dtype, rows[0].device
    if dtype.itemsize == 2 or device.type == "cpu":
        wide = dtype if dtype.itemsize == 2 else torch.float32
        pairs = [(w.to(wide), x.to(wide)) for w, x in zip(weights, rows, strict=True)]
        return [lambda w=w, x=x: x @ w.t() for w, x in pairs]
    pairs = list(zip(weights, rows, strict=True))
    if dtype == torch.int8:
        # It wants more than 16 rows.
        padded = [(w, torch.cat([x, x]) if len(x) <= 16 else x) for w, x in pairs]
        return [lambda w=w, x=x: torch._int_mm(x, w.t()) for w, x in padded]
    one = torch.ones((), device=device)
    multiply = functools.partial(
        torch._scaled_mm,
        scale_a=one,
        scale_b=one,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return [lambda w=w, x=x: multiply(x, w.t()) for w, x in pairs]


def algorithm_count() -> int:
    """Count what may be ids of cuSPARSELt's algorithms; 0 where it is not there."""
    peer = getattr(torch.backends, "cusparselt", None)
    if not torch.cuda.is_available() or peer is None or not peer.is_available():
        return 0
    try:
        return int(peer.get_max_alg_id()) + 1
    except Exception:  # noqa: BLE001 - a name of newer versions
        return ALGORITHMS


def sparse_calls(
    small: Sequence[Any], rows: Sequence[Any], algorithm: int, dtype: Any
) -> list[Call]:
    """Make calls of cuSPARSELt: y^T = w x^T."""
    settings: dict[str, Any] = {"alg_id": algorithm}
    if dtype == torch.int8:
        settings["out_dtype"] = torch.int32
    elif dtype.itemsize == 1:
        settings["out_dtype"] = torch.bfloat16
    multiply = functools.partial(torch._cslt_sparse_mm, **settings)
    pairs = zip(small, rows, strict=True)
    return [lambda w=w, x=x: multiply(w, x.t()) for w, x in pairs]


def check(name: str, found: Any, w: Any, x: Any) -> None:
    """Raise ArithmeticError if a product is wrong: nothing wrong is timed."""
    some = slice(0, 256)
    expected = w[some].double() @ x[some].double().t()
    error = (found[some, some].double() - expected).norm() / expected.norm()
    if not float(error) <= 2e-2:
        raise ArithmeticError(f"{name} is wrong by {float(error):.2g}")


# Constant fan-in ---------------------------------------------------------------------


def time_csr(settings: Json, smoke: bool, report: Report) -> None:
    """Time dense products and those of CSR, both orders of x."""
    features, inputs, batch = (settings[k] for k in ("outputs", "inputs", "batch"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    k = max(1, round(settings["density"] * inputs))
    count = 2 if smoke else 16
    operations = 2 * features * inputs * batch
    passes = max(1, min(round(1.5e-3 / (count * 5e-6)), CALLS // count))
    passes = 1 if smoke else passes
    weights = []
    for _ in range(count):
        kept = torch.rand((features, inputs), device=device).topk(k, 1).indices
        w = torch.zeros((features, inputs), device=device)
        weights.append(w.scatter_(1, kept, torch.randn((features, k), device=device)))
    xs = [torch.randn((batch, inputs), device=device) for _ in range(count)]
    columns = [x.t().contiguous() for x in xs]
    sparse = [w.to_sparse_csr() for w in weights]
    allowed = torch.backends.cuda.matmul.allow_tf32
    pairs = list(zip(weights, xs, strict=True))
    ways: dict[str, list[Call]] = {
        "torch dense": [lambda w=w, x=x: x @ w.t() for w, x in pairs],
        "torch CSR": [
            lambda w=w, x=x: w @ x for w, x in zip(sparse, columns, strict=True)
        ],
        "torch CSR, x row by row": [
            lambda w=w, x=x: w @ x.t() for w, x in zip(sparse, xs, strict=True)
        ],
    }
    replays, skipped = {}, {}
    for name, calls in ways.items():
        try:
            torch.backends.cuda.matmul.allow_tf32 = name == "torch dense"
            replays[name] = Replay(calls, passes)
        except Exception as error:  # noqa: BLE001 - a way that fails is a result
            if name == "torch dense" or not alive():
                raise
            skipped[name] = short(error)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = allowed
    rounds, target = (2, 0.0) if smoke else (7, 0.015)
    found = timing.measure(replays, "torch dense", rounds, target)
    stored = {"torch dense": 4 * features * inputs}
    csr = (8 * k + 4) * features
    row = settings | {"layout": settings["format"]}
    for name, replay in replays.items():
        result = found[name]
        times = {"us": 1e3 * result.ms / replay.count, "ratio": result.ratio}
        times |= {"low": result.low, "high": result.high}
        moved = stored.get(name, csr) + 4 * batch * (features + inputs)
        times["graph"] = replay.graphed
        report(**row, kernel=name, **times, bytes=moved, operations=operations)
    for name, reason in skipped.items():
        report(**row, kernel=name, absent=reason)


def line(row: Json) -> str:
    """Say in a line what a row found."""
    if "absent" in row:
        return f"- {row['absent']}"
    us = row["us"]
    text = f"{us:10.2f} us {row['operations'] / us / 1e6:8.1f} TFLOP/s"
    return f"{text} {row['bytes'] / us / 1e3:7.0f} GB/s  {1 / row['ratio']:5.2f}x"


def alive() -> bool:
    """Tell whether the device can still be used, after an error."""
    try:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return float(torch.ones(8, device=device).sum()) == 8.0
    except Exception:  # noqa: BLE001 - whatever it is, the answer is no
        return False


def main() -> None:
    """Say what is there, then answer questions."""
    warnings.filterwarnings("ignore")  # sparse CSR is a beta
    torch.set_grad_enabled(False)
    gpu = torch.cuda.is_available()
    hello = {"torch": torch.__version__, "platform": "gpu" if gpu else "cpu"}
    hello["device"] = torch.cuda.get_device_name() if gpu else "cpu"
    peer = getattr(torch.backends, "cusparselt", None)
    if peer is not None and gpu:
        try:
            hello["cuSPARSELt"] = str(peer.version())
        except Exception as error:  # noqa: BLE001 - its version is no must
            hello["cuSPARSELt"] = short(error)
    alive()  # the context is made before the first task's time begins
    workers.serve(hello, answer, alive)


if __name__ == "__main__":
    main()
