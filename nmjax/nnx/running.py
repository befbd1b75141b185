"""Run an unmodified nnx model on params of which some are compressed."""

from collections.abc import Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx

from nmjax import compression, formats
from nmjax.formats import is_compressed
from nmjax.nnx.adapting import adapt, check_adaptable, restore, wrapping_norm
from nmjax.nnx.variables import CompressedParam, is_parameter
from nmjax.operands import DENSE_ADVICE, Origin, unguarded
from nmjax.paths import is_masked, path_name
from nmjax.plans import Plan
from nmjax.typing import Masks, Params

Model = TypeVar("Model", bound=nnx.Module)


def compress(
    model: Model,
    plan_or_masks: Plan | Masks,
    *,
    masks: Masks | None = None,
    dtype: Any = None,
) -> Model:
    """Let a model compute with compressed weights in place of exactly sparse ones.

    The same as `load` with what `nmjax.compress` makes of the model's state.

    Args:
      model: an nnx module whose params are exactly sparse; changed in place.
      plan_or_masks: as in `nmjax.compress`, made from ``nnx.state(model)`` or
        ``nnx.state(model, nnx.Param)``.
      masks: as in `nmjax.compress`.
      dtype: as in `nmjax.compress`.

    Returns:
      The same model.

    Raises:
      ValueError: as `nmjax.compress` and `load`.
      TypeError: as `load`.

    Example:
      >>> import jax.numpy as jnp
      >>> import nmjax as nm
      >>> from flax import nnx
      >>> model = nnx.Linear(4, 8, rngs=nnx.Rngs(0))
      >>> plan = nm.plan(nnx.state(model), nm.NM(2, 4))
      >>> nnx.update(model, nm.project(nnx.state(model), plan))
      >>> expected = model(jnp.ones((1, 4)))
      >>> model = nm.nnx.compress(model, plan)
      >>> model.kernel.get_raw_value()
      NMArray(2:4 along -2, float32[4, 8], 72 bytes, 0.562 of dense)
      >>> bool(jnp.allclose(model(jnp.ones((1, 4))), expected, atol=1e-6))
      True
    """
    if isinstance(plan_or_masks, Plan):
        count = len(plan_or_masks.leaves)
    else:
        count = len(jax.tree.leaves(plan_or_masks, is_leaf=is_masked))
    state: Any = nnx.state(model, nnx.Param)
    if count != len(jax.tree.leaves(state)):
        state = nnx.state(model)
    small = compression.compress(state, plan_or_masks, masks=masks, dtype=dtype)
    return load(model, small)


def load(model: Model, params: Params) -> Model:
    """Put params into a model, of which some may be compressed.

    Computes what the model computes on the decompressed params. Each compressed leaf
    goes into a `CompressedParam`, and the layer of Flax that owns it gets functions
    that take it:

    - `nnx.Linear`, `nnx.LinearGeneral` and what is made of them (attention, recurrent
      cells), `nnx.Einsum`, `nnx.Conv` and `nnx.Embed.attend` multiply with the
      compressed kernel, through `nmjax.dot_general` and `nmjax.conv_general_dilated`.
    - All other modules of Flax, `nnx.Embed.__call__` among them, and convolutions with
      a mask decompress it.
    - Modules of yours read the compressed array, ``self.kernel[...]``, and can give it
      to `nmjax.matmul`, which takes dense arrays just as well.

    `nnx.state`, `nnx.split`, `nnx.merge`, `nnx.jit`, and `nnx.scan` and `nnx.vmap` over
    stacks whose layers are the leading axis work as before, and ``nnx.state(model)``
    can be saved and loaded again.

    Args:
      model: an nnx module, changed in place. It may be abstract, as `nnx.eval_shape`
        makes it: no dense array is then ever made.
      params: a state of the model or a part of it, or such a tree of dicts, as
        `nmjax.compress` makes it. What it does not have stays as it is.

    Returns:
      The same model.

    Raises:
      ValueError: the model has no such leaf, or of another shape. The message names it.
      TypeError: a layer has a ``dot_general``, ``conv_general_dilated`` or
        ``einsum_op`` of its own, is within `nnx.WeightNorm` or `nnx.SpectralNorm`, or
        the leaf is no `nnx.Param`. The message names module or leaf. A module of yours
        that uses the leaf as a dense array raises when it is called.

    Example:
      >>> import jax.numpy as jnp
      >>> import nmjax as nm
      >>> from flax import nnx
      >>> model = nnx.eval_shape(lambda: nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
      >>> kernel = nm.formats.FanInArray.from_dense(jnp.array([[0.0, 2.0], [1.0, 0.0]]))
      >>> model = nm.nnx.load(model, {"kernel": kernel, "bias": jnp.zeros(2)})
      >>> model(jnp.array([3.0, 5.0])).tolist()
      [5.0, 6.0]
    """
    graph = list(nnx.iter_graph(model))
    nodes = {_join(path): node for path, node in graph}
    flat, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_compressed)
    leaves = {path_name(key_path): _plain(leaf) for key_path, leaf in flat}
    for path, leaf in leaves.items():
        _check_leaf(path, leaf, nodes, model)
    small = {
        path
        for path, node in nodes.items()
        if is_compressed(leaves.get(path, node))
        or (isinstance(node, CompressedParam) and path not in leaves)
    }
    held = list(_holders(model, {id(nodes[path]) for path in small}))
    for path, module, names in held:
        check_adaptable(module, path, names)
    owners = {_join(path): (_join(path[:-1]), path[-1]) for path, _ in graph if path}
    for path, leaf in leaves.items():
        owner, key = owners[path]
        _put(leaf, nodes[path], nodes[owner], key)
    for node in nodes.values():
        if isinstance(node, nnx.Module):
            restore(node)
    for path in small:
        holder = _title(path.rpartition("/")[0], nodes)
        nodes[path].set_metadata(origin=Origin(path, holder), reads_dense=False)
    for _, module, names in held:
        adapt(module, names)
    return model


