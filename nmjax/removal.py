"""Removal: take ablated neurons out of a model.

A neuron without active inputs costs memory and multiplications and says the same
whatever the input. `remove_neurons` makes the params smaller by it, in the layer that
computes it and in those that read it. Which layers read it only the caller can know:
a tree of params does not tell.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Shaped

from nmjax.pairing import check_bool
from nmjax.paths import is_masked, named_leaves
from nmjax.patterns import fan_in_axes
from nmjax.plans import matching_leaves
from nmjax.typing import Masks, Params


class _Cut(NamedTuple):
    """What leaves one axis of a leaf."""

    keep: np.ndarray  # bool, one entry per index of the axis
    producer: str  # path of the kernel whose neurons go


def remove_neurons(
    params: Params,
    masks: Masks,
    connections: Mapping[str, Mapping[str, int]],
    *,
    constants: Mapping[str, Shaped[ArrayLike, "..."]] | None = None,
) -> tuple[Params, Masks]:
    r"""Remove ablated neurons, together with the inputs that read them.

    With kept neurons :math:`A`, removed ones :math:`R` of constant output :math:`c`,
    and :math:`W`, :math:`b` of a layer that reads them:

    .. math:: W \leftarrow W_A, \qquad b \leftarrow b + c_R^\top W_R

    The smaller model computes the same as the larger one, up to rounding, if all that
    stands between a neuron and its readers treats every neuron by itself, as biases,
    activations, BatchNorm in inference, dropout and pooling do. LayerNorm and its kin
    mix neurons: removing some changes what they compute. The module itself has to be
    made with the new widths, which are in the new shapes.

    The layout is Flax's: the last axis of a kernel counts its neurons. Leaves that are
    not named stay as they are. A layer may read one layer's neurons and lose some of
    its own in the same call. Which neurons are ablated is read from the masks given: a
    neuron whose last input goes in this call stays. Call again to remove it.

    Args:
      params: tree of arrays. For batch statistics give the whole variables dict.
      masks: tree with the paths of `params`; `optax.MaskedNode()` may stand for a whole
        subtree, as in ``{"params": nm.masks(state), "batch_stats": MaskedNode()}``.
        Must not be traced: the new shapes depend on them. Params may be.
      connections: path of a kernel whose ablated neurons go -> path of each connected
        leaf -> the axis of that leaf that counts the neurons. Connected are the leaves
        with an entry per neuron (bias, norm scale, running mean) and the kernels that
        read the neurons. An axis may be a multiple of the number of neurons, as after a
        conv's output is flattened: neurons vary fastest. Axes that share neurons with
        a second kernel (residual sums, concatenations) and grouped convs cannot be
        described; grouped convs look like others here, so leave them out.
      constants: path of a kernel in `connections` -> its neurons' outputs as their
        readers see them, shape (neurons,): of a removed neuron, its bias after norm and
        activation. Only removed entries are read. Missing ones are 0. They are folded
        into the biases, called ``bias``, beside the kernels that read the neurons.

    Returns:
      Params and masks, smaller, each in the structure given. Moments of an optimizer
      have the params' structure and can be treated as `params` are, without constants.

    Raises:
      TypeError: a mask is traced or not bool.
      ValueError: a path is not in the tree; a kernel has no mask, has its neurons on
        several axes, stacks layers, or has only ablated neurons; its bias is not
        connected; an axis does not fit or is named twice; constants have another shape,
        are not finite, have no reader, no bias to go to, or are read by a conv of more
        than one pixel, whose padding is 0 and not the constant.

    Example:
      >>> import jax.numpy as jnp
      >>> import nmjax as nm
      >>> params = {
      ...     "hidden": {"kernel": jnp.ones((3, 2)), "bias": jnp.array([0.5, 2.0])},
      ...     "head": {"kernel": jnp.array([[1.0], [10.0]]), "bias": jnp.zeros(1)},
      ... }
      >>> masks = nm.compute_masks(params, nm.plan(params, {"hidden/k": nm.NM(1, 3)}))
      >>> masks["hidden"]["kernel"] = masks["hidden"]["kernel"].at[:, 1].set(False)
      >>> connections = {"hidden/kernel": {"hidden/bias": 0, "head/kernel": 0}}
      >>> constants = {"hidden/kernel": params["hidden"]["bias"]}
      >>> small, _ = nm.remove_neurons(params, masks, connections, constants=constants)
      >>> small["hidden"]["kernel"].shape, small["head"]["bias"].tolist()
      ((3, 1), [20.0])

    Reference:
      Lasby, Golubeva, Evci, Nica and Ioannou, "Dynamic Sparse Training with
      Structured Sparsity", 2024, arXiv 2305.02299.
    """
    pairs, treedef = named_leaves(params)
    leaves = dict(pairs)
    mask_of = dict(zip(leaves, matching_leaves(pairs, masks), strict=True))
    keeps = {path: _kept_neurons(path, leaves, mask_of) for path in connections}
    cuts: dict[str, dict[int, _Cut]] = {}
    for path, keep in keeps.items():
        _check_bias(path, leaves, connections[path])
        _add_cut(cuts, path, jnp.ndim(leaves[path]) - 1, _Cut(keep, path))
        for connected, axis in connections[path].items():
            axis, long = _fit(path, keep, connected, axis, leaves)
            _add_cut(cuts, connected, axis, _Cut(long, path))
    for path in cuts:
        _check_mask(path, leaves, mask_of)
    for path, constant in (constants or {}).items():
        if path not in keeps:
            raise ValueError(
                f"constants name {path!r}, which is no kernel of connections: "
                f"{list(keeps)}"
            )
        removed = _removed_constants(path, constant, keeps[path])
        readers = _readers(path, cuts, leaves) if removed.size else {}
        for reader, axis in readers.items():
            gone = np.flatnonzero(~cuts[reader][axis].keep)
            mask = mask_of[reader]
            leaves[_sibling_bias(reader)] = _fold(
                path, removed, reader, axis, gone, leaves, mask
            )
    new_masks, mask_treedef = named_leaves(masks)
    return (
        jax.tree.unflatten(
            treedef, [_cut(leaf, cuts.get(p)) for p, leaf in leaves.items()]
        ),
        jax.tree.unflatten(
            mask_treedef, [_cut(mask, cuts.get(path)) for path, mask in new_masks]
        ),
    )


def _leaf_of(path: str, leaves: Mapping[str, Any]) -> Any:
    """Find a leaf that the caller names."""
    if path not in leaves or is_masked(leaves[path]):
        raise ValueError(
            f"connections name {path!r}, which is not a leaf of params; there are "
            f"{[path for path, leaf in leaves.items() if not is_masked(leaf)]}"
        )
    return leaves[path]


def _kept_neurons(
    path: str, leaves: Mapping[str, Any], masks: Mapping[str, Any]
) -> np.ndarray:
    """Tell which neurons of a kernel have inputs."""
    shape, mask = jnp.shape(_leaf_of(path, leaves)), masks[path]
    if is_masked(mask):
        raise ValueError(
            f"leaf {path!r} has no mask, so none of its neurons is ablated; leave it "
            "out of connections"
        )
    if isinstance(mask, Tracer):
        raise TypeError(
            f"the mask of leaf {path!r} is traced, but the shapes of the result depend "
            "on it: call remove_neurons outside jax.jit and jax.vmap"
        )
    _check_mask(path, leaves, masks)
    axes = fan_in_axes(path, len(shape))
    if len(axes) != len(shape) - 1 or len(shape) < 2:
        raise ValueError(
            f"leaf {path!r} of shape {shape} has its neurons on "
            f"{len(shape) - len(axes)} axes; without some of them the rest would not "
            "fill an array. remove_neurons takes kernels with fan-in axes and neurons "
            "on the last axis alone"
        )
    keep = np.asarray(np.any(np.asarray(mask), axis=axes))
    if not keep.any():
        raise ValueError(
            f"all {keep.size} neurons of leaf {path!r} are ablated: nothing would be "
            "left of the layer"
        )
    return keep


def _check_mask(path: str, leaves: Mapping[str, Any], masks: Mapping[str, Any]) -> None:
    """Raise unless a leaf's mask, if it has one, is bool and of the leaf's shape."""
    shape, mask = jnp.shape(leaves[path]), masks[path]
    if is_masked(mask):
        return
    check_bool(path, mask)
    if jnp.shape(mask) != shape:
        raise ValueError(
            f"mask of leaf {path!r} has shape {jnp.shape(mask)}, the leaf has shape "
            f"{shape}"
        )


def _check_bias(
    path: str, leaves: Mapping[str, Any], connected: Mapping[str, int]
) -> None:
    """Raise unless the bias beside a kernel has one entry per neuron and goes along."""
    bias, neurons = _sibling_bias(path), jnp.shape(leaves[path])[-1]
    if bias not in leaves or is_masked(leaves[bias]):
        return
    if jnp.shape(leaves[bias]) != (neurons,):
        raise ValueError(
            f"leaf {path!r} of shape {jnp.shape(leaves[path])} has a bias of shape "
            f"{jnp.shape(leaves[bias])}, not ({neurons},): it stacks layers, which "
            "would become ragged. Take the layers apart first, or leave it out"
        )
    if bias not in connected:
        raise ValueError(
            f"leaf {bias!r} has an entry for each of the {neurons} neurons of "
            f"{path!r}, but connections[{path!r}] do not name it: add {bias!r}: 0"
        )


def _fit(
    path: str, keep: np.ndarray, connected: str, axis: int, leaves: Mapping[str, Any]
) -> tuple[int, np.ndarray]:
    """Give an axis counted from the front, and what to keep along it."""
    shape = jnp.shape(_leaf_of(connected, leaves))
    if not -len(shape) <= axis < len(shape):
        raise ValueError(
            f"connections[{path!r}][{connected!r}] = {axis} is no axis of its shape "
            f"{shape}"
        )
    length = shape[axis]
    if length == 0 or length % keep.size:
        raise ValueError(
            f"axis {axis} of leaf {connected!r} of shape {shape} has length {length}, "
            f"which is not a multiple of the {keep.size} neurons of {path!r}"
        )
    return axis % len(shape), np.tile(keep, length // keep.size)


def _add_cut(cuts: dict[str, dict[int, _Cut]], path: str, axis: int, cut: _Cut) -> None:
    """Note a cut; an axis can be cut once."""
    axes = cuts.setdefault(path, {})
    if axis in axes:
        raise ValueError(
            f"axis {axis} of leaf {path!r} counts the neurons of "
            f"{axes[axis].producer!r} and of {cut.producer!r}. Neurons of layers whose "
            "outputs are added or concatenated cannot be removed"
        )
    axes[axis] = cut


def _removed_constants(path: str, constant: Any, keep: np.ndarray) -> Any:
    """Give the outputs of the removed neurons; none if they are all known to be 0."""
    if jnp.shape(constant) != keep.shape:
        raise ValueError(
            f"constants[{path!r}] has shape {jnp.shape(constant)}, must be "
            f"{keep.shape}: one entry per neuron"
        )
    gone = np.flatnonzero(~keep)
    if isinstance(constant, Tracer):
        return constant[gone]
    removed = np.asarray(constant)[gone]
    if not np.isfinite(removed.astype(np.float64)).all():
        raise ValueError(f"constants[{path!r}] are not finite at removed neurons")
    return removed if removed.any() else removed[:0]


def _readers(
    path: str, cuts: Mapping[str, Mapping[int, _Cut]], leaves: Mapping[str, Any]
) -> dict[str, int]:
    """Find the kernels that read a layer's neurons, and along which axis."""
    readers = {
        connected: axis
        for connected, axes in cuts.items()
        for axis, cut in axes.items()
        if cut.producer == path and _is_reader(connected, axis, leaves)
    }
    if not readers:
        raise ValueError(
            f"constants[{path!r}] are not 0 at removed neurons, but connections name "
            "no kernel that reads them"
        )
    return readers


