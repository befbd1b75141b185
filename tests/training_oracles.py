"""Published training rules as slow NumPy loops over single weights."""

import math

import numpy as np


def nm_mask(w, n, m):
    """Keep the n largest magnitudes of every m consecutive rows of a column."""
    kept = np.zeros(w.shape, bool)
    for column in range(w.shape[1]):
        for first in range(0, w.shape[0], m):
            group = range(first, first + m)
            best = sorted(group, key=lambda row: (-abs(w[row, column]), row))[:n]
            for row in best:
                kept[row, column] = True
    return kept


def soft_threshold(w, n, m):
    """S-STE: subtract the (m - n)-th smallest magnitude of each group."""
    out = np.zeros(w.shape)
    for column in range(w.shape[1]):
        for first in range(0, w.shape[0], m):
            sizes = sorted(abs(w[row, column]) for row in range(first, first + m))
            bound = sizes[m - n - 1] if n < m else 0.0
            for row in range(first, first + m):
                size = max(abs(w[row, column]) - bound, 0.0)
                out[row, column] = math.copysign(size, w[row, column])
    return out


def smooth_scale(w, n, m):
    """S-STE: the factor that minimises the squared error of the projection."""
    soft, dot, norm = soft_threshold(w, n, m), 0.0, 0.0
    for index in np.ndindex(w.shape):
        dot += w[index] * soft[index]
        norm += soft[index] ** 2
    return dot / norm


def srste_sgd(w, gradient, steps, rate, decay, n, m):
    """W <- W - rate * (g(E W) + decay * (1 - E) W)."""
    w = w.copy()
    for _ in range(steps):
        kept = nm_mask(w, n, m)
        g = gradient(np.where(kept, w, 0.0))
        new = w.copy()
        for index in np.ndindex(w.shape):
            pull = 0.0 if kept[index] else decay * w[index]
            new[index] = w[index] - rate * (g[index] + pull)
        w = new
    return w


def srste_decoupled(w, gradient, steps, rate, decay, n, m, b1, b2, eps):
    """Adam, then W <- W - rate * decay * (1 - E) W besides."""
    w, mu, nu = w.copy(), np.zeros(w.shape), np.zeros(w.shape)
    for t in range(1, steps + 1):
        kept = nm_mask(w, n, m)
        g = gradient(np.where(kept, w, 0.0))
        new = w.copy()
        for index in np.ndindex(w.shape):
            mu[index] = b1 * mu[index] + (1 - b1) * g[index]
            nu[index] = b2 * nu[index] + (1 - b2) * g[index] ** 2
            mean, second = mu[index] / (1 - b1**t), nu[index] / (1 - b2**t)
            pull = 0.0 if kept[index] else decay * w[index]
            step = mean / (math.sqrt(second) + eps) + pull
            new[index] = w[index] - rate * step
        w = new
    return w


def ast(w, gradient, steps, rate, decay, n, m, b1, b2, eps):
    """First moment of the gradient, second moment of first moment plus decay."""
    w, mu, nu = w.copy(), np.zeros(w.shape), np.zeros(w.shape)
    for t in range(1, steps + 1):
        kept = nm_mask(w, n, m)
        g = gradient(np.where(kept, w, 0.0))
        new = w.copy()
        for index in np.ndindex(w.shape):
            mu[index] = b1 * mu[index] + (1 - b1) * g[index]
            r = mu[index] / (1 - b1**t) + (0.0 if kept[index] else decay * w[index])
            nu[index] = b2 * nu[index] + (1 - b2) * r**2
            second = nu[index] / (1 - b2**t)
            new[index] = w[index] - rate * r / (math.sqrt(second) + eps)
        w = new
    return w


def step(w, gradient, steps, rate, n, m, b1, b2, eps, threshold, window):
    """Dense Adam, then masks with a frozen second moment; gives the switch too."""
    w, mu, nu = w.copy(), np.zeros(w.shape), np.zeros(w.shape)
    changes, switch = [], None
    for t in range(1, steps + 1):
        sparse = switch is not None
        used = np.where(nm_mask(w, n, m), w, 0.0) if sparse else w
        g = gradient(used)
        seen = switch if sparse else t
        total, new = 0.0, w.copy()
        for index in np.ndindex(w.shape):
            mu[index] = b1 * mu[index] + (1 - b1) * g[index]
            if not sparse:
                old = nu[index]
                nu[index] = b2 * old + (1 - b2) * g[index] ** 2
                total += abs(nu[index] - old)
            mean, second = mu[index] / (1 - b1**t), nu[index] / (1 - b2**seen)
            new[index] = w[index] - rate * mean / (math.sqrt(second) + eps)
        w = new
        if not sparse:
            changes.append(total / w.size)
            full = len(changes) >= window
            if full and sum(changes[-window:]) / window < threshold:
                switch = t
    return w, switch
