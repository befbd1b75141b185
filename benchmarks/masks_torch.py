"""What torch takes for the masks of masks.py; it is started by that script.

python benchmarks/masks_torch.py SIZE THREADS
"""

import itertools
import sys

import numpy as np
import timing
import torch  # pyright: ignore[reportMissingImports]


def nm_mask(scores: torch.Tensor, n: int, m: int, axis: int) -> torch.Tensor:
    """Keep n of m along axis by topk and scatter."""
    groups = scores.abs().movedim(axis, -1).reshape(-1, m)
    kept = groups.topk(n, dim=1, sorted=False).indices
    mask = torch.zeros(groups.shape, dtype=torch.bool).scatter_(1, kept, True)
    return mask.reshape(scores.movedim(axis, -1).shape).movedim(-1, axis)


def topk_mask(scores: torch.Tensor, k: int, axis: int | None) -> torch.Tensor:
    """Keep k by topk and scatter."""
    rows = scores.abs().flatten() if axis is None else scores.abs()
    axis = 0 if axis is None else axis
    kept = rows.topk(k, dim=axis, sorted=False).indices
    mask = torch.zeros(rows.shape, dtype=torch.bool).scatter_(axis, kept, True)
    return mask.reshape(scores.shape)


def transposable_patterns() -> torch.Tensor:
    """Return the 90 patterns of 2:4 in rows and columns as columns of a matrix."""
    rows = [[float(i in kept) for i in range(4)] for kept in _pairs()]
    patterns = [p for p in itertools.product(rows, repeat=4) if _is_transposable(p)]
    return torch.tensor(patterns).reshape(-1, 16).T.contiguous()


def transposable_mask(scores: torch.Tensor, patterns: torch.Tensor) -> torch.Tensor:
    """Keep the best of all patterns of every block by one matrix product."""
    size = scores.shape[0] // 4
    blocks = scores.abs().reshape(size, 4, size, 4).transpose(1, 2).reshape(-1, 16)
    best = (blocks @ patterns).argmax(1)
    mask = patterns.T.bool()[best].reshape(size, size, 4, 4).transpose(1, 2)
    return mask.reshape(scores.shape)


def _pairs():
    return itertools.combinations(range(4), 2)


def _is_transposable(rows) -> bool:
    return all(sum(row[i] for row in rows) == 2 for i in range(4))


def main() -> None:
    """Serve the functions of the size and threads given on the command line."""
    size, threads = map(int, sys.argv[1:])
    torch.set_num_threads(threads)
    values = np.random.default_rng(0).normal(size=(size, size)).astype(np.float32)
    scores = torch.from_numpy(values)
    patterns = transposable_patterns()
    k = scores.numel() // 10
    functions = {"transposable 2:4": lambda: transposable_mask(scores, patterns)}
    for axis in (0, -1):
        functions[f"2:4 axis {axis}"] = lambda a=axis: nm_mask(scores, 2, 4, a)
        functions[f"4:16 axis {axis}"] = lambda a=axis: nm_mask(scores, 4, 16, a)
        functions[f"top-k axis {axis}"] = lambda a=axis: topk_mask(
            scores, size // 10, a
        )
    functions["top-k flat"] = lambda: topk_mask(scores, k, None)
    functions["topk alone"] = lambda: scores.abs().flatten().topk(k, sorted=False)
    timing.serve(functions, torch.__version__)


if __name__ == "__main__":
    main()