def _is_reader(path: str, axis: int, leaves: Mapping[str, Any]) -> bool:
    """Tell whether an axis is fan-in of a kernel."""
    ndim = jnp.ndim(leaves[path])
    return ndim > 1 and axis - ndim in fan_in_axes(path, ndim)


def _fold(
    path: str,
    removed: Any,
    reader: str,
    axis: int,
    gone: np.ndarray,
    leaves: Mapping[str, Any],
    mask: Any,
) -> Array:
    """Add what removed neurons say to the bias of one kernel."""
    kernel, bias = leaves[reader], _sibling_bias(reader)
    ndim = jnp.ndim(kernel)
    if bias not in leaves or is_masked(leaves[bias]):
        raise ValueError(
            f"constants[{path!r}] are not 0 at removed neurons, and leaf {reader!r} "
            f"that reads them has no {bias!r} to fold them into: give the layer a bias"
        )
    if axis == ndim - 2 and max(jnp.shape(kernel)[:axis], default=1) > 1:
        raise ValueError(
            f"constants[{path!r}] are not 0 at removed neurons, and leaf {reader!r} of "
            f"shape {jnp.shape(kernel)} that reads them has more than one pixel: at "
            "the borders its padding is 0 and not the constant, so that no bias can "
            "replace them"
        )
    rows = _take(kernel, gone, axis)
    if not is_masked(mask):
        active = _take(mask, gone, axis)
        rows = jnp.where(active, rows, jnp.zeros((), rows.dtype))
    wide = rows.dtype if jnp.finfo(rows.dtype).bits > 32 else jnp.float32
    shape = [-1 if i == axis else 1 for i in range(ndim)]
    said = jnp.tile(removed, gone.size // removed.size).astype(wide).reshape(shape)
    total = jnp.sum(rows.astype(wide) * said, axis=fan_in_axes(reader, ndim))
    if total.shape != jnp.shape(leaves[bias]):
        raise ValueError(
            f"leaf {bias!r} has shape {jnp.shape(leaves[bias])}, but the neurons of "
            f"{reader!r} have shape {total.shape}"
        )
    return (leaves[bias].astype(wide) + total).astype(leaves[bias].dtype)


def _sibling_bias(path: str) -> str:
    """Name the bias beside a kernel."""
    above, slash, _ = path.rpartition("/")
    return f"{above}{slash}bias"


def _cut(leaf: Any, cuts: Mapping[int, _Cut] | None) -> Any:
    """Keep what cuts leave of an array."""
    if is_masked(leaf) or not cuts:
        return leaf
    for axis, cut in cuts.items():
        leaf = _take(leaf, np.flatnonzero(cut.keep), axis)
    return leaf


def _take(array: Any, indices: np.ndarray, axis: int) -> Array:
    """Take entries along an axis, which comes out whole on every device."""
    array = jnp.asarray(array)
    spec = [*jax.typeof(array).sharding.spec]
    # On an explicit mesh the new, odd length may not divide between the shards.
    explicit = any(name is not None for name in spec)
    out = jax.P(*spec[:axis], None, *spec[axis + 1 :]) if explicit else None
    index = (*[slice(None)] * axis, indices)
    return array.at[index].get(out_sharding=out, mode="clip")
