"""When is a product with compressed weights faster than a dense one, and by how much?

Every form of nmjax stands beside dense weights and masked dense weights in XLA, and
beside scipy, jax.experimental.sparse and torch, in one run:

- single: one layer of constant fan-in, 3072 -> 768 and 768 -> 3072, whose weights fit
  in a cache;
- chain: 6 blocks 768 -> 3072 -> 768 of constant fan-in, 113 MB of dense weights, in one
  jitted function with ReLU between the layers;
- nm: 4 layers 4096 -> 4096 of 2:4 weights, with float32, bfloat16 and int8 values;
- block: the chain again with blocks of 4x1, 16x1, 1x16, 16x16 and 32x32 weights
  (outputs x inputs);
- table: every form of nmjax on layers 3072 -> 768, for many layouts, densities and
  batch sizes: what dispatch should choose. A call runs one of 5 layers (10 in
  bfloat16), the next one each time, so that dense weights come from memory.

"nmjax" is `nmjax.matmul` as users call it, "xla" and "native" are its implementations,
"prepared" is `nmjax.matmul` with weights that `nmjax.prepare` laid out for the CPU,
"direct" and "expand" are the forms of native kernels, "slots", "blocks" and
"decompress" those in `nmjax.kernels.reference`. Speed-ups are over dense weights in the
dtype of x.
"limit" is what reading the bytes takes that a form has to touch, timed in the same run:
small batches can come near to it, large ones have to compute. Results are compared with
the dense ones before anything is timed. Weights are passed in as arguments, peers keep
x in the order that suits them, and a form that takes longer than --patience seconds a
call is left out.

The bars at the end are what a release must keep on two cores. Dispatch reads what
--forms writes: after a change of kernels run the table first, and then everything. On a
noisy machine run it a few times, and let --runs take the medians, and for --forms the
geometric mean of each form's times, in which bad moments count and do not decide.

    python benchmarks/matmul.py
    python benchmarks/matmul.py --peer-python ~/torch/bin/python --json matmul.json \
        --plot matmul.png --markdown matmul.md
    python benchmarks/matmul.py --section single nm
    python benchmarks/matmul.py --section table --json first.json
    python benchmarks/matmul.py --runs first.json second.json third.json \
        --forms nmjax/kernels/cpu_forms.json
"""

import argparse
import dataclasses
import json
import os
import pathlib
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import matmul_cases
import matmul_forms
import matmul_report
import timing
from matmul_cases import Case, Form, Unavailable
from matmul_forms import BASE

from nmjax.kernels import choosing

SECTIONS = ("single", "chain", "nm", "block", "table")
XLA = ("dense", "masked dense", "nmjax", "xla", "native")
SPARSE = (*XLA, "prepared", "scipy CSR", "BCOO", "BCSR", "torch dense", "torch CSR")
SLOWEST_PICK = 1.1
"""A pick of dispatch that is slower than this, relative to masked dense, is timed again
before it is believed."""


@dataclasses.dataclass(frozen=True)
class Scale:
    """Sizes of a run.

    Attributes:
      narrow: width of the chain.
      wide: width between two layers of the chain.
      square: width of the 2:4 layers.
      blocks: pairs of layers in the chain.
      layers: layers that the table's calls take in turn.
      densities: of constant fan-in.
      table_densities: of constant fan-in in the table.
      block_densities: of blocks in the table.
      patterns: n and m in the table.
      values: dtypes of their values.
      sizes: outputs and inputs of blocks.
      single, chain, nm, block, table: batch sizes of the sections.
      rounds: rounds of timing, fewer for the table; three times as many at batch 1.
      target: seconds of a form and round.
    """

    narrow: int = 768
    wide: int = 3072
    square: int = 4096
    blocks: int = 6
    layers: int = 5
    densities: tuple[float, ...] = (0.5, 0.2, 0.1, 0.05, 0.01)
    table_densities: tuple[float, ...] = (0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01)
    block_densities: tuple[float, ...] = (0.5, 0.2, 0.1, 0.05)
    patterns: tuple[tuple[int, int], ...] = ((2, 4), (1, 4), (4, 8), (1, 8))
    values: tuple[str, ...] = ("float32", "bfloat16", "int8")
    sizes: tuple[tuple[int, int], ...] = ((4, 1), (16, 1), (1, 16), (16, 16), (32, 32))
    single: tuple[int, ...] = (1, 8, 64, 512)
    chain: tuple[int, ...] = (1, 8, 64, 256, 512)
    nm: tuple[int, ...] = (1, 8, 64, 256)
    block: tuple[int, ...] = (1, 8, 64, 512)
    table: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
    rounds: tuple[int, int] = (7, 5)
    target: float = 0.01


SMOKE = Scale(
    narrow=32,
    wide=64,
    square=32,
    blocks=1,
    layers=2,
    densities=(0.1,),
    table_densities=(0.1,),
    block_densities=(0.1,),
    patterns=((2, 4),),
    values=("bfloat16",),
    sizes=((16, 1),),
    single=(1,),
    chain=(1,),
    nm=(1,),
    block=(1,),
    table=(2,),
    rounds=(2, 2),
    target=0.0,
)


