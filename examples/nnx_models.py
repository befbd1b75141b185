"""Models in flax nnx, as anyone would write them; they import nothing of nmjax.

`CNN` and `ViT` are those of `linen_models.py`, `Translator` is that of
`translation.py`: with the same weights they compute the same. ``model.train()`` and
``model.eval()`` switch batch statistics and dropout; the keys of dropout are passed in.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from multi30k import PAD
from translation import positions


class CNN(nnx.Module):
    """Four convolutions with batch normalisation and a hidden layer."""

    def __init__(self, channels: int, width: int, classes: int, *, rngs: nnx.Rngs):
        """Make the layers, for images of so many channels."""

        def conv(inputs: int, outputs: int, stride: int) -> nnx.Conv:
            return nnx.Conv(inputs, outputs, (3, 3), stride, use_bias=False, rngs=rngs)

        def norm(features: int) -> nnx.BatchNorm:
            return nnx.BatchNorm(features, momentum=0.9, rngs=rngs)

        self.stem, self.stem_norm = conv(channels, width, 1), norm(width)
        self.conv1, self.conv1_norm = conv(width, 2 * width, 2), norm(2 * width)
        self.conv2, self.conv2_norm = conv(2 * width, 2 * width, 1), norm(2 * width)
        self.conv3, self.conv3_norm = conv(2 * width, 4 * width, 2), norm(4 * width)
        self.hidden = nnx.Linear(4 * width, 4 * width, rngs=rngs)
        self.head = nnx.Linear(4 * width, classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Map images ``(batch, height, width, channels)`` to logits."""
        x = nnx.relu(self.stem_norm(self.stem(images)))
        x = nnx.relu(self.conv1_norm(self.conv1(x)))
        x = nnx.relu(self.conv2_norm(self.conv2(x)))
        x = nnx.relu(self.conv3_norm(self.conv3(x)))
        return self.head(nnx.relu(self.hidden(x.mean((1, 2)))))


class EncoderLayer(nnx.Module):
    """Pre-norm transformer layer without a mask."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        """Make the layers."""
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map ``(batch, places, width)`` to the same shape."""
        x = x + self.attention(self.norm1(x))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class ViT(nnx.Module):
    """Transformer encoder over square patches, whose outputs are averaged."""

    def __init__(
        self,
        image: tuple[int, int, int],
        *,
        patch: int,
        width: int,
        heads: int,
        layers: int,
        classes: int,
        rngs: nnx.Rngs,
    ):
        """Make the layers, for images of shape ``(height, width, channels)``."""
        side = (patch, patch)
        count = (image[0] // patch) * (image[1] // patch)
        self.patches = nnx.Conv(image[2], width, side, side, rngs=rngs)
        places = 0.02 * jax.random.normal(rngs.params(), (count, width))
        self.places = nnx.Param(places)
        stack = range(layers)
        self.layers = nnx.List([EncoderLayer(width, heads, rngs=rngs) for _ in stack])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Map images ``(batch, height, width, channels)`` to logits."""
        x = self.patches(images)
        x = x.reshape(x.shape[0], -1, x.shape[-1]) + self.places[...]
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(1))


class Layer(nnx.Module):
    """Pre-norm transformer layer; a decoder's also attends to the source."""

    def __init__(
        self, width: int, heads: int, dropout: float, cross: bool, *, rngs: nnx.Rngs
    ):
        """Make the layers; ``cross`` says whether it is a decoder's."""

        def attention() -> nnx.MultiHeadAttention:
            return nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)

        self.norm1, self.norm2 = (nnx.LayerNorm(width, rngs=rngs) for _ in range(2))
        self.self_attention = attention()
        if cross:
            self.cross_norm = nnx.LayerNorm(width, rngs=rngs)
            self.cross_attention = attention()
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)
        self.drop = nnx.Dropout(dropout)

    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array,
        memory: jax.Array | None = None,
        memory_mask: jax.Array | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        """Map ``(batch, time, width)`` to the same shape."""
        x = x + self.drop(self.self_attention(self.norm1(x), mask=mask), rngs=rngs)
        if memory is not None:
            y = self.cross_attention(self.cross_norm(x), memory, mask=memory_mask)
            x = x + self.drop(y, rngs=rngs)
        y = self.drop(nnx.relu(self.up(self.norm2(x))), rngs=rngs)
        return x + self.drop(self.down(y), rngs=rngs)


class Translator(nnx.Module):
    """Encoder-decoder transformer with one embedding for source, target and output."""

    def __init__(
        self,
        vocabulary: int,
        *,
        width: int,
        heads: int,
        layers: int,
        dropout: float,
        rngs: nnx.Rngs,
    ):
        """Make the layers."""
        self.embedding = nnx.Embed(vocabulary, width, rngs=rngs)
        self.drop = nnx.Dropout(dropout)

        def stack(cross: bool) -> list[Layer]:
            return [
                Layer(width, heads, dropout, cross, rngs=rngs) for _ in range(layers)
            ]

        self.encoder, self.decoder = nnx.List(stack(False)), nnx.List(stack(True))
        self.encoder_norm = nnx.LayerNorm(width, rngs=rngs)
        self.decoder_norm = nnx.LayerNorm(width, rngs=rngs)

    def _embed(self, tokens: jax.Array, rngs: nnx.Rngs | None) -> jax.Array:
        x = self.embedding(tokens)
        x = x * x.shape[-1] ** 0.5 + positions(*x.shape[1:])
        return self.drop(x, rngs=rngs)

    def encode(self, source: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Read source tokens ``(batch, time)``; return ``(batch, time, width)``."""
        x = self._embed(source, rngs)
        mask = nnx.make_attention_mask(source > PAD, source > PAD, dtype=jnp.bool_)
        for layer in self.encoder:
            x = layer(x, mask, rngs=rngs)
        return self.encoder_norm(x)

    def decode(
        self,
        memory: jax.Array,
        source: jax.Array,
        tokens: jax.Array,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        """Return the hidden state after each token, ``(batch, time, width)``."""
        x = self._embed(tokens, rngs)
        memory_mask = nnx.make_attention_mask(
            jnp.ones(tokens.shape, jnp.bool_), source > PAD, dtype=jnp.bool_
        )
        mask = nnx.make_causal_mask(tokens, dtype=jnp.bool_)
        for layer in self.decoder:
            x = layer(x, mask, memory, memory_mask, rngs)
        return self.decoder_norm(x)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Return scores of all pieces, ``(..., vocabulary)``."""
        return self.embedding.attend(hidden)

    def __call__(
        self, source: jax.Array, tokens: jax.Array, rngs: nnx.Rngs | None = None
    ) -> jax.Array:
        """Return the logits of the piece after each of ``tokens``."""
        hidden = self.decode(self.encode(source, rngs), source, tokens, rngs)
        return self.logits(hidden)