def decompress(model: Model) -> Model:
    """Let a model compute with dense weights again; the inverse of `compress`.

    Args:
      model: an nnx module, changed in place.

    Returns:
      The same model, with `nnx.Param` in place of every `CompressedParam`.

    Example:
      >>> import nmjax as nm
      >>> from flax import nnx
      >>> model = nnx.Linear(4, 8, rngs=nnx.Rngs(0))
      >>> plan = nm.plan(nnx.state(model), nm.NM(2, 4))
      >>> nnx.update(model, nm.project(nnx.state(model), plan))
      >>> model = nm.nnx.decompress(nm.nnx.compress(model, plan))
      >>> int((model.kernel[...] == 0).sum())
      16
    """
    return load(model, formats.decompress(nnx.state(model, CompressedParam)))


def _plain(leaf: Any) -> Any:
    """Give a leaf as it is stored: one that was read from a model has a guard."""
    return unguarded(leaf) if is_compressed(leaf) else leaf


def _put(leaf: Any, node: Any, owner: Any, key: Any) -> None:
    """Put a leaf into a variable, or in place of an array that is in none."""
    if isinstance(node, nnx.Variable):
        if is_compressed(leaf):
            object.__setattr__(node, "__class__", CompressedParam)
        elif isinstance(node, CompressedParam):
            object.__setattr__(node, "__class__", nnx.Param)
            for name in ("origin", "reads_dense"):
                node.del_metadata(name)
        node.set_raw_value(leaf)
    elif isinstance(owner, nnx.Module):
        setattr(owner, key, leaf)
    else:
        owner[key] = leaf


def _check_leaf(path: str, leaf: Any, nodes: dict[str, Any], model: Any) -> None:
    """Raise unless a leaf can go into the model."""
    variable: Any = nodes.get(path)
    raw: Any = (
        variable.get_raw_value() if isinstance(variable, nnx.Variable) else variable
    )
    if not hasattr(raw, "shape"):
        raise ValueError(
            f"params have a leaf {path!r} that this model does not have; its leaves "
            f"are {[p for p, n in nodes.items() if isinstance(n, nnx.Variable)]}"
        )
    shape = np.shape(raw)
    if np.shape(leaf) != shape:
        raise ValueError(
            f"leaf {path!r} has shape {np.shape(leaf)}, but the model has {shape} there"
        )
    if not is_compressed(leaf):
        return
    if not is_parameter(variable):
        raise TypeError(
            f"leaf {path!r} is compressed, but {type(variable).__name__} in the model: "
            f"only nnx.Param can be; {DENSE_ADVICE}"
        )
    if (norm := wrapping_norm(path, nodes)) is not None:
        raise TypeError(
            f"{_title(norm, nodes)} normalizes the weights of its layer, and leaf "
            f"{path!r} is compressed: {DENSE_ADVICE}"
        )


def _holders(model: Any, small: set[int]) -> Iterator[tuple[str, Any, list[str]]]:
    """Find the modules that own compressed variables, and under which names."""
    for path, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Module):
            names = [name for name, value in vars(node).items() if id(value) in small]
            if names:
                yield _join(path), node, names


def _title(path: str, nodes: dict[str, Any]) -> str:
    """Name the module at a path, or the nearest above it, in a message."""
    while path and not isinstance(nodes.get(path), nnx.Module):
        path = path.rpartition("/")[0]
    name = type(nodes[path]).__name__ if path in nodes else "nnx.Module"
    return f"module {path!r} ({name})" if path else f"the model itself ({name})"


def _join(path: Any) -> str:
    return "/".join(str(key) for key in path)