class Benchmark:
    """The settings of a run, its peer and its rows."""

    def __init__(self, options: argparse.Namespace):
        """Start the peer and time reading."""
        self.options = options
        self.scale = SMOKE if options.smoke else Scale()
        self.rows: list[dict[str, Any]] = []
        scale = self.scale
        self.pair = ((scale.narrow, scale.wide), (scale.wide, scale.narrow))
        self.squares = ((scale.square, scale.square),) * 4
        self.torch = self.start_torch()
        print(f"torch: {self.torch}" if isinstance(self.torch, str) else self.version)
        self.read = matmul_cases.ReadSpeed(
            *((2**20, 0.001) if options.smoke else (2**28, 0.1))
        )
        print(f"reading: {self.read}")

    @property
    def version(self) -> str:
        """Say which torch is there."""
        assert isinstance(self.torch, timing.Peer)
        return f"torch: {self.torch.version}, in a process of its own"

    def start_torch(self) -> timing.Peer | str:
        """Start torch in a process of its own, or say why there is none."""
        python = timing.python_with("torch", self.options.peer_python)
        if python is None:
            return "not importable here (--peer-python names an interpreter with it)"
        scale, kinds = self.scale, ["torch dense", "torch CSR"]
        sparse = {"densities": scale.densities, "kinds": kinds}
        chains: dict[str, Any] = {
            matmul_cases.layers_of(shapes): {"shapes": shapes} | sparse
            for shapes in ((self.pair[0],), (self.pair[1],), self.pair * scale.blocks)
        }
        chains[matmul_cases.layers_of(self.squares)] = {
            "shapes": self.squares,
            "densities": [0.5],
            "kinds": ["torch dense", "torch int8"],
        }
        batches = sorted({*scale.single, *scale.chain, *scale.nm})
        settings = {"threads": threads(), "batches": batches, "chains": chains}
        script = os.path.join(os.path.dirname(__file__), "matmul_torch.py")
        return timing.Peer(script, [json.dumps(settings)], python)

    def single(self) -> None:
        """Compare single layers of constant fan-in."""
        for shape in reversed(self.pair):
            for density in self.scale.densities:
                case = Case("single", (shape,), "FanIn", density)
                self.compare(case, self.scale.single, SPARSE)

    def chain(self) -> None:
        """Compare chains of constant fan-in."""
        shapes = self.pair * self.scale.blocks
        for density in self.scale.densities:
            case = Case("chain", shapes, "FanIn", density)
            self.compare(case, self.scale.chain, SPARSE)

    def nm(self) -> None:
        """Compare chains of 2:4 weights."""
        for values in ("float32", "bfloat16", "int8"):
            case = Case("nm", self.squares, "NM", 0.5, (2, 4), values)
            mixed = ("native, x float32",) if values == "bfloat16" else ()
            names = (*XLA, *mixed, "torch dense", "torch int8")
            self.compare(case, self.scale.nm, names)

    def block(self) -> None:
        """Compare chains of blocks."""
        shapes = self.pair * self.scale.blocks
        for sides in self.scale.sizes:
            case = Case("block", shapes, "Block", 0.1, sides)
            names = (*XLA, "blocks", "scipy BSR")
            self.compare(case, self.scale.block, names)

    def table(self) -> None:
        """Time what dispatch can choose from."""
        scale = self.scale
        names = ("dense", "masked dense", "nmjax", *choosing.NATIVE, "decompress")

        def case(*layout: Any, values: str = "float32") -> Case:
            # Twice as many layers in half the bytes exceed the cache too.
            layers = scale.layers * (2 if values == "bfloat16" else 1)
            shapes = (self.pair[1],) * layers
            return Case("table", shapes, *layout, values=values, apart=True)

        for density in scale.table_densities:
            self.compare(case("FanIn", density), scale.table, (*names, "slots"))
            self.compare(case("Window", density), scale.table, names)
        for n, m in scale.patterns:
            for values in scale.values:
                small = case("NM", n / m, (n, m), values=values)
                self.compare(small, scale.table, names)
        for sides in scale.sizes:
            for density in scale.block_densities:
                small = case("Block", density, sides)
                self.compare(small, scale.table, (*names, "blocks"))

    def compare(self, case: Case, batches: Sequence[int], names: Sequence[str]) -> None:
        """Time the forms of a case at each batch size, and keep and print the rows."""
        try:
            weights = matmul_cases.make_weights(case)
        except Unavailable as error:
            print(f"\n{case.title}: left out, {error}", flush=True)
            self.rows += [
                case.fields() | {"batch": batch, "form": name, "absent": str(error)}
                for batch in batches
                for name in names
            ]
            return
        for batch in batches:
            x = jnp.asarray(matmul_cases.normal((batch, case.shapes[0][0]), batch))
            forms = matmul_forms.forms_of(case, weights, x, names, self.torch)
            rows = self.time(case, batch, forms)
            self.rows += rows
            if case.section == "table":
                print(matmul_report.cell_to_line(rows), flush=True)
            else:
                title = f"{case.title}, batch {batch}"
                print(matmul_report.cell_to_text(title, rows), flush=True)

    def time(
        self, case: Case, batch: int, forms: dict[str, Form | str]
    ) -> list[dict[str, Any]]:
        """Time the forms of one cell."""
        ready: dict[str, Any] = {}
        for name, form in forms.items():
            if isinstance(form, Form):
                forms[name] = matmul_forms.too_slow(form, self.options.patience) or form
        ready = {name: f.call for name, f in forms.items() if isinstance(f, Form)}
        table = case.section == "table"
        rounds = self.options.rounds or self.scale.rounds[table]
        if batch == 1 and not table:
            rounds *= 3  # short calls suffer most from what else the machine does
        found = self.measure(ready, rounds)
        pick, other = found.get("nmjax"), found.get("masked dense")
        if pick and other and pick.ratio > SLOWEST_PICK * other.ratio:
            again = {name: ready[name] for name in (BASE, "masked dense", "nmjax")}
            found |= self.measure(again, 3 * rounds)
        own = found["dense" if "dense" in found else BASE].ratio
        rows = []
        for name, form in forms.items():
            row = case.fields() | {"batch": batch, "form": name}
            if isinstance(form, str):
                rows.append(row | {"absent": form})
                continue
            result = found[name]
            if name == BASE and "dense" not in found:
                row["form"] = "dense"
            row |= {"ms": result.ms, "ratio_to_float32": result.ratio}
            row |= {"ratio_to_dense": result.ratio / own}
            row |= {"low": result.low / own, "high": result.high / own}
            row |= {"limit_ms": self.read.ms(form.touched), "note": form.note}
            rows.append(row)
        return rows

    def measure(self, ready: dict[str, Any], rounds: int) -> dict[str, timing.Timing]:
        """Time functions beside the base; those that take long fewer times."""
        return timing.measure(ready, BASE, rounds, self.scale.target, slow=0.3)


