"""Rotation: programs that multiply several sets of operands, to be timed on a GPU.

One product is over before it was started from the host, and a second one with the same
operands finds them in the cache. So a program multiplies sets that exceed the cache
together, several times, and its runs are enqueued without waiting for each other.
"""

import collections
import math
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

CACHE = 50e6
"""Bytes of the L2 cache of Hopper GPUs."""

CALLS = 96
"""Largest number of products in a program: more take seconds to compile."""

SERIAL = {"xla_gpu_command_buffer_scheduling_mode": "SERIALIZE"}
"""Options of XLA: one kernel after the other, also where a CUDA graph is launched."""

CUBLAS = SERIAL | {"xla_gpu_enable_triton_gemm": False}
"""The same, and products of dense arrays by cuBLAS instead of what is fastest."""


def sets_for(smallest: float | int, most: int = 32) -> int:
    """Choose a number of sets, which together exceed the cache three times.

    Args:
      smallest: bytes that one product has to read at least.
      most: largest number.

    Returns:
      The number of sets, at least 2.

    Example:
      >>> from nmjax.kernels import rotation
      >>> rotation.sets_for(2**30), rotation.sets_for(10e6), rotation.sets_for(1e3)
      (2, 15, 32)
    """
    return max(2, min(most, math.ceil(3 * CACHE / max(1.0, smallest))))


def passes_for(operations: float | int, touched: float | int, sets: int) -> int:
    """Choose how often a program multiplies all sets: for about 1.5 ms, or 96 calls.

    Args:
      operations: multiplications and additions of one product.
      touched: bytes that it has to read and write.
      sets: number of sets.

    Returns:
      The number of passes, at least 1.

    Example:
      >>> from nmjax.kernels import rotation
      >>> rotation.passes_for(2 * 8192**3, 4e8, 2)
      1
      >>> rotation.passes_for(2 * 4096**2, 2e7, 8)
      12
    """
    guess = 2e-6 + max(operations / 6e14, touched / 3e12)
    return max(1, min(round(1.5e-3 / (sets * guess)), CALLS // sets))


class Program:
    """A compiled program of several passes over sets of operands.

    No product is left out: for the compiler, the operands of a pass depend on the
    results of the pass before it. The program returns one entry of each product.

    Args:
      function: takes the operands of a set, arrays or trees of them.
      sets: the sets.
      passes: number of passes.
      options: of XLA's compiler for GPUs, such as `SERIAL`.

    Attributes:
      calls: number of products in the program.
      targets: what the program calls on a GPU, and how often: the names of libraries'
        functions and of kernels.
      host: fraction of the last `seconds` in which the host was still enqueuing. Near
        1, it may be the host's time that was measured.

    Example:
      >>> import jax.numpy as jnp
      >>> from nmjax.kernels import rotation
      >>> sets = [(jnp.ones((2, 2)), jnp.ones((2, 2))) for _ in range(3)]
      >>> program = rotation.Program(jnp.matmul, sets, passes=2)
      >>> program.calls, program.run().tolist()
      (6, [2.0, 2.0, 2.0, 2.0, 2.0, 2.0])
      >>> program.seconds(2) > 0
      True
    """

    def __init__(
        self,
        function: Callable[..., Array],
        sets: Sequence[tuple[Any, ...]],
        passes: int = 1,
        options: dict[str, Any] | None = None,
    ):
        """Compile, and run once."""
        inner = jax.jit(lambda *operands: function(*operands))
        self.sets = [tuple(operands) for operands in sets]
        self.calls = passes * len(self.sets)
        self.host = 0.0

        def program(sets: Any) -> Array:
            found = []
            for _ in range(passes):
                results = [inner(*operands) for operands in sets]
                sets, results = lax.optimization_barrier((sets, results))
                found += results
            # Every result is used, so that its product is not dropped.
            return jnp.stack([r.reshape(-1)[0].astype(jnp.float32) for r in found])

        on_gpu = jax.default_backend() == "gpu"
        lowered = jax.jit(program).lower(self.sets)
        self.compiled = lowered.compile(options if on_gpu else None)
        self.targets: dict[str, int] = {}
        if on_gpu:
            text = self.compiled.as_text() or ""
            check_calls(text, self.calls)
            names = re.findall(r'custom_call_target="([^"]+)"', text)
            self.targets = dict(collections.Counter(names))
        jax.block_until_ready(self.run())

    def run(self) -> Array:
        """Run once, without waiting.

        Returns:
          One entry of each product.
        """
        return self.compiled(self.sets)

    def seconds(self, repeats: int = 1) -> float:
        """Time runs that are enqueued without waiting for each other.

        Args:
          repeats: number of runs.

        Returns:
          The mean wall time of a run, of all its products, in seconds.
        """
        start = time.perf_counter()
        results = [self.run() for _ in range(repeats)]
        enqueued = time.perf_counter()
        jax.block_until_ready(results)
        end = time.perf_counter()
        self.host = (enqueued - start) / (end - start)
        return (end - start) / repeats


def check_calls(text: str, calls: int) -> None:
    """Check that a compiled program has as many operations as products.

    Args:
      text: what XLA made of it.
      calls: number of products.

    Raises:
      RuntimeError: it has fewer, so that its time would say nothing.

    Example:
      >>> from nmjax.kernels import rotation
      >>> rotation.check_calls("%y = f32[2] custom-call(%x), ...", 1)
    """
    found = len(re.findall(r" (?:custom-call|fusion|dot)\(", text))
    if found < calls:
        raise RuntimeError(
            f"the compiled program has {found} operations for {calls} products; XLA "
            "has left some out"
        )
