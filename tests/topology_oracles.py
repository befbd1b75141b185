"""Slow NumPy loops for the rules of `nmjax.topology`, written from the papers."""

import math

import numpy as np


def largest(scores, k):
    """Indices of the k largest of a dict index -> score, ties to the lowest index."""
    order = sorted(scores, key=lambda index: (-scores[index], index))
    return set(order[:k])


def drop_count(active, fraction):
    return min(active, math.floor(np.float32(active) * np.float32(fraction) + 1e-3))


def rigl(weights, mask, grads, fraction):
    active = [tuple(i) for i in np.argwhere(mask)]
    dropped = drop_count(len(active), fraction)
    kept = largest({i: abs(weights[i]) for i in active}, len(active) - dropped)
    free = {i: abs(grads[i]) for i in np.ndindex(mask.shape) if i not in kept}
    new = np.zeros(mask.shape, bool)
    for index in kept | largest(free, dropped):
        new[index] = True
    return new


def srigl(weights, mask, grads, budget, fraction, gamma):
    neurons = weights.shape[-1]
    inputs = weights.size // neurons
    active = [tuple(i) for i in np.argwhere(mask)]
    dropped = drop_count(len(active), fraction)
    kept = largest({i: abs(weights[i]) for i in active}, len(active) - dropped)
    everywhere = {i: abs(grads[i]) for i in np.ndindex(mask.shape)}
    salient = kept | largest(everywhere, dropped)
    counts = [sum(i[-1] == n for i in salient) for n in range(neurons)]
    threshold = 0
    if gamma is not None:
        share = gamma if gamma >= 1 else gamma * (budget // neurons)
        threshold = max(1, math.floor(share + 1e-9))
        guard = max(1, budget // inputs)
        threshold = min(threshold, sorted(counts, reverse=True)[guard - 1])
    alive = [n for n in range(neurons) if counts[n] >= threshold]
    fan_in = min(inputs, budget // len(alive))
    new = np.zeros(mask.shape, bool)
    for n in alive:
        mine = {i: abs(weights[i]) for i in kept if i[-1] == n}
        chosen = largest(mine, fan_in)
        free = {i: g for i, g in everywhere.items() if i[-1] == n and i not in chosen}
        for index in chosen | largest(free, fan_in - len(chosen)):
            new[index] = True
    return new
