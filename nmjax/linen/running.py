"""Run an unmodified linen model on params of which some are compressed."""

import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import errors
from flax import linen as nn
from flax.core import meta

from nmjax import operands
from nmjax.formats import is_compressed
from nmjax.kernels import conv_general_dilated, dot_general
from nmjax.operands import (
    DENSE_ADVICE,
    MULTIPLY_ADVICE,
    cast_alike,
    einsum,
    guarded,
)
from nmjax.paths import path_name


def apply(
    model: nn.Module, variables: Mapping[str, Any], *args: Any, **kwargs: Any
) -> Any:
    """Apply a model to variables whose params may be compressed.

    Computes what ``model.apply`` computes on the decompressed params. The model is not
    changed, and modules without compressed leaves run as they always do.

    - `Dense`, `DenseGeneral` and what is made of them (attention, recurrent cells),
      `Einsum`, `Conv` and `Embed.attend` multiply with the compressed kernel, through
      `nmjax.dot_general` and `nmjax.conv_general_dilated`.
    - All other modules of Flax, `Embed.__call__` among them, and convolutions with a
      mask decompress it.
    - Modules of yours get the compressed array from ``self.param`` and can give it to
      `nmjax.matmul`, which takes dense arrays just as well.

    Works within `jax.jit`, `jax.grad`, `jax.vmap` and `jax.export`, and with lifted
    modules: `nn.scan` and `nn.vmap` over compressed stacks whose layers are the leading
    axis, `nn.remat`, `nn.jit`.

    Args:
      model: a linen module.
      variables: its variables; leaves of ``variables["params"]`` may be compressed
        arrays, as `nmjax.compress` makes them.
      *args: arguments of the model.
      **kwargs: keyword arguments of ``model.apply`` (``rngs``, ``method``, ``mutable``,
        ``capture_intermediates``) and of the model.

    Returns:
      What ``model.apply`` returns.

    Raises:
      TypeError: a module of yours uses a compressed leaf as a dense array; or a layer
        has a ``dot_general`` or ``conv_general_dilated`` of its own, or is wrapped in
        `nn.WeightNorm` or `nn.SpectralNorm`. The message names the module.
      flax.errors.ScopeParamShapeError: a leaf has another dense shape than the model
        expects.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import nmjax as nm
      >>> from flax import linen as nn
      >>> model = nn.Sequential([nn.Dense(16), nn.relu, nn.Dense(4)])
      >>> x = jnp.ones((2, 8))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> plan = nm.plan(params, nm.NM(2, 4))
      >>> params = nm.project(params, plan)
      >>> small = nm.compress(params, plan)
      >>> y = nm.linen.apply(model, {"params": small}, x)
      >>> bool(jnp.allclose(y, model.apply({"params": params}, x), atol=1e-5))
      True
    """
    with intercept():
        return model.apply(variables, *args, **kwargs)


@contextlib.contextmanager
def intercept() -> Iterator[None]:
    """Let linen modules take compressed params within a ``with`` block.

    For code that calls ``model.apply`` itself, and for bound modules. It holds for what
    is traced or run within the block, in this thread; see `apply` for what is covered.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import nmjax as nm
      >>> from flax import linen as nn
      >>> model = nn.Dense(4, use_bias=False)
      >>> params = {"kernel": jnp.tile(jnp.array([1.0, 2.0, 0.0, 0.0])[:, None], 4)}
      >>> small = nm.compress(params, {"kernel": params["kernel"] != 0})
      >>> with nm.linen.intercept():
      ...     model.bind({"params": small})(jnp.ones((1, 4))).tolist()
      [[3.0, 3.0, 3.0, 3.0]]
    """
    with nn.intercept_methods(_intercept):
        yield


