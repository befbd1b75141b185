"""Two image classifiers in flax linen, as anyone would write them.

They import nothing of nmjax. `nnx_models.py` has the same in flax nnx, and the linen
transformer of `translation.py` beside them.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp


class CNN(nn.Module):
    """Four convolutions with batch normalisation and a hidden layer."""

    width: int
    classes: int

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Map images ``(batch, height, width, channels)`` to logits."""
        x = images
        widths = {"stem": 1, "conv1": 2, "conv2": 2, "conv3": 4}
        for name, factor in widths.items():
            stride = 1 if name in ("stem", "conv2") else 2
            x = nn.Conv(factor * self.width, (3, 3), stride, use_bias=False, name=name)(
                x
            )
            norm = nn.BatchNorm(momentum=0.9, name=f"{name}_norm")
            x = nn.relu(norm(x, use_running_average=not train))
        x = nn.relu(nn.Dense(4 * self.width, name="hidden")(x.mean((1, 2))))
        return nn.Dense(self.classes, name="head")(x)


class EncoderLayer(nn.Module):
    """Pre-norm transformer layer without a mask."""

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map ``(batch, places, width)`` to the same shape."""
        width = x.shape[-1]
        attention = nn.MultiHeadDotProductAttention(self.heads, name="attention")
        x = x + attention(nn.LayerNorm(name="norm1")(x))
        y = nn.gelu(nn.Dense(4 * width, name="up")(nn.LayerNorm(name="norm2")(x)))
        return x + nn.Dense(width, name="down")(y)


class ViT(nn.Module):
    """Transformer encoder over square patches, whose outputs are averaged."""

    patch: int
    width: int
    heads: int
    layers: int
    classes: int

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Map images ``(batch, height, width, channels)`` to logits."""
        del train  # there is no dropout
        side = (self.patch, self.patch)
        x = nn.Conv(self.width, side, side, name="patches")(images)
        x = x.reshape(x.shape[0], -1, self.width)
        places = nn.initializers.normal(0.02)
        x = x + self.param("places", places, x.shape[1:], jnp.float32)
        for index in range(self.layers):
            x = EncoderLayer(self.heads, name=f"layers_{index}")(x)
        x = nn.LayerNorm(name="norm")(x).mean(1)
        return nn.Dense(self.classes, name="head")(x)
