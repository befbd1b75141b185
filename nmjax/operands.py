"""Compressed arrays as operands of layers: where they come from, casts and einsums.

What `nmjax.linen` and `nmjax.nnx` share. Nothing here knows of Flax.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array

from nmjax.formats import Compressed
from nmjax.kernels import dot_general

MULTIPLY_ADVICE = "multiply with nm.matmul or nm.dot_general, or call .todense(), there"
DENSE_ADVICE = "give it a dense leaf, nm.decompress(leaf)"


class Origin:
    """The path of a leaf, which no comparison looks at.

    Equal origins let one compiled function serve layers that differ by name only.

    Attributes:
      path: path of the leaf.
      holder: what holds it, for a message.
    """

    def __init__(self, path: str, holder: str):
        """Keep the two texts."""
        self.path, self.holder = path, holder

    def __eq__(self, other: object) -> bool:
        """Tell whether the other one is an origin too."""
        return isinstance(other, Origin)

    def __hash__(self) -> int:
        """Give the same number for all."""
        return 0


def guarded(w: Compressed, path: str, holder: str) -> Compressed:
    """Give an array that names its leaf where it is used as if it were dense.

    Args:
      w: a compressed array.
      path: path of the leaf.
      holder: what holds it, for example ``"module 'Block_0' (Block)"``.

    Returns:
      The same array, of a subclass of its class: all that takes compressed arrays takes
      it, and everything else that is done to it is an error.

    Example:
      >>> import jax.numpy as jnp
      >>> import nmjax as nm
      >>> from nmjax import formats, operands
      >>> w = formats.FanInArray.from_dense(jnp.array([[0.0, 2.0], [1.0, 0.0]]))
      >>> w = operands.guarded(w, "head/kernel", "module 'head' (Head)")
      >>> nm.matmul(jnp.array([3.0, 5.0]), w).tolist()
      [5.0, 6.0]
      >>> jnp.array([3.0, 5.0]) @ w
      Traceback (most recent call last):
      ...
      TypeError: module 'head' (Head) uses its compressed leaf 'head/kernel' ...
    """
    kind = _guarded_type(type(w).kind if isinstance(w, _Guard) else type(w))
    return kind(**_fields(w), origin=Origin(path, holder))


def unguarded(w: Compressed) -> Compressed:
    """Undo `guarded`.

    Args:
      w: a compressed array.

    Returns:
      The array, of its own class.
    """
    return type(w).kind(**_fields(w)) if isinstance(w, _Guard) else w


def cast_alike(operands: Sequence[Any], promote: Any) -> list[Any]:
    """Cast dense and compressed operands as a function casts dense ones.

    Args:
      operands: arrays, compressed arrays, None.
      promote: gives a list of arrays cast to one dtype. It gets a scalar of the same
        dtype in place of a compressed array.

    Returns:
      What `promote` gave, with compressed arrays of the dtype that it gave the scalars.

    Example:
      >>> import jax.numpy as jnp
      >>> from nmjax import formats, operands
      >>> w = formats.FanInArray.from_dense(jnp.array([[0.0, 2.0], [1.0, 0.0]]))
      >>> x, w = operands.cast_alike(
      ...     [jnp.ones(2), w], lambda both: [a.astype(jnp.bfloat16) for a in both]
      ... )
      >>> x.dtype, w.dtype
      (dtype(bfloat16), dtype(bfloat16))
    """
    scalars = [
        jnp.zeros((), operand.dtype) if isinstance(operand, Compressed) else operand
        for operand in operands
    ]
    return [
        unguarded(operand).astype(promoted.dtype)
        if isinstance(operand, Compressed)
        else promoted
        for operand, promoted in zip(operands, promote(scalars), strict=True)
    ]


def einsum(
    equation: str,
    lhs: Array,
    rhs: Compressed | Array,
    *,
    precision: Any = None,
    preferred_element_type: Any = None,
    **options: Any,
) -> Array:
    """Contract as `jax.numpy.einsum` does, with an array that may be compressed.

    A plain contraction goes to `nmjax.dot_general`. Where an axis is shared by all
    three terms, repeated or summed alone, a compressed array is decompressed.

    Args:
      equation: subscripts of two operands and the result, such as ``"btd,dhk->bthk"``.
      lhs: dense array.
      rhs: compressed or dense array of the same dtype.
      precision: as in `jax.numpy.einsum`.
      preferred_element_type: as in `jax.numpy.einsum`.
      **options: others of `jax.numpy.einsum`.

    Returns:
      The contraction.

    Example:
      >>> import jax.numpy as jnp
      >>> from nmjax import formats, operands
      >>> w = formats.FanInArray.from_dense(jnp.array([[0.0, 2.0], [1.0, 0.0]]))
      >>> operands.einsum("...k,kf->f...", jnp.array([[3.0, 5.0]]), w).tolist()
      [[5.0], [6.0]]
    """
    given = {name: value for name, value in options.items() if value is not None}
    given |= {"precision": precision, "preferred_element_type": preferred_element_type}
    if not isinstance(rhs, Compressed):
        return jnp.einsum(equation, lhs, rhs, **given)
    parsed = None if len(given) > 2 else _contraction(equation, lhs.ndim, rhs.ndim)
    if parsed is None:
        return jnp.einsum(equation, lhs, rhs.todense(), **given)
    out = dot_general(
        lhs, rhs, (parsed.axes, ((), ())), precision, preferred_element_type
    )
    return out.transpose(parsed.order)


class _Contraction(NamedTuple):
    axes: tuple[tuple[int, ...], tuple[int, ...]]
    order: tuple[int, ...]


def _contraction(equation: str, lhs: int, rhs: int) -> _Contraction | None:
    """Read an einsum as one contraction and a transposition, or give None."""
    operands, arrow, result = equation.replace(" ", "").partition("->")
    terms = operands.split(",")
    if not arrow or len(terms) != 2:
        return None
    left, right = terms
    letters = (c for c in map(chr, range(ord("a"), ord("z") + 1)) if c not in equation)
    dots = "".join(next(letters) for _ in range(lhs - len(left.replace("...", ""))))
    left, result = left.replace("...", dots), result.replace("...", dots)
    unique = all(len(set(term)) == len(term) for term in (left, right, result))
    summed = [c for c in right if c in left and c not in result]
    free = [c for c in left if c not in summed] + [c for c in right if c not in left]
    fits = (len(left), len(right)) == (lhs, rhs) and sorted(free) == sorted(result)
    if not unique or not summed or not fits or set(right) & set(left) & set(result):
        return None
    return _Contraction(
        (tuple(map(left.index, summed)), tuple(map(right.index, summed))),
        tuple(map(free.index, result)),
    )


def _fields(w: Any) -> dict[str, Any]:
    """Give the fields that the plain class has."""
    names = [field.name for field in dataclasses.fields(w)]
    return {name: getattr(w, name) for name in names if name != "origin"}


class _Guard:
    """Mixin: whatever only dense arrays can do is an error that names the leaf."""

    kind: type
    origin: Origin

    # NumPy then leaves `x @ w` to us.
    __array_ufunc__ = None

    def __repr__(self) -> str:
        # Primitives of JAX quote it in their errors.
        return f"{super().__repr__()} of leaf {self.origin.path!r}"

    def _refuse(self, use: str) -> str:
        w = cast(Any, self)
        return (
            f"{self.origin.holder} uses its compressed leaf {self.origin.path!r} "
            f"({type(self).__name__} of shape {w.shape}) as a dense array ({use}): "
            f"{MULTIPLY_ADVICE}, or {DENSE_ADVICE}"
        )

    # A property: primitives of JAX look for it, and do not call it.
    @property
    def __jax_array__(self) -> NoReturn:
        raise TypeError(self._refuse("in a function of JAX"))

    def __array__(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError(self._refuse("in a function of NumPy"))

    def __getitem__(self, key: Any) -> Any:
        if key is Ellipsis:
            return self
        raise TypeError(self._refuse("indexed"))

    def __iter__(self) -> NoReturn:
        raise TypeError(self._refuse("iterated over"))

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("_") or name in ("origin", "kind"):
            raise AttributeError(name)
        raise AttributeError(self._refuse(f".{name}"))


def _operator(name: str) -> Any:
    def operator(self: Any, *_: Any) -> NoReturn:
        raise TypeError(self._refuse(name))

    return operator


for _name in "matmul mul add sub truediv floordiv mod pow".split():
    for _form in (f"__{_name}__", f"__r{_name}__"):
        setattr(_Guard, _form, _operator(_form))
for _name in "neg pos abs lt le gt ge".split():
    setattr(_Guard, f"__{_name}__", _operator(f"__{_name}__"))


@functools.cache
def _guarded_type(kind: type) -> Any:
    """Make the guarded subclass of a class of compressed arrays."""
    field = dataclasses.field(metadata={"static": True}, kw_only=True)
    body = {"__annotations__": {"origin": Origin}, "origin": field, "kind": kind}
    made = dataclasses.dataclass(frozen=True, repr=False)(
        type(kind.__name__, (_Guard, kind), body)
    )
    return jax.tree_util.register_dataclass(made)
