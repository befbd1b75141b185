"""Models of both Flax libraries as two pure functions that also take compressed params.

The models themselves know nothing of nmjax: a linen model runs through
`nmjax.linen.apply`, and `nmjax.nnx.load` puts the params into an nnx model.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from flax import nnx

from nmjax import linen as nm_linen
from nmjax import nnx as nm_nnx


class Network(NamedTuple):
    """A model as pure functions.

    Attributes:
      init: ``key -> (params, rest)``; ``rest`` are variables that are not trained, such
        as batch statistics.
      apply: ``(params, rest, *inputs, method="__call__", key=None) -> (output, rest)``.
        Leaves of params may be compressed. With a key it runs as in training: dropout
        draws from the key and batch statistics are updated.
    """

    init: Callable[[jax.Array], tuple[Any, Any]]
    apply: Callable[..., tuple[Any, Any]]


def linen_network(model: nn.Module, *blank: jax.Array) -> Network:
    """Return a linen model as a `Network`; ``blank`` are inputs to initialise with."""

    def init(key: jax.Array) -> tuple[Any, Any]:
        variables = dict(model.init(key, *blank))
        return variables.pop("params"), variables

    def apply(
        params: Any,
        rest: Any,
        *inputs: Any,
        method: str = "__call__",
        key: jax.Array | None = None,
    ) -> tuple[Any, Any]:
        variables = {"params": params, **rest}
        if key is None:
            return nm_linen.apply(model, variables, *inputs, method=method), rest
        output, changed = nm_linen.apply(
            model,
            variables,
            *inputs,
            method=method,
            train=True,
            rngs={"dropout": key},
            mutable=list(rest),
        )
        return output, {**rest, **changed}

    return Network(init, apply)


def nnx_network(make: Callable[[nnx.Rngs], nnx.Module], dropout: bool) -> Network:
    """Return an nnx model as a `Network`.

    Args:
      make: Makes the model.
      dropout: Whether methods of the model take the keys of dropout as ``rngs``.
    """
    abstract = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    graph, blank, _ = nnx.split(abstract, nnx.Param, ...)

    def init(key: jax.Array) -> tuple[Any, Any]:
        _, params, rest = nnx.split(make(nnx.Rngs(key)), nnx.Param, ...)
        return params, rest

    def apply(
        params: Any,
        rest: Any,
        *inputs: Any,
        method: str = "__call__",
        key: jax.Array | None = None,
    ) -> tuple[Any, Any]:
        model = nm_nnx.load(nnx.merge(graph, blank, rest, copy=True), params)
        if key is None:
            model.eval()
            return getattr(model, method)(*inputs), rest
        model.train()
        keys = {"rngs": nnx.Rngs(dropout=key)} if dropout else {}
        output = getattr(model, method)(*inputs, **keys)
        return output, nnx.split(model, nnx.Param, ...)[2]

    return Network(init, apply)
