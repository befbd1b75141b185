r"""Serve compressed models: whole files, standard input, or HTTP.

`compress.py` leaves the models. Without any argument, this trains the smallest of them
first, a convolutional network with 2:4 weights on scikit-learn's digits, then answers
some of its test images in batches of several sizes and prints how long that took.

    python examples/serve.py                                      # works anywhere
    python examples/serve.py --model runs/compress/vit-nnx-srigl-seed0/model --check
    python examples/serve.py --input images.npy --output classes.txt

    python examples/compress.py --model translator --library linen --method srste
    M=runs/compress/translator-linen-srste-seed0/model
    echo "vom 3. März 1997 bis 12. Juli 2004" | python examples/serve.py -m $M -i -
    python examples/serve.py --model $M --http 8000
    curl localhost:8000/answer -d '{"sentences": ["vom 1. Mai 1999 bis 2. Juni 2000"]}'

Inputs of a classifier are images in a ``.npy`` file, uint8 ``(n, height, width,
channels)``, those of a translator are lines of text. Answers are written one per line.
``--check`` answers with the dense weights too and fails if an answer differs.
``--prepare`` lays constant fan-in weights (of ``--method srigl``) out for this CPU,
which is faster for large layers and small batches.

Requests are filled up to the next of a few fixed batch sizes (``--sizes``), so that XLA
compiles few programs, all of them before the first request. `serving.py` has the
server. Stop it with Ctrl-C: it prints the latencies.

Time: 19 seconds without any argument, training included; one image is answered in 0.11
ms, 64 in 0.74 (medians). 2 cores of an AMD EPYC, jax 0.10.2.
"""

import argparse
import contextlib
import pathlib
import signal
import sys
from collections.abc import Sequence
from typing import Any, TextIO

import clients
import common
import compress
import numpy as np
from clients import Client
from serving import Engine, Server
from tqdm import tqdm

import nmjax as nm
from nmjax import formats

DEFAULT = "cnn-linen-srste-seed0"


