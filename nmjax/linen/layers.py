"""Linen layers that store and train a sparse kernel from the start."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype

from nmjax.formats import FanInArray, NMArray
from nmjax.kernels import matmul
from nmjax.positions import check_trainable, random_codes, random_inputs
from nmjax.typing import FloatArray, MaskArray

POSITIONS = "positions"

_Variables = dict[str, Any]


class FanInDense(nn.Module):
    r"""A dense layer of which every output reads the same number of random inputs.

    .. math:: y_f = b_f + \sum_{j < k} v_{fj} \, x_{i_{fj}}

    The stored weights are the param ``values``, drawn by `kernel_init` for a kernel of
    shape ``(fan_in, features)``, so that its scale fits the inputs that are there.
    Where they stand is drawn once and never changes: it is in the collection
    ``"positions"``, apart from what is trained. Pass it to ``apply`` with the params,
    and to `nn.scan` or `nn.vmap` in ``variable_axes``.

    Attributes:
      features: number of outputs.
      fan_in: number k of inputs of each output.
      active: number of outputs that have inputs; None means all. Others are their bias.
      use_bias: whether to add a bias.
      dtype: dtype of the computation, by default that of inputs and params.
      param_dtype: dtype of the params.
      kernel_init: initializer of the values.
      bias_init: initializer of the bias.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import nmjax as nm
      >>> layer = nm.linen.FanInDense(features=16, fan_in=3)
      >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 64)))
      >>> jax.tree.map(jnp.shape, variables["params"])
      {'bias': (16,), 'values': (16, 3)}
      >>> layer.apply(variables, jnp.ones((5, 64))).shape
      (5, 16)
      >>> grads = jax.grad(
      ...     lambda params: layer.apply({**variables, "params": params},
      ...                                jnp.ones((5, 64))).sum()
      ... )(variables["params"])

    Reference:
      Condensed layers: Lasby, Golubeva, Evci, Nica and Ioannou, "Dynamic Sparse
      Training with Structured Sparsity", 2024, arXiv 2305.02299.
    """

    features: int
    fan_in: int
    active: int | None = None
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Callable[..., Any] = nn.initializers.lecun_normal()
    bias_init: Callable[..., Any] = nn.initializers.zeros_init()

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Apply the layer along the last axis of the inputs."""
        length = inputs.shape[-1]
        active = self.features if self.active is None else self.active

        def draw() -> jax.Array:
            return random_inputs(self.make_rng("params"), length, active, self.fan_in)

        def first() -> jax.Array:
            return jnp.arange(active, dtype=jnp.int32)

        indices = self.variable(POSITIONS, "indices", draw).value
        neurons = self.variable(POSITIONS, "neurons", first).value
        shape = (length, self.features)

        def kernel(values: jax.Array) -> FanInArray:
            return FanInArray(values, None, indices, neurons, shape, (-1,))

        return _apply(self, inputs, (active, self.fan_in), kernel)

    @classmethod
    def from_compressed(
        cls, kernel: FanInArray, bias: FloatArray | None = None, **attributes: Any
    ) -> tuple["FanInDense", _Variables]:
        """Make the layer of a compressed matrix.

        Args:
          kernel: a compressed matrix whose neurons are its columns.
          bias: the bias, or None for a layer without.
          **attributes: other attributes of the layer.

        Returns:
          The layer and its variables.

        Raises:
          ValueError: the array is no such matrix.

        Example:
          >>> import jax.numpy as jnp
          >>> import nmjax as nm
          >>> w = nm.formats.FanInArray.from_dense(jnp.array([[0.0, 2.0], [1.0, 0.0]]))
          >>> layer, variables = nm.linen.FanInDense.from_compressed(w)
          >>> layer.apply(variables, jnp.array([3.0, 5.0])).tolist()
          [5.0, 6.0]
        """
        check_trainable(kernel, kernel.neuron_axes == (-1,))
        layer = cls(
            kernel.shape[1],
            kernel.fan_in,
            active=kernel.values.shape[0],
            use_bias=bias is not None,
            **attributes,
        )
        positions = {"indices": kernel.indices, "neurons": kernel.neurons}
        return layer, _variables(kernel, bias, positions)

    @classmethod
    def from_dense(
        cls,
        kernel: FloatArray,
        bias: FloatArray | None = None,
        *,
        mask: MaskArray | None = None,
        **attributes: Any,
    ) -> tuple["FanInDense", _Variables]:
        """Make the layer of an exactly sparse dense kernel.

        Args:
          kernel: array ``(inputs, features)``.
          bias: the bias, or None for a layer without.
          mask: active weights, by default those that are not zero.
          **attributes: other attributes of the layer.

        Returns:
          The layer and its variables.

        Raises:
          ValueError: as `nmjax.formats.FanInArray.from_dense`.
        """
        small = FanInArray.from_dense(kernel, mask=mask)
        return cls.from_compressed(small, bias, **attributes)


