"""One command for a machine with a GPU: are the kernels right, and how fast are they?

    python -m benchmarks.gpu                         # everything, in the order below
    python -m benchmarks.gpu --out results --resume  # go on where a call was cut off
    python -m benchmarks.gpu --sections probe timings --minutes 5
    python -m benchmarks.gpu --smoke --out somewhere # every code path, tiny, on a CPU

It needs the repository and the packages that nmjax imports; nothing has to be
installed or compiled. Where torch can be imported (or --peer-python names an
interpreter that can) its products are measured too, in a process of their own.

Sections, the most valuable first:

- environment: device, driver, clocks, versions, bandwidth of a copy;
- probe: every 2:4 kernel multiplies the identity, so that the result is the weights as
  the hardware decoded them: EXACT, or where and how they differ;
- correctness: every kernel and dtype against float32, and against a second run;
- timings: 2:4 products of bfloat16 at M = N = K and in the shapes of language models,
  beside cuBLAS through JAX, and cuBLAS and cuSPARSELt (all algorithms) through torch;
- condensed: constant fan-in and blocks beside dense, BCOO and torch's CSR;
- launches: times of single kernels, as the profiler sees them, without the gaps;
- tune: tiles for `nmjax/kernels/gpu/tiles.json`, written beside the results;
- costs: masks beside a copy, sparse training steps beside dense ones;
- eight: timings of float8, int8 and float16, and of the remaining shapes;
- tiles: correctness of every tile that is not the default.

How it survives. The supervisor (`command`) never touches the GPU. Workers
(`jax_worker`, `torch_worker`) run one task after the other and report every row as it
is measured. A task that hangs, or after which the GPU cannot be used, costs its own
worker only: it is recorded as failed, and the next task gets a new one. Results are
written after every task. No task starts that would not end before --minutes are over.

How it measures. Operands rotate: a program multiplies several sets of operands,
together larger than the L2 cache, in several passes (`nmjax.kernels.rotation`), and
runs of it are enqueued without waiting until they fill 20 ms. Programs of one cell
alternate with dense weights, A B A B, and ratios compare neighbours; medians and
quartiles are reported. torch replays CUDA graphs of the same sets.

The JSON file:

    {"machine": {"device": ..., "jax": ..., ...},      # of the section environment
     "settings": {"smoke": false, "minutes": 9, ...},
     "bars": [{"text", "least", "measured", "verdict", "cell"}],
     "tasks": [{"section", "task", "status", "message", "seconds", "date", "kernels"}],
     "rows": [{"section", "task", ...}]}

A task's ``status`` is "done", "failed" (``message`` says how) or "absent" (what it
needs is not there); ``kernels`` is a hash of the kernels' sources: --resume runs a task
again that failed or whose kernels were changed since. Rows of all sections but
environment and costs have ``kernel`` (what was run), ``dtype``, ``outputs``, ``inputs``
and ``batch``, and

- probe: ``verdict`` "EXACT" or "WRONG", and where it is wrong ``mismatches``, ``first``
  (output, input), ``got``, ``want``, ``outputs_mod_64``, ``inputs_mod_64``, ``lanes``
  and ``reads_as``, the mistakes that would explain all of it;
- correctness, tiles: ``tiles``, ``error`` (norm of the difference over norm of the
  result), ``bound``, ``verdict`` ("right", "WRONG" or "UNSTABLE") and ``rerun``
  ("equal" or by how much two runs differ);
- timings, condensed, eight: ``us`` (median time of one product), ``ratio`` (median
  time relative to dense weights in the same worker), ``low`` and ``high`` (its
  quartiles), ``bytes``, ``operations`` (of dense weights), ``host`` (the fraction of
  the time in which the host was enqueuing; near 1 it may be the host that was measured)
  and ``targets`` (what XLA's program calls), or ``graph`` (whether torch replayed one);
  or ``absent`` (why there is no time) in their place. condensed has ``density`` and
  ``layout`` too;
- launches: ``kernel_us`` (kernels of one product), ``launches``, ``names``;
- tune: ``tiles``, ``us``, ``default_us`` and ``measured``, as `nmjax.kernels.tune`;
- costs: ``name``, ``of``, ``us`` and ``ratio`` to ``base``, ``low`` and ``high``.
"""
