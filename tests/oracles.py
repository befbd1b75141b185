"""Slow NumPy loops that say what every mask must be, one entry at a time."""

import functools
import itertools

import numpy as np
from scipy.optimize import linprog


def order(score) -> tuple:
    """Sort key of a score, best first: NaN, then descending."""
    score = float(score)
    return (0, 0.0) if np.isnan(score) else (1, -score)


def best(scores, k: int) -> list[int]:
    """Return the places of the k best scores of a list; ties take the first."""
    return sorted(range(len(scores)), key=lambda i: (*order(scores[i]), i))[:k]


def nm_mask(scores, n: int, m: int, axis: int = -2) -> np.ndarray:
    scores = np.moveaxis(np.asarray(scores), axis, -1)
    mask = np.zeros(scores.shape, bool)
    for place in np.ndindex(*scores.shape[:-1]):
        for start in range(0, scores.shape[-1], m):
            for i in best(scores[place][start : start + m], n):
                mask[(*place, start + i)] = True
    return np.moveaxis(mask, -1, axis)


def vnm_mask(scores, v, n, m, axis=-2, vector_axis=-1) -> np.ndarray:
    scores = np.moveaxis(np.asarray(scores), (vector_axis, axis), (-2, -1))
    mask = np.zeros(scores.shape, bool)
    rows, columns = scores.shape[-2:]
    starts = itertools.product(range(0, rows, v), range(0, columns, m))
    for (row, column), place in itertools.product(
        starts, np.ndindex(*scores.shape[:-2])
    ):
        block = scores[place][row : row + v, column : column + m]
        chosen = sorted(best(block.astype(np.float32).sum(0), 4))
        for i in range(v):
            for j in best(block[i, chosen], n):
                mask[(*place, row + i, column + chosen[j])] = True
    return np.moveaxis(mask, (-2, -1), (vector_axis, axis))


def topk_mask(scores, k: int, axis=None) -> np.ndarray:
    scores = np.asarray(scores)
    axes = range(scores.ndim) if axis is None else np.atleast_1d(axis)
    axes = [int(a) % scores.ndim for a in axes]
    others = [a for a in range(scores.ndim) if a not in axes]
    mask = np.zeros(scores.shape, bool)
    for place in np.ndindex(*(scores.shape[a] for a in others)):
        index: list = [slice(None)] * scores.ndim
        for a, i in zip(others, place, strict=True):
            index[a] = i
        part = mask[tuple(index)]  # a view: axes keep their order
        flat = np.zeros(part.size, bool)
        flat[best(scores[tuple(index)].ravel(), k)] = True
        mask[tuple(index)] = flat.reshape(part.shape)
    return mask


def global_topk_mask(leaves, k: int) -> list[np.ndarray]:
    flat = np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in leaves])
    mask = topk_mask(flat, k)
    ends = np.cumsum([np.size(leaf) for leaf in leaves])
    parts = np.split(mask, ends[:-1])
    return [
        part.reshape(np.shape(leaf)) for part, leaf in zip(parts, leaves, strict=True)
    ]


def block_mask(scores, k, block, axes=(-2, -1), batch_axes=()) -> np.ndarray:
    scores = np.asarray(scores)
    lengths = [1] * scores.ndim
    for axis, length in zip(axes, block, strict=True):
        lengths[axis] = length
    grid = [size // length for size, length in zip(scores.shape, lengths, strict=True)]
    sums = np.zeros(grid, np.float32)
    for place in np.ndindex(*scores.shape):
        at = tuple(i // length for i, length in zip(place, lengths, strict=True))
        sums[at] += np.float32(scores[place])
    along = [
        a for a in range(scores.ndim) if a not in [b % scores.ndim for b in batch_axes]
    ]
    kept = topk_mask(sums, k, along)
    mask = np.zeros(scores.shape, bool)
    for place in np.ndindex(*scores.shape):
        mask[place] = kept[
            tuple(i // length for i, length in zip(place, lengths, strict=True))
        ]
    return mask


def channel_mask(scores, k, axis=-1, batch_axes=()) -> np.ndarray:
    block = [size for size in np.shape(scores)]
    for a in (axis, *batch_axes):
        block[a] = 1
    return block_mask(scores, k, block, range(np.ndim(scores)), batch_axes)


@functools.cache
def transposable_patterns(n: int, m: int) -> np.ndarray:
    """List all m x m patterns with n ones in every row and every column."""
    rows = [np.isin(np.arange(m), kept) for kept in itertools.combinations(range(m), n)]
    return np.array(
        [
            pattern
            for pattern in itertools.product(rows, repeat=m)
            if (np.sum(pattern, axis=0) == n).all()
        ]
    )


def best_transposable_sum(block, n: int) -> float:
    """Return the highest sum that an n of m pattern of one m x m block can keep."""
    patterns = transposable_patterns(n, len(block))
    return float((patterns * np.asarray(block, np.float64)).sum((1, 2)).max())


def best_transposable_sum_by_flow(block, n: int) -> float:
    """Return the same by linear programming, whose optimum is a 0-1 pattern."""
    m = len(block)
    one, each = np.ones((1, m)), np.eye(m)
    counts = np.concatenate([np.kron(each, one), np.kron(one, each)])
    weights = -np.asarray(block, np.float64).ravel()
    result = linprog(weights, A_eq=counts, b_eq=np.full(2 * m, n), bounds=(0, 1))
    return -result.fun