class NMDense(nn.Module):
    """A dense layer of which every output reads random n of every m inputs.

    As `FanInDense`, with a kernel in the `nmjax.formats.NMArray` format.

    Attributes:
      features: number of outputs.
      n: weights kept of a group.
      m: length of a group; the number of inputs is a multiple of it.
      use_bias: whether to add a bias.
      dtype: dtype of the computation, by default that of inputs and params.
      param_dtype: dtype of the params.
      kernel_init: initializer of the values, for a kernel of shape
        ``(inputs * n / m, features)``.
      bias_init: initializer of the bias.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import nmjax as nm
      >>> layer = nm.linen.NMDense(features=16, n=2, m=4)
      >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 64)))
      >>> jax.tree.map(jnp.shape, variables["params"])
      {'bias': (16,), 'values': (16, 32)}
      >>> layer.apply(variables, jnp.ones((5, 64))).shape
      (5, 16)
    """

    features: int
    n: int = 2
    m: int = 4
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Callable[..., Any] = nn.initializers.lecun_normal()
    bias_init: Callable[..., Any] = nn.initializers.zeros_init()

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Apply the layer along the last axis of the inputs."""
        length, n, m = inputs.shape[-1], self.n, self.m

        def draw() -> jax.Array:
            return random_codes(self.make_rng("params"), length, self.features, n, m)

        codes = self.variable(POSITIONS, "codes", draw).value
        shape = (length, self.features)

        def kernel(values: jax.Array) -> NMArray:
            return NMArray(values, None, codes, n, m, -2, shape)

        return _apply(self, inputs, (self.features, length // m * n), kernel)

    @classmethod
    def from_compressed(
        cls, kernel: NMArray, bias: FloatArray | None = None, **attributes: Any
    ) -> tuple["NMDense", _Variables]:
        """Make the layer of a compressed matrix.

        Args:
          kernel: a compressed matrix with groups along axis -2.
          bias: the bias, or None for a layer without.
          **attributes: other attributes of the layer.

        Returns:
          The layer and its variables.

        Raises:
          ValueError: the array is no such matrix.
        """
        check_trainable(kernel, kernel.axis == -2)
        use_bias = bias is not None
        layer = cls(
            kernel.shape[1], kernel.n, kernel.m, use_bias=use_bias, **attributes
        )
        return layer, _variables(kernel, bias, {"codes": kernel.codes})

    @classmethod
    def from_dense(
        cls,
        kernel: FloatArray,
        bias: FloatArray | None = None,
        *,
        n: int = 2,
        m: int = 4,
        mask: MaskArray | None = None,
        **attributes: Any,
    ) -> tuple["NMDense", _Variables]:
        """Make the layer of an exactly sparse dense kernel.

        Args:
          kernel: array ``(inputs, features)``.
          bias: the bias, or None for a layer without.
          n: weights kept of a group.
          m: length of a group.
          mask: active weights, by default those that are not zero.
          **attributes: other attributes of the layer.

        Returns:
          The layer and its variables.

        Raises:
          ValueError: as `nmjax.formats.NMArray.from_dense`.
        """
        small = NMArray.from_dense(kernel, n, m, mask=mask)
        return cls.from_compressed(small, bias, **attributes)


def _apply(
    module: Any,
    inputs: jax.Array,
    shape: tuple[int, int],
    kernel: Callable[[jax.Array], Any],
) -> jax.Array:
    """Multiply with the kernel of the stored values, and add the bias."""

    def init(key: Any, shape: tuple[int, int], dtype: Any) -> jax.Array:
        return module.kernel_init(key, shape[::-1], dtype).T

    values = module.param("values", init, shape, module.param_dtype)
    bias = None
    if module.use_bias:
        bias = module.param(
            "bias", module.bias_init, (module.features,), module.param_dtype
        )
    inputs, values, bias = promote_dtype(inputs, values, bias, dtype=module.dtype)
    return matmul(inputs, kernel(values), bias=bias)


def _variables(kernel: Any, bias: Any, positions: dict[str, Any]) -> _Variables:
    """Arrange variables as the layers have them."""
    params = {"values": kernel.values}
    if bias is not None:
        params["bias"] = bias
    return {"params": params, POSITIONS: positions}
