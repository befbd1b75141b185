"""Trees: undo compression, and measure what it saves."""

from typing import Any

import jax

from nmjax.formats.checks import Compressed
from nmjax.typing import Params


def decompress(params: Params) -> Params:
    """Replace compressed arrays by dense ones; the inverse of `nmjax.compress`.

    Args:
      params: a tree with compressed arrays at some leaves.

    Returns:
      The tree with dense leaves. Works under `jax.jit`, and its gradient reaches the
      stored values.

    Example:
      >>> import jax.numpy as jnp
      >>> import nmjax as nm
      >>> from nmjax import formats
      >>> small = formats.FanInArray.from_dense(jnp.array([[0.0, 2.0], [1.0, 0.0]]))
      >>> nm.decompress({"kernel": small})["kernel"].tolist()
      [[0.0, 2.0], [1.0, 0.0]]
    """
    return jax.tree.map(
        lambda leaf: leaf.todense() if is_compressed(leaf) else leaf,
        params,
        is_leaf=is_compressed,
    )


def is_compressed(leaf: Any) -> bool:
    """Tell whether a leaf is a compressed array."""
    return isinstance(leaf, Compressed)


def sizes(params: Params) -> list[dict[str, Any]]:
    """Measure what compression saves.

    Args:
      params: a tree with compressed arrays at some leaves.

    Returns:
      A row for each leaf and one of all: ``path``, ``layout``, ``bytes``, ``dense
      bytes`` and their ``ratio``. `nmjax.reports.print_table` prints them.

    Example:
      >>> import jax.numpy as jnp
      >>> import nmjax as nm
      >>> from nmjax import formats
      >>> params = {"kernel": jnp.tile(jnp.arange(1.0, 5.0)[:, None], (1, 8))}
      >>> plan = nm.plan(params, nm.NM(2, 4))
      >>> formats.sizes(nm.compress(nm.project(params, plan), plan))[-1]
      {'path': 'all', 'layout': '', 'bytes': 72, 'dense bytes': 128, 'ratio': 0.5625}
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_compressed)
    rows = []
    for key_path, leaf in leaves:
        compressed = is_compressed(leaf)
        rows.append(
            {
                "path": jax.tree_util.keystr(key_path, simple=True, separator="/"),
                "layout": leaf.layout if compressed else "dense",
                "bytes": leaf.nbytes,
                "dense bytes": leaf.dense_nbytes if compressed else leaf.nbytes,
            }
        )
    total = {key: sum(row[key] for row in rows) for key in ("bytes", "dense bytes")}
    rows.append({"path": "all", "layout": "", **total})
    return [row | {"ratio": row["bytes"] / max(1, row["dense bytes"])} for row in rows]
