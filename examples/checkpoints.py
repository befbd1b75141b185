"""Orbax checkpoints of compressed params that can be read back without a template.

Orbax stores the arrays of a compressed leaf under their field names, ``values`` and
``codes`` for example, but not what is static in it: its class, its shape, n and m.
`save` writes these beside the arrays, as JSON, in the same checkpoint. `load` builds an
abstract tree from both, whose compressed leaves have shapes in place of arrays, and
lets orbax fill it::

    checkpoints.save(folder, nm.compress(params, plan))
    params = checkpoints.load(folder)                        # nested dicts, as in linen
    state = checkpoints.load(folder, like=nnx.state(model))  # in the structure of like

Orbax renames a checkpoint into place when it is complete, so a process killed while it
saves leaves none that is half written.
"""

import dataclasses
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from nmjax import formats
from nmjax.paths import path_name


def save(directory: pathlib.Path, params: Any) -> None:
    """Write params, dense and compressed leaves alike, replacing what is there.

    Args:
      directory: Folder of the checkpoint.
      params: A tree of arrays and compressed arrays: nested dicts, an `nnx.State`, ...
        Prepared arrays are saved as what they were made from.
    """
    leaves, layouts = {}, {}
    for path, leaf in _named(params):
        if isinstance(leaf, formats.PreparedArray | formats.WindowArray):
            leaf = leaf.canonical  # the same for all hardware
        leaves[path] = leaf
        if formats.is_compressed(leaf):
            layouts[path] = {"format": type(leaf).__name__, **_static(leaf)}
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(
            directory.absolute(),
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(  # pyright: ignore[reportCallIssue]
                    _nested(leaves)
                ),
                layouts=ocp.args.JsonSave(layouts),  # pyright: ignore[reportCallIssue]
            ),
            force=True,
        )


def load(directory: pathlib.Path, like: Any = None) -> Any:
    """Read what `save` wrote, onto the default device.

    Args:
      directory: Folder of the checkpoint.
      like: A tree of dense or abstract arrays with the structure to return, such as the
        params of the model. Default: nested dicts.

    Returns:
      The params.

    Raises:
      FileNotFoundError: The folder has no such checkpoint.
      ValueError: A compressed leaf has indices that are out of range; or a leaf of
        ``like`` is not in the checkpoint or has another shape or
        dtype, or the checkpoint has leaves that ``like`` has not.
    """
    directory = directory.absolute()
    if not (directory / "layouts").is_dir():
        raise FileNotFoundError(f"{directory} has no checkpoint of `checkpoints.save`")
    handlers = ocp.CompositeCheckpointHandler(
        params=ocp.StandardCheckpointHandler(), layouts=ocp.JsonCheckpointHandler()
    )
    with ocp.Checkpointer(handlers) as checkpointer:
        only_layouts = ocp.args.Composite(
            layouts=ocp.args.JsonRestore()  # pyright: ignore[reportCallIssue]
        )
        layouts = checkpointer.restore(directory, only_layouts)["layouts"]
        stored = checkpointer.metadata(directory).item_metadata["params"].tree
        abstract = _abstract(stored, layouts)
        only_params = ocp.args.Composite(
            params=ocp.args.StandardRestore(  # pyright: ignore[reportCallIssue]
                abstract
            )
        )
        params = checkpointer.restore(directory, only_params)["params"]
    for _, leaf in _named(params):
        if formats.is_compressed(leaf):
            formats.validate(leaf)  # products trust its indices
    return params if like is None else _arranged(params, like)


def size(directory: pathlib.Path) -> int:
    """Return the bytes of all files below a folder."""
    files = directory.rglob("*")
    return sum(path.stat().st_size for path in files if path.is_file())


def _named(params: Any) -> list[tuple[str, Any]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(
        params, is_leaf=formats.is_compressed
    )
    return [(path_name(key_path), leaf) for key_path, leaf in leaves]


def _nested(leaves: dict[str, Any]) -> dict[str, Any]:
    """Make nested dicts of paths."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        place = tree
        for parent in parents:
            place = place.setdefault(parent, {})
        place[name] = leaf
    return tree


def _static(leaf: formats.Compressed) -> dict[str, Any]:
    fields = dataclasses.fields(leaf)  # pyright: ignore[reportArgumentType]
    static = [field.name for field in fields if field.metadata.get("static")]
    return {name: getattr(leaf, name) for name in static}


def _abstract(stored: dict[str, Any], layouts: dict[str, Any]) -> dict[str, Any]:
    """Make the tree that orbax fills from the metadata of a checkpoint."""
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    tree = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        stored,
    )
    for path, layout in layouts.items():
        *parents, name = path.split("/")
        place = tree
        for parent in parents:
            place = place[parent]
        place[name] = _compressed(layout, place[name])
    return tree


def _compressed(layout: dict[str, Any], arrays: dict[str, Any]) -> formats.Compressed:
    """Put arrays, or their shapes, and what is static together."""
    static = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in layout.items()
        if name != "format"
    }
    return getattr(formats, layout["format"])(**arrays, **static)


def _arranged(params: Any, like: Any) -> Any:
    """Put the leaves of nested dicts where a tree has leaves of the same path."""
    found = dict(_named(params))
    wanted, treedef = jax.tree_util.tree_flatten_with_path(like)
    leaves = []
    for key_path, leaf in wanted:
        path = path_name(key_path)
        if path not in found:
            raise ValueError(f"leaf {path!r} is not in the checkpoint")
        leaves.append(found.pop(path))
        for name in ("shape", "dtype"):
            has, wants = getattr(leaves[-1], name), getattr(leaf, name)
            if has != wants:
                raise ValueError(
                    f"leaf {path!r} of the checkpoint has {name} {has}, not {wants}"
                )
    if found:
        raise ValueError(f"the checkpoint has more leaves: {', '.join(found)}")
    return jax.tree.unflatten(treedef, leaves)