@dataclasses.dataclass(frozen=True)
class Promote:
    """A layer's ``promote_dtype`` that takes compressed arrays too.

    Attributes:
      original: what the layer had.
      dense: decompress, for layers that can compute with nothing else.
    """

    original: Callable[..., Any]
    dense: bool = False

    @classmethod
    def of(cls, promote: Callable[..., Any], dense: bool) -> "Promote":
        """Wrap a function once, however often it is asked for."""
        return promote if isinstance(promote, cls) else cls(promote, dense)

    def __call__(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Cast as the layer does."""
        out = cast_alike(args, lambda dense: self.original(*dense, **kwargs))
        return [w.todense() if self.dense and is_compressed(w) else w for w in out]


def _intercept(
    next_fun: Callable[..., Any],
    args: Any,
    kwargs: Any,
    context: nn.module.InterceptorContext,
) -> Any:
    """Call a method of a module, prepared for the compressed leaves that it owns."""
    module = context.module
    if module.scope is None:
        return next_fun(*args, **kwargs)
    if isinstance(module, nn.WeightNorm | nn.SpectralNorm):
        _check_norm(module)
    if not _compressed_names(module):
        return next_fun(*args, **kwargs)
    kind, method = type(module), context.method_name
    if method == "__call__" and kind.__call__ is nn.Einsum.__call__:
        next_fun = functools.partial(_einsum, module, next_fun)
    if method == "attend" and getattr(kind, "attend", None) is nn.Embed.attend:
        next_fun = functools.partial(_attend, module)
    if "param" in vars(module):  # called by a method of the same module
        return next_fun(*args, **kwargs)
    changes = _changes(module)
    before = {name: getattr(module, name) for name in changes}
    object.__setattr__(module, "param", functools.partial(_param, module))
    for name, value in changes.items():
        object.__setattr__(module, name, value)
    try:
        return next_fun(*args, **kwargs)
    except TypeError as error:
        if f"{operands.__name__}." not in str(error):
            raise
        # A primitive of JAX got a guarded array, and names its class alone.
        raise TypeError(
            f"{_title(module)}, or what it calls, uses a compressed leaf as a dense "
            f"array: {MULTIPLY_ADVICE}, or {DENSE_ADVICE}"
        ) from error
    finally:
        object.__delattr__(module, "param")
        for name, value in before.items():
            object.__setattr__(module, name, value)


def _compressed_names(module: nn.Module) -> list[str]:
    """Name the compressed leaves that a module owns itself."""
    params = module.variables.get("params", {})
    return [
        name for name, value in params.items() if is_compressed(_without_box(value))
    ]


def _changes(module: Any) -> dict[str, Any]:
    """Give the attributes with which a layer of Flax takes a compressed kernel."""
    changes = {}
    if isinstance(module, nn.Dense | nn.DenseGeneral):
        changes["dot_general"] = dot_general
    elif isinstance(module, nn.Conv):
        changes["conv_general_dilated"] = conv_general_dilated
    for name, function in changes.items():
        own = getattr(module, name), getattr(module, f"{name}_cls")
        if own not in ((None, None), (function, None)):
            raise TypeError(
                f"{_title(module)} has a {name} of its own, which takes no compressed "
                f"kernel: leave its {name} and {name}_cls None, or {DENSE_ADVICE}"
            )
    if hasattr(module, "promote_dtype"):
        changes["promote_dtype"] = Promote.of(
            module.promote_dtype, dense=isinstance(module, nn.Embed | nn.Einsum)
        )
    return changes


def _param(
    module: nn.Module,
    name: str,
    init_fn: Callable[..., Any],
    *init_args: Any,
    unbox: bool = True,
    **init_kwargs: Any,
) -> Any:
    """Do what `nn.Module.param` does, and let compressed arrays pass its check."""
    param = functools.partial(type(module).param, module, name)
    boxed = module.get_variable("params", name)
    w = _without_box(boxed)
    if not is_compressed(w):
        return param(init_fn, *init_args, unbox=unbox, **init_kwargs)
    key = jax.random.key(0)
    expected = jax.eval_shape(lambda: init_fn(key, *init_args, **init_kwargs))
    shape = jax.tree.leaves(expected)[0].shape
    if w.shape != shape:
        assert module.scope is not None
        raise errors.ScopeParamShapeError(name, module.scope.path_text, w.shape, shape)
    # Takes the name, and compares what is stored with itself.
    param(lambda _: jax.tree.map(jnp.zeros_like, boxed), unbox=False)
    if _is_of_flax(module) and not _multiplies(module):
        return w.todense() if unbox else boxed
    if not unbox:
        return boxed
    return guarded(w, "/".join((*module.path, name)), _title(module))


def _multiplies(module: Any) -> bool:
    """Tell whether a layer of Flax takes its kernel compressed."""
    if isinstance(module, nn.Conv):
        return module.mask is None
    return isinstance(module, nn.Dense | nn.DenseGeneral | nn.Einsum | nn.Embed)


def _einsum(
    module: Any, next_fun: Any, inputs: Any, einsum_str: str | None = None
) -> jax.Array:
    """Compute `nn.Einsum` with a compressed kernel."""
    equation = nn.merge_param("einsum_str", module.einsum_str, einsum_str)
    terms = re.fullmatch(r"[\w.]+,(\w+)->([\w.]+)", equation.replace(" ", ""))
    if terms is None:  # decompressed, or an error of Flax
        return next_fun(inputs, einsum_str)
    right, result = terms.groups()
    kernel = module.param(
        "kernel", module.kernel_init, module.shape, module.param_dtype
    )
    bias, lengths = None, dict(zip(right, module.shape, strict=True))
    if module.use_bias:
        shape = [lengths[axis] for axis in result if axis in lengths]
        bias = module.param("bias", module.bias_init, shape, module.param_dtype)
    promote = dataclasses.replace(module.promote_dtype, dense=False)
    inputs, kernel, bias = promote(inputs, kernel, bias, dtype=module.dtype)
    y = einsum(
        equation,
        inputs,
        kernel,
        precision=module.precision,
        preferred_element_type=module.preferred_element_type,
    )
    if bias is None:
        return y
    axes = result.replace("...", "." * (y.ndim - len(result.replace("...", ""))))
    return y + jnp.reshape(bias, [lengths.get(axis, 1) for axis in axes])


def _attend(module: Any, query: Any) -> jax.Array:
    """Compute `nn.Embed.attend` with a compressed embedding."""
    promote = dataclasses.replace(module.promote_dtype, dense=False)
    query, embedding = promote(query, module.embedding, dtype=module.dtype)
    return dot_general(query, embedding, (((query.ndim - 1,), (1,)), ((), ())))


def _check_norm(module: Any) -> None:
    """Raise if a layer whose weights are normalized has compressed ones."""
    layer = module.layer_instance
    params = {} if layer.scope is None else layer.variables.get("params", {})
    leaves, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_compressed)
    for path, leaf in leaves:
        if is_compressed(leaf):
            name = "/".join((*layer.path, path_name(path)))
            raise TypeError(
                f"{_title(module)} normalizes the weights of its layer, and leaf "
                f"{name!r} is compressed: {DENSE_ADVICE}"
            )


def _title(module: nn.Module) -> str:
    """Name a module in a message."""
    path = "/".join(module.path)
    name = type(module).__name__
    return f"module {path!r} ({name})" if path else f"the model itself ({name})"


def _without_box(value: Any) -> Any:
    """Take a value out of its box, without its sharding, which is for dense arrays."""
    while isinstance(value, meta.AxisMetadata):
        if isinstance(value, meta.Partitioned):
            value = value.unbox(apply_constraint=False)
        else:
            value = value.unbox()
    return value


def _is_of_flax(module: nn.Module) -> bool:
    """Tell whether Flax defines a module, transformed or not."""
    modules = (kind.__module__ for kind in type(module).__mro__)
    first = next(name for name in modules if name != "flax.linen.transforms")
    return first.startswith("flax.")
