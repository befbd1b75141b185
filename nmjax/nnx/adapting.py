"""Give layers of Flax functions that take compressed kernels, and take them back."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from nmjax.formats import is_compressed
from nmjax.kernels import conv_general_dilated, dot_general
from nmjax.operands import DENSE_ADVICE, cast_alike, einsum

# What a layer multiplies with: attribute, what Flax has there, what takes its place.
_FUNCTIONS: dict[type, tuple[str, Any, Callable[..., Any]]] = {
    nnx.Linear: ("dot_general", lax.dot_general, dot_general),
    nnx.LinearGeneral: ("dot_general", None, dot_general),
    nnx.Conv: ("conv_general_dilated", lax.conv_general_dilated, conv_general_dilated),
    nnx.Einsum: ("einsum_op", jnp.einsum, einsum),
}


@dataclasses.dataclass(frozen=True)
class Replaced:
    """A function of a layer that takes compressed arrays too.

    Attributes:
      original: what the layer had.
      function: what it has now.
    """

    original: Any
    function: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return self.function(*args, **kwargs)


@dataclasses.dataclass(frozen=True)
class Promote:
    """A layer's ``promote_dtype`` that takes compressed arrays too.

    Attributes:
      original: what the layer had.
      dense: decompress, for methods that can compute with nothing else.
    """

    original: Callable[..., Any]
    dense: bool = False

    def __call__(self, args: Any, /, **kwargs: Any) -> tuple[Any, ...]:
        """Cast as the layer does."""
        out = cast_alike(args, lambda dense: self.original(tuple(dense), **kwargs))
        if self.dense:
            out = [w.todense() if is_compressed(w) else w for w in out]
        return tuple(out)


class CompressedEmbed(nnx.Embed):
    """An `nnx.Embed` whose `attend` multiplies with the compressed embedding."""

    def attend(self, query: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Attend over the embedding, as `nnx.Embed.attend` does."""
        promote = dataclasses.replace(cast(Promote, self.promote_dtype), dense=False)
        query, embedding = promote((query, self.embedding[...]), dtype=self.dtype)
        axes = (((query.ndim - 1,), (1,)), ((), ()))
        return dot_general(query, embedding, axes, out_sharding=out_sharding)


def check_adaptable(module: Any, path: str, names: Sequence[str]) -> None:
    """Raise if a layer of Flax cannot take compressed variables.

    Args:
      module: a module.
      path: its path, for the message.
      names: its attributes that are to be compressed.

    Raises:
      TypeError: it multiplies with a function of its own.
    """
    found = _function_of(module)
    if found is None or not _multiplies(module):
        return
    name, default, _ = found
    own = getattr(module, name)
    cls = getattr(module, f"{name}_cls", None)
    if not isinstance(own, Replaced) and own is not default or cls is not None:
        where = f"module {path!r}" if path else "the model itself"
        raise TypeError(
            f"{where} ({type(module).__name__}) has a {name} of its own, which takes "
            f"no compressed {' or '.join(names)}: leave its {name} as it is by "
            f"default, or {DENSE_ADVICE}"
        )


def adapt(module: Any, names: Sequence[str]) -> None:
    """Let a module compute with compressed variables.

    Args:
      module: a module that passed `check_adaptable`.
      names: its attributes that are compressed.
    """
    if not _multiplies(module):
        if type(module).__module__.startswith("flax."):
            for name in names:
                getattr(module, name).set_metadata(reads_dense=True)
        return
    if (found := _function_of(module)) is not None:
        name, original, function = found
        setattr(module, name, Replaced(original, function))
    is_embed = isinstance(module, nnx.Embed)
    module.promote_dtype = Promote(module.promote_dtype, dense=is_embed)
    if type(module) is nnx.Embed:
        object.__setattr__(module, "__class__", CompressedEmbed)


def restore(module: nnx.Module) -> None:
    """Undo `adapt`.

    Args:
      module: any module.
    """
    for name, value in vars(module).items():
        if isinstance(value, Replaced | Promote):
            setattr(module, name, value.original)
    if type(module) is CompressedEmbed:
        object.__setattr__(module, "__class__", nnx.Embed)


def wrapping_norm(path: str, nodes: dict[str, Any]) -> str | None:
    """Find a module around a path that normalizes the weights within it.

    Args:
      path: path of a leaf.
      nodes: the nodes of the model by path.

    Returns:
      The path of the module, or None.
    """
    norms = nnx.WeightNorm | nnx.SpectralNorm
    keys = path.split("/")
    above = ("/".join(keys[:i]) for i in range(len(keys)))
    return next((p for p in above if isinstance(nodes.get(p), norms)), None)


def _function_of(module: Any) -> tuple[str, Any, Callable[..., Any]] | None:
    """Find what a layer of Flax multiplies with."""
    found = (v for kind, v in _FUNCTIONS.items() if isinstance(module, kind))
    return next(found, None)


def _multiplies(module: Any) -> bool:
    """Tell whether a layer of Flax takes its kernel compressed."""
    if isinstance(module, nnx.Conv):
        return module.mask is None
    return isinstance(module, (*_FUNCTIONS, nnx.Embed))
