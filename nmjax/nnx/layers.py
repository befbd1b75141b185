"""nnx layers that store and train a sparse kernel from the start."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype

from nmjax.formats import FanInArray, NMArray
from nmjax.kernels import matmul
from nmjax.positions import check_trainable, random_codes, random_inputs
from nmjax.typing import FloatArray, MaskArray

_KERNEL_INIT = nnx.initializers.lecun_normal()
_BIAS_INIT = nnx.initializers.zeros_init()


class Positions(nnx.Variable):
    """Where the stored weights of a sparse layer stand; never trained."""


class _SparseDense(nnx.Module):
    """What both layers do alike; they differ in how the kernel is stored."""

    values: nnx.Param[Any]
    bias: nnx.Param[Any] | None
    dtype: Any

    @property
    def kernel(self) -> Any:
        """The compressed kernel, of the values as they are now."""
        return self._kernel(self.values[...])

    def _kernel(self, values: jax.Array) -> Any:
        raise NotImplementedError

    def _set_params(
        self,
        shape: tuple[int, int],
        outputs: int,
        use_bias: bool,
        param_dtype: Any,
        kernel_init: Callable[..., Any],
        bias_init: Callable[..., Any],
        rngs: nnx.Rngs,
    ) -> None:
        """Draw params: values of a shape (stored inputs, active outputs), a bias."""
        values = kernel_init(rngs.params(), shape, param_dtype).T
        self.values = nnx.Param(values)
        self.bias = nnx.data(None)
        if use_bias:
            self.bias = nnx.Param(bias_init(rngs.params(), (outputs,), param_dtype))

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Apply the layer along the last axis of the inputs."""
        bias = None if self.bias is None else self.bias[...]
        inputs, values, bias = promote_dtype(
            (inputs, self.values[...], bias), dtype=self.dtype
        )
        return matmul(inputs, self._kernel(values), bias=bias)


class FanInDense(_SparseDense):
    r"""A linear layer of which every output reads the same number of random inputs.

    .. math:: y_f = b_f + \sum_{j < k} v_{fj} \, x_{i_{fj}}

    The stored weights are the `nnx.Param` ``values``, drawn by `kernel_init` for a
    kernel of shape ``(fan_in, out_features)``, so that its scale fits the inputs that
    are there. Where they stand is drawn once and never changes: it is in variables of
    type `Positions`, so that `nnx.grad` and `nnx.Optimizer` see floating params alone.

    Args:
      in_features: number of inputs.
      out_features: number of outputs.
      fan_in: number k of inputs of each output.
      use_bias: whether to add a bias.
      dtype: dtype of the computation, by default that of inputs and params.
      param_dtype: dtype of the params.
      kernel_init: initializer of the values.
      bias_init: initializer of the bias.
      rngs: random keys.

    Example:
      >>> import jax.numpy as jnp
      >>> import nmjax as nm
      >>> from flax import nnx
      >>> layer = nm.nnx.FanInDense(64, 16, fan_in=3, rngs=nnx.Rngs(0))
      >>> layer.kernel
      FanInArray(fan-in 3 of 64, 16 of 16 neurons, float32[64, 16], 304 bytes, 0.0742 of dense)
      >>> layer(jnp.ones((5, 64))).shape
      (5, 16)
      >>> grads = nnx.grad(lambda layer: layer(jnp.ones((5, 64))).sum())(layer)
      >>> list(grads)
      ['bias', 'values']

    Reference:
      Condensed layers: Lasby, Golubeva, Evci, Nica and Ioannou, "Dynamic Sparse
      Training with Structured Sparsity", 2024, arXiv 2305.02299.
    """  # noqa: E501

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        fan_in: int,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: Callable[..., Any] = _KERNEL_INIT,
        bias_init: Callable[..., Any] = _BIAS_INIT,
        rngs: nnx.Rngs,
    ):
        """Draw positions and params."""
        self.in_features, self.out_features = in_features, out_features
        self.fan_in, self.dtype = fan_in, dtype
        self.indices = Positions(
            random_inputs(rngs.params(), in_features, out_features, fan_in)
        )
        self.neurons = Positions(jnp.arange(out_features, dtype=jnp.int32))
        self._set_params(
            (fan_in, out_features),
            out_features,
            use_bias,
            param_dtype,
            kernel_init,
            bias_init,
            rngs,
        )

    def _kernel(self, values: jax.Array) -> FanInArray:
        shape = (self.in_features, self.out_features)
        indices, neurons = self.indices[...], self.neurons[...]
        return FanInArray(values, None, indices, neurons, shape, (-1,))

    @classmethod
    def from_compressed(
        cls, kernel: FanInArray, bias: FloatArray | None = None, *, dtype: Any = None
    ) -> "FanInDense":
        """Make the layer of a compressed matrix.

        Args:
          kernel: a compressed matrix whose neurons are its columns. Ablated ones give
            their bias.
          bias: the bias, or None for a layer without.
          dtype: dtype of the computation.

        Returns:
          The layer.

        Raises:
          ValueError: the array is no such matrix.

        Example:
          >>> import jax.numpy as jnp
          >>> import nmjax as nm
          >>> w = nm.formats.FanInArray.from_dense(jnp.array([[0.0, 2.0], [1.0, 0.0]]))
          >>> nm.nnx.FanInDense.from_compressed(w)(jnp.array([3.0, 5.0])).tolist()
          [5.0, 6.0]
        """
        check_trainable(kernel, kernel.neuron_axes == (-1,))
        layer = nnx.eval_shape(
            lambda: cls(
                *kernel.shape,
                fan_in=kernel.fan_in,
                use_bias=bias is not None,
                dtype=dtype,
                rngs=nnx.Rngs(0),
            )
        )
        return _filled(
            layer, kernel, bias, indices=kernel.indices, neurons=kernel.neurons
        )

    @classmethod
    def from_dense(
        cls,
        kernel: FloatArray,
        bias: FloatArray | None = None,
        *,
        mask: MaskArray | None = None,
        dtype: Any = None,
    ) -> "FanInDense":
        """Make the layer of an exactly sparse dense kernel.

        Args:
          kernel: array ``(in_features, out_features)``.
          bias: the bias, or None for a layer without.
          mask: active weights, by default those that are not zero.
          dtype: dtype of the computation.

        Returns:
          The layer.

        Raises:
          ValueError: as `nmjax.formats.FanInArray.from_dense`.
        """
        small = FanInArray.from_dense(kernel, mask=mask)
        return cls.from_compressed(small, bias, dtype=dtype)


