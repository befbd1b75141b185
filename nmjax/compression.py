"""Compression: the sparse leaves of params become compressed arrays."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nmjax.budgets import Block, FanIn
from nmjax.formats import BlockArray, Compressed, FanInArray, NMArray, quantize
from nmjax.kernels import choosing
from nmjax.paths import is_masked, named_leaves
from nmjax.patterns import NM, TransposableNM, axis_of, fan_in_axes, from_end
from nmjax.plans import LeafPlan, Plan, check_plan, matching_leaves
from nmjax.typing import Masks, Params


def compress(
    params: Params,
    plan_or_masks: Plan | Masks,
    *,
    masks: Masks | None = None,
    dtype: Any = None,
    when: str = "always",
    batch: int | None = None,
    platform: str | None = None,
) -> Params:
    """Replace the sparse leaves of params by compressed arrays.

    With a plan, `NM` and `TransposableNM` leaves become `NMArray`, `FanIn` leaves
    `FanInArray` and `Block` leaves `BlockArray`; leaves that the plan leaves dense
    stay as they are. With masks alone, the format is found from the mask: the smallest
    m of 2, 4, 8, ... 64 for which every group along the fan-in axis keeps the same
    n < m, else a constant fan-in.

    `nmjax.decompress` gives back the same params, bit for bit.

    Args:
      params: exactly sparse params, as training with a held mask or `nm.project`
        leaves them.
      plan_or_masks: the plan of the params, or their masks.
      masks: masks besides a plan: active weights keep their positions even where they
        are zero, so that they can be trained on.
      dtype: None stores values as they are; int8 or a float8 dtype stores them with
        scales, see `nmjax.formats.quantize`, which is not exact.
      when: ``"always"``, or ``"faster"``: only leaves whose product was measured to be
        faster than a dense one stay compressed, others are left dense.
      batch: rows that a product will have, counting all leading axes of its inputs;
        needed for ``"faster"``.
      platform: where products will run: ``"cpu"``, ``"gpu"`` or ``"tpu"``. Default:
        where JAX runs. Nothing was measured to be faster on GPUs and TPUs yet, so that
        ``"faster"`` leaves all leaves dense there.

    Returns:
      A tree like `params`, with compressed arrays in place of sparse leaves.

    Raises:
      ValueError: a leaf does not fit its pattern, has a pattern without a format (use
        a rule that leaves it dense, or compress the others alone), or its mask fits no
        format; the message names the leaf and the group, neuron or block.
      TypeError: params are traced, or ``when="faster"`` has no batch.

    Example:
      >>> import jax.numpy as jnp
      >>> import nmjax as nm
      >>> params = {"kernel": jnp.tile(jnp.arange(1.0, 5.0)[:, None], (1, 8))}
      >>> plan = nm.plan(params, nm.NM(2, 4))
      >>> small = nm.compress(nm.project(params, plan), plan)
      >>> small["kernel"]
      NMArray(2:4 along -2, float32[4, 8], 72 bytes, 0.562 of dense)
      >>> nm.decompress(small)["kernel"][:, 0].tolist()
      [0.0, 0.0, 3.0, 4.0]
    """
    is_wanted = _choice(when, batch, platform)
    pairs, treedef = named_leaves(params)
    if isinstance(plan_or_masks, Plan):
        check_plan(plan_or_masks, pairs)
        given = masks
    elif masks is not None:
        raise TypeError("give masks once: compress(params, plan, masks=masks)")
    else:
        given = plan_or_masks
    found = [None] * len(pairs) if given is None else matching_leaves(pairs, given)
    out = []
    for (path, leaf), mask in zip(pairs, found, strict=True):
        mask = None if is_masked(mask) else mask
        if isinstance(plan_or_masks, Plan) and not is_masked(leaf):
            pack = _planned(plan_or_masks.by_path[path])
        else:
            pack = None if mask is None else _detected(path, mask)
        if is_masked(leaf) or pack is None:
            out.append(leaf)
            continue
        try:
            small = pack(leaf, mask)
            small = small if dtype is None else quantize(small, dtype)
            out.append(small if is_wanted(small) else leaf)
        except ValueError as error:
            raise ValueError(f"leaf {path!r}: {error}") from error
    return jax.tree.unflatten(treedef, out)


def _choice(
    when: str, batch: int | None, platform: str | None
) -> Callable[[Compressed], bool]:
    """Give the function that tells whether a leaf shall be compressed."""
    if when not in ("always", "faster"):
        raise ValueError(f"when={when!r} is neither 'always' nor 'faster'")
    if when == "always":
        return lambda small: True
    if batch is None or batch < 1:
        raise TypeError(
            f"when='faster' with batch={batch}: which form is faster depends on the "
            "number of rows that are multiplied; say it, as in batch=1"
        )
    on_cpu = (platform or jax.default_backend()) == "cpu"
    return lambda small: on_cpu and _is_faster(small, batch)


def _is_faster(small: Compressed, batch: int) -> bool:
    """Tell whether the product of every layer was measured to be faster than dense."""
    layer = small
    for _ in small.stack_shape:
        layer = jax.tree.map(lambda leaf: leaf[0], layer)
    matrix = layer.matrix
    if matrix is None:
        return False  # it is decompressed for every use
    x = jax.ShapeDtypeStruct((batch, matrix.shape[0]), matrix.dtype)
    return choosing.relative_time(x, matrix) < 1


_Pack = Callable[[Any, Any], Compressed]


def _planned(leaf: LeafPlan) -> _Pack | None:
    """Give the function that compresses a leaf as its pattern says."""
    pattern, stacked = leaf.pattern, leaf.stacked
    if not leaf.is_sparse:
        return None
    if isinstance(pattern, NM | TransposableNM):
        axis = from_end(axis_of(pattern), len(leaf.shape), stacked)
        return lambda w, mask: NMArray.from_dense(
            w, pattern.n, pattern.m, axis, mask, stacked
        )
    if isinstance(pattern, FanIn):
        return _layerwise(lambda w, mask: _pack_fan_in(leaf, w, mask), stacked)
    if isinstance(pattern, Block):
        axis = axis_of(pattern)
        return _layerwise(
            lambda w, mask: BlockArray.from_dense(
                w, pattern.outputs, pattern.inputs, axis, mask
            ),
            stacked,
        )
    raise ValueError(
        f"leaf {leaf.path!r}: there is no compressed format for {pattern}; it can be "
        "stored as NM, TransposableNM, FanIn and Block patterns can"
    )


def _pack_fan_in(leaf: LeafPlan, weights: Any, mask: Any) -> FanInArray:
    """Compress one layer, whose neurons keep what its budget pays for."""
    assert isinstance(leaf.pattern, FanIn)
    rank, shape = len(leaf.layer_shape), leaf.layer_shape
    axes = tuple(axis % rank for axis in leaf.pattern.neuron_axes or (-1,))
    small = FanInArray.from_dense(weights, axes, mask)
    neurons = leaf.pattern.neurons(shape)
    kept = leaf.pattern.kept(shape, leaf.budget)
    budget = kept if leaf.budget is None else leaf.budget
    most = budget // small.neurons.size
    if small.fan_in > most:
        raise ValueError(
            f"a neuron has {small.fan_in} active weights, but {budget} weights for "
            f"{small.neurons.size} active of {neurons} neurons pay for {most} each; "
            "make params exactly sparse with nm.project(params, plan) first"
        )
    return small


def _layerwise(pack: _Pack, stacked: int) -> _Pack:
    """Compress every layer of a stack by itself."""
    for _ in range(stacked):
        pack = functools.partial(_pack_stack, pack)
    return pack


def _pack_stack(pack: _Pack, weights: Any, mask: Any) -> Compressed:
    masks = [None] * len(weights) if mask is None else mask
    layers = [pack(w, e) for w, e in zip(weights, masks, strict=True)]
    shapes = [[part.shape for part in jax.tree.leaves(layer)] for layer in layers]
    for i, found in enumerate(shapes):
        if found != shapes[0]:
            raise ValueError(
                f"layers of a stack must be stored alike, but layer 0 is {layers[0]!r} "
                f"and layer {i} is {layers[i]!r}"
            )
    return jax.tree.map(lambda *parts: jnp.stack(parts), *layers)


def _detected(path: str, mask: Any) -> _Pack:
    """Find the format that a mask fits."""
    fan_in = fan_in_axes(path, mask.ndim)
    axis = fan_in[-1]
    groups = np.moveaxis(np.asarray(mask), axis, -1)
    for m in (2, 4, 8, 16, 32, 64):
        if groups.shape[-1] % m:
            break
        counts = groups.reshape(*groups.shape[:-1], -1, m).sum(-1)
        n = int(counts.flat[0])
        if 0 < n < m and (counts == n).all():
            return lambda w, e, n=n, m=m: NMArray.from_dense(w, n, m, axis, e)
    counts = np.asarray(mask).sum(fan_in)
    if counts.any() and len(set(counts[counts > 0].tolist())) == 1:
        rank = mask.ndim
        axes = tuple(a for a in range(rank) if a - rank not in fan_in)
        return lambda w, e: FanInArray.from_dense(w, axes, e)
    raise ValueError(
        f"leaf {path!r}: its mask is neither n:m along axis {axis} nor a constant "
        "fan-in; say what it is with a plan: compress(params, plan, masks=masks)"
    )