def serve_http(engine: Engine, host: str, port: int) -> None:
    """Serve until Ctrl-C or SIGTERM, then print the latencies."""

    def stop(*_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    with Server((host, port), engine) as server:
        print(f"serving on http://{host}:{server.server_port}/answer", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            pass
    if server.meter.calls:
        requests = common.format_table([server.meter.row("items")])
        print(f"requests\n{requests}\nbatches\n{engine.table()}", flush=True)


def read_items(client: Client, path: str) -> Sequence[Any]:
    """Read images of a ``.npy`` file, or lines of a file or of standard input (-)."""
    if client.field == "images":
        if path == "-":
            raise ValueError("--input - is for lines of text; give images as a .npy")
        images = np.load(path, allow_pickle=False)
        if not isinstance(images, np.ndarray) or images.ndim < 3:
            raise ValueError(f"{path} has no array of images (n, height, width, ...)")
        return list(images)
    with contextlib.ExitStack() as stack:
        lines = sys.stdin
        if path != "-":
            lines = stack.enter_context(open(path, encoding="utf-8"))
        return [line.rstrip("\n") for line in lines]


def answer_all(engine: Engine, items: Sequence[Any], out: TextIO | None) -> list[Any]:
    """Answer every item, in order, and write each answer in a line."""
    answers, most = [], engine.sizes[-1]
    with tqdm(total=len(items), disable=not sys.stderr.isatty()) as progress:
        for start in range(0, len(items), most):
            found = engine(items[start : start + most], start)
            if out is not None:
                out.writelines(f"{answer}\n" for answer in found)
            answers += found
            progress.update(len(found))
    return answers


def demonstrate(engine: Engine, items: Sequence[Any]) -> list[Any]:
    """Answer the same items in batches of every size; return the last answers."""
    answers = []
    for size in engine.sizes:
        answers = []
        for start in range(0, len(items), size):
            answers += engine(items[start : start + size])
    return answers


def show(items: Sequence[Any], answers: Sequence[Any]) -> None:
    """Print some answers."""
    for index in range(min(3, len(items))):
        item = items[index] if isinstance(items[index], str) else f"image {index}"
        print(f"{item} -> {answers[index]}")


# The script -------------------------------------------------------------------------


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Serve a compressed model.")
    add = parser.add_argument
    add(
        "-m",
        "--model",
        type=pathlib.Path,
        help="folder `model` of a run of compress.py; default: train a small one",
    )
    add("-i", "--input", help=".npy of images or lines of text; - is standard input")
    add("-o", "--output", type=pathlib.Path, help="default: standard output")
    add("--http", type=int, metavar="PORT", help="serve HTTP; 0 takes a free port")
    add(
        "--host",
        default="127.0.0.1",
        help="address to listen on (default: %(default)s)",
    )
    add("--sizes", type=int, nargs="+", default=[1, 8, 64], help="of batches")
    add("--dense", action="store_true", help="serve the dense weights")
    add("--check", action="store_true", help="compare with the dense weights")
    add("--prepare", action="store_true", help="lay weights out for this CPU")
    add("--out", type=pathlib.Path, default=pathlib.Path("runs/compress"))
    add(
        "--smoke", action="store_true", help="train for a few steps, to test the script"
    )
    options = parser.parse_args(arguments)
    if min(options.sizes) < 1:
        parser.error(f"--sizes {min(options.sizes)} is no size of a batch")
    return options


def find_model(options: argparse.Namespace) -> pathlib.Path:
    """Return the folder of the model; train one if none is named and none is there."""
    if options.model is not None:
        return options.model
    folder = options.out / DEFAULT / "model"
    if not (folder / "client.json").is_file():
        print(f"there is no {folder}: training it", file=sys.stderr, flush=True)
        chosen = ["--model", "cnn", "--library", "linen", "--method", "srste"]
        smoke = ["--smoke"] * options.smoke
        compress.main([*chosen, "--out", str(options.out), *smoke])
    return folder


def load_engine(
    folder: pathlib.Path, dense: bool, sizes: Sequence[int], prepare: bool = False
) -> Engine:
    """Load a model and compile it."""
    client, _ = clients.load(folder)
    name = "dense" if dense else "compressed"
    if not (folder / name).is_dir():
        raise FileNotFoundError(
            f"{folder} has no {name} weights: give a model that was trained sparse, or "
            "--dense"
        )
    variables = clients.load_variables(folder / name, client)
    total = formats.sizes(variables.params)[-1]
    print(
        f"{folder}: {name} weights, {total['bytes']:,} bytes, "
        f"{total['ratio']:.2f} of dense",
        file=sys.stderr,
        flush=True,
    )
    if prepare:
        variables = variables._replace(params=nm.prepare(variables.params, "cpu"))
    return Engine(client, variables, sizes)


def main(arguments: list[str] | None = None) -> None:
    """Load a model and serve it."""
    options = parse(arguments)
    folder = find_model(options)
    engine = load_engine(folder, options.dense, options.sizes, options.prepare)
    if options.http is not None:
        return serve_http(engine, options.host, options.http)
    if options.input is None:
        items = clients.load(folder)[1]
        answers = demonstrate(engine, items)
        show(items, answers)
    else:
        items = read_items(engine.client, options.input)
        with contextlib.ExitStack() as stack:
            out = sys.stdout
            if options.output is not None:
                out = stack.enter_context(options.output.open("w", encoding="utf-8"))
            answers = answer_all(engine, items, out)
    print(f"{engine.table()}\n{common.hardware()}", file=sys.stderr)
    if options.check:
        dense = load_engine(folder, True, options.sizes)
        if options.input is None:
            expected = demonstrate(dense, items)
        else:
            expected = answer_all(dense, items, None)
        print(dense.table(), file=sys.stderr)
        equal = sum(a == b for a, b in zip(answers, expected, strict=True))
        print(f"{equal} of {len(items)} answers equal those of the dense weights")
        if equal < len(items):
            raise SystemExit(1)


if __name__ == "__main__":
    main()