class NMDense(_SparseDense):
    """A linear layer of which every output reads random n of every m inputs.

    As `FanInDense`, with a kernel in the `nmjax.formats.NMArray` format.

    Args:
      in_features: number of inputs, a multiple of m.
      out_features: number of outputs.
      n: weights kept of a group.
      m: length of a group.
      use_bias: whether to add a bias.
      dtype: dtype of the computation, by default that of inputs and params.
      param_dtype: dtype of the params.
      kernel_init: initializer of the values, for a kernel of shape
        ``(in_features * n / m, out_features)``.
      bias_init: initializer of the bias.
      rngs: random keys.

    Example:
      >>> import jax.numpy as jnp
      >>> import nmjax as nm
      >>> from flax import nnx
      >>> layer = nm.nnx.NMDense(64, 16, n=2, m=4, rngs=nnx.Rngs(0))
      >>> layer.kernel
      NMArray(2:4 along -2, float32[64, 16], 2,176 bytes, 0.531 of dense)
      >>> layer(jnp.ones((5, 64))).shape
      (5, 16)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        n: int = 2,
        m: int = 4,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: Callable[..., Any] = _KERNEL_INIT,
        bias_init: Callable[..., Any] = _BIAS_INIT,
        rngs: nnx.Rngs,
    ):
        """Draw positions and params."""
        self.in_features, self.out_features = in_features, out_features
        self.n, self.m, self.dtype = n, m, dtype
        self.codes = Positions(
            random_codes(rngs.params(), in_features, out_features, n, m)
        )
        self._set_params(
            (in_features // m * n, out_features),
            out_features,
            use_bias,
            param_dtype,
            kernel_init,
            bias_init,
            rngs,
        )

    def _kernel(self, values: jax.Array) -> NMArray:
        shape = (self.in_features, self.out_features)
        return NMArray(values, None, self.codes[...], self.n, self.m, -2, shape)

    @classmethod
    def from_compressed(
        cls, kernel: NMArray, bias: FloatArray | None = None, *, dtype: Any = None
    ) -> "NMDense":
        """Make the layer of a compressed matrix.

        Args:
          kernel: a compressed matrix with groups along axis -2.
          bias: the bias, or None for a layer without.
          dtype: dtype of the computation.

        Returns:
          The layer.

        Raises:
          ValueError: the array is no such matrix.
        """
        check_trainable(kernel, kernel.axis == -2)
        layer = nnx.eval_shape(
            lambda: cls(
                *kernel.shape,
                n=kernel.n,
                m=kernel.m,
                use_bias=bias is not None,
                dtype=dtype,
                rngs=nnx.Rngs(0),
            )
        )
        return _filled(layer, kernel, bias, codes=kernel.codes)

    @classmethod
    def from_dense(
        cls,
        kernel: FloatArray,
        bias: FloatArray | None = None,
        *,
        n: int = 2,
        m: int = 4,
        mask: MaskArray | None = None,
        dtype: Any = None,
    ) -> "NMDense":
        """Make the layer of an exactly sparse dense kernel.

        Args:
          kernel: array ``(in_features, out_features)``.
          bias: the bias, or None for a layer without.
          n: weights kept of a group.
          m: length of a group.
          mask: active weights, by default those that are not zero.
          dtype: dtype of the computation.

        Returns:
          The layer.

        Raises:
          ValueError: as `nmjax.formats.NMArray.from_dense`.
        """
        small = NMArray.from_dense(kernel, n, m, mask=mask)
        return cls.from_compressed(small, bias, dtype=dtype)


def _filled(layer: Any, kernel: Any, bias: Any, **positions: Any) -> Any:
    """Put arrays into an abstract layer."""
    layer.values.set_raw_value(kernel.values)
    if bias is not None:
        layer.bias.set_raw_value(bias)
    for name, value in positions.items():
        getattr(layer, name).set_raw_value(value)
    return layer