def threads() -> int:
    """Count the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def main(argv: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--section", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--rounds", type=int, help="rounds of timing (7, table 5)")
    parser.add_argument("--patience", type=float, default=2.0, help="seconds a call")
    parser.add_argument("--peer-python", metavar="PATH", help="interpreter with torch")
    parser.add_argument("--json", metavar="FILE", help="write all results as JSON")
    parser.add_argument("--plot", metavar="FILE", help="draw speed-ups against batch")
    parser.add_argument("--markdown", metavar="FILE", help="write the table of forms")
    parser.add_argument("--forms", metavar="FILE", help="write what dispatch reads")
    parser.add_argument("--smoke", action="store_true", help="tiny, for the tests")
    parser.add_argument(
        "--runs",
        metavar="FILE",
        nargs="+",
        type=pathlib.Path,
        help="time nothing: combine what --json wrote in these runs",
    )
    options = parser.parse_args(argv)
    if options.runs:
        runs = [json.loads(path.read_text()) for path in options.runs]
        machine = runs[0]["machine"] | {"runs": str(len(runs))}
        runs = [run["rows"] for run in runs]
        results = write(options, machine, matmul_report.combined(runs))
        # What is seldom slow shall be chosen, not what is fast on a good day.
        means = matmul_report.combined(runs, statistics.geometric_mean)
    else:
        results = run(options)
        means = results["rows"]
    print(matmul_report.bars_to_text(results["bars"]))
    if options.markdown:
        text = matmul_report.to_markdown(results["best"], results["machine"])
        pathlib.Path(options.markdown).write_text(text)
    if options.forms:
        table = [row for row in means if row["section"] == "table"]
        forms = matmul_report.to_forms(table, results["machine"])
        pathlib.Path(options.forms).write_text(matmul_report.to_json(forms))
    if options.plot:
        processor = results["machine"]["processor"]
        matmul_report.plot(results["rows"], options.plot, processor)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Time the sections that were asked for."""
    if not options.smoke:
        timing.keep_pages()
    machine = timing.describe() | {"threads": str(threads())}
    for name, value in machine.items():
        print(f"{name}: {value}")
    benchmark = Benchmark(options)
    if isinstance(benchmark.torch, timing.Peer):
        machine["torch"] = benchmark.torch.version
    results: dict[str, Any] = {}
    for name in (name for name in SECTIONS if name in options.section):
        start = time.perf_counter()
        getattr(benchmark, name)()
        print(f"\n{name}: {time.perf_counter() - start:.0f} s", flush=True)
        # After each section: a run that is stopped has given some.
        results = write(options, machine, benchmark.rows)
    if isinstance(benchmark.torch, timing.Peer):
        benchmark.torch.close()
    return results


def write(
    options: argparse.Namespace, machine: dict[str, str], rows: list[Any]
) -> dict[str, Any]:
    """Make results of rows, and write them where --json says."""
    table = [row for row in rows if row["section"] == "table"]
    results = {
        "machine": machine,
        "bars": matmul_report.verdicts([] if options.smoke else rows),
        "best": matmul_report.best_forms(table),
        "rows": rows,
    }
    if options.json:
        pathlib.Path(options.json).write_text(matmul_report.to_json(results))
    return results


if __name__ == "__main__":
    main()
