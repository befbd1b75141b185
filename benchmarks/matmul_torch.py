"""What torch takes for the products of matmul.py; it is started by that script.

python benchmarks/matmul_torch.py JSON

JSON: {"threads": 2, "batches": [1], "chains": {name: {"shapes": [[K, F]],
"densities": [0.1], "kinds": ["torch dense", "torch CSR", "torch int8"]}}}
"""

import functools
import json
import math
import sys
import warnings
from typing import Any

import numpy as np
import timing
import torch  # pyright: ignore[reportMissingImports]

TOLERANCE = {"torch dense": 1e-4, "torch CSR": 1e-4, "torch int8": 1e-1}


class Chains:
    """Weights of the chains, made when they are first asked for."""

    def __init__(self, chains: dict[str, Any]):
        """Remember what the chains look like."""
        self.chains = chains
        # All chains together may exceed the memory. Calls hold what they need.
        self.dense = functools.lru_cache(1)(self.make_dense)
        self.sparse = functools.lru_cache(1)(self.make_sparse)
        self.quantized = functools.lru_cache(1)(self.make_quantized)
        self.ready = functools.lru_cache(4)(self.make_call)

    def make_dense(self, name: str, density: float) -> list[Any]:
        """Make weights ``(F, K)`` of constant fan-in, copies for layers of a shape."""
        made = {}
        rng = np.random.default_rng(0)
        shapes = [tuple(shape) for shape in self.chains[name]["shapes"]]
        for inputs, outputs in dict.fromkeys(shapes):
            k = max(1, round(density * inputs))
            weights = np.zeros((outputs, inputs), np.float32)
            kept = np.argpartition(rng.random(weights.shape), k - 1, axis=1)[:, :k]
            values = rng.normal(size=(outputs, k)) * math.sqrt(2 / k)
            np.put_along_axis(weights, kept, values.astype(np.float32), axis=1)
            made[inputs, outputs] = torch.from_numpy(weights)
        return [made[shape].clone() for shape in shapes]

    def make_sparse(self, name: str, density: float) -> list[Any]:
        """Make the same weights as CSR."""
        return [w.to_sparse_csr() for w in self.dense(name, density)]

    def make_quantized(self, name: str, density: float) -> Any:
        """Make dynamically quantized linear layers of the same weights."""
        layers = []
        for w in self.dense(name, density):
            linear = torch.nn.Linear(w.shape[1], w.shape[0], bias=False)
            linear.weight = torch.nn.Parameter(w, requires_grad=False)
            layers += [linear, torch.nn.ReLU()]
        model = torch.nn.Sequential(*layers[:-1])
        quantize = torch.ao.quantization.quantize_dynamic
        return quantize(model, {torch.nn.Linear}, dtype=torch.qint8)

    def make_call(self, name: str, density: float, batch: int, kind: str) -> Any:
        """Give a checked function without arguments."""
        inputs = self.chains[name]["shapes"][0][0]
        x = torch.randn(batch, inputs, generator=torch.Generator().manual_seed(0))
        dense = self.dense(name, density)
        if kind == "torch dense":
            return lambda: chain_of_rows(x, dense)
        expected = chain_of_rows(x, dense)
        if kind == "torch int8":
            model = self.quantized(name, density)
            check(kind, model(x), expected)
            return lambda: model(x)
        sparse = self.sparse(name, density)
        columns = x[0].contiguous() if batch == 1 else x.T.contiguous()
        check(kind, chain_of_columns(columns, sparse).reshape(-1, batch).T, expected)
        return lambda: chain_of_columns(columns, sparse)


def chain_of_rows(x: Any, weights: list[Any]) -> Any:
    """Run a chain of dense layers, ReLU between them."""
    x = x @ weights[0].T
    for w in weights[1:]:
        x = x.relu_() @ w.T
    return x


def chain_of_columns(x: Any, weights: list[Any]) -> Any:
    """Run a chain of sparse layers on inputs whose batch comes last."""
    x = weights[0] @ x
    for w in weights[1:]:
        x = w @ x.relu_()
    return x


def check(kind: str, found: Any, expected: Any) -> None:
    """Raise ArithmeticError if a result is not that of the dense layers."""
    error = float((found - expected).abs().max() / expected.abs().max())
    if not error <= TOLERANCE[kind]:
        raise ArithmeticError(f"{kind} is wrong by {error:.2g} of the largest entry")


def main() -> None:
    """Serve the functions of all chains, densities and batches."""
    warnings.filterwarnings("ignore")  # sparse CSR is a beta, dynamic int8 deprecated
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(settings["threads"])
    torch.set_grad_enabled(False)
    chains = Chains(settings["chains"])
    functions = {}
    for name, chain in settings["chains"].items():
        for density in chain["densities"]:
            for batch in settings["batches"]:
                for kind in chain["kinds"]:
                    key = f"{name}, {density:g}, {batch}, {kind}"
                    of = functools.partial(chains.ready, name, density, batch, kind)
                    functions[key] = lambda of=of: of()()
    timing.serve(functions, torch.__version__)


if __name__ == "__main__":
    main()
