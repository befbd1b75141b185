"""What `compress.py` trains and `serve.py` runs: image classifiers and a translator.

A client is rebuilt from facts that fit in JSON: which model of which library, how
large, and what its inputs are. They lie beside its checkpoints as ``client.json``.
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import checkpoints
import jax
import jax.numpy as jnp
import linen_models
import networks
import nnx_models
import numpy as np
import optax
import tokenizers
import translation
from images import augment
from multi30k import BOS, EOS, GRID, PAD, encode, pad

Facts = dict[str, Any]
MODELS = ("cnn", "vit", "translator")
LIBRARIES = ("linen", "nnx")


class Variables(NamedTuple):
    """The variables of a network; leaves of params may be compressed."""

    params: Any
    rest: Any


class Classifier:
    """A network from images to classes.

    Attributes:
      network: The model.
      dense: Regexes of params that stay dense.
      unit: What is counted in timings.
      field: Name of the inputs in a request.
    """

    unit = "images"
    field = "images"

    def __init__(self, facts: Facts):
        """Make the model that the facts describe."""
        self.facts = facts
        self.shape: tuple[int, int, int] = tuple(facts["image"])
        self.mean, self.deviation = (
            np.array(facts[name], np.float32) for name in ("mean", "deviation")
        )
        names = ["width", "classes"]
        self.dense = ("stem", "head")
        if facts["model"] == "vit":
            names += ["patch", "heads", "layers"]
            self.dense = ("patches", "places", "head")
        sizes = {name: facts[name] for name in names}
        if facts["library"] == "linen":
            kind = {"cnn": linen_models.CNN, "vit": linen_models.ViT}[facts["model"]]
            blank = jnp.zeros((1, *self.shape))
            self.network = networks.linen_network(kind(**sizes), blank)
        elif facts["model"] == "cnn":
            self.network = networks.nnx_network(
                lambda rngs: nnx_models.CNN(self.shape[2], **sizes, rngs=rngs), False
            )
        else:
            self.network = networks.nnx_network(
                lambda rngs: nnx_models.ViT(self.shape, **sizes, rngs=rngs), False
            )

    def _normal(self, images: jax.Array) -> jax.Array:
        return (images.astype(jnp.float32) - self.mean) / self.deviation

    def loss(
        self, variables: Variables, batch: Any, key: jax.Array
    ) -> tuple[jax.Array, Any]:
        """Return the mean loss of ``(images, labels)`` and the changed ``rest``."""
        images, labels = batch
        pixels, flip = self.facts["shift"], self.facts["flip"]
        x = self._normal(augment(images, key, pixels, flip))
        logits, rest = self.network.apply(*variables, x, key=key)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), rest

    def logits(self, variables: Variables, images: jax.Array) -> jax.Array:
        """Return the logits of uint8 images ``(batch, ...)``."""
        return self.network.apply(*variables, self._normal(images))[0]

    def answer(self, variables: Variables, images: jax.Array) -> jax.Array:
        """Return the likeliest classes of uint8 images, int32 ``(batch,)``."""
        return jnp.argmax(self.logits(variables, images), -1).astype(jnp.int32)

    def inputs(self, items: Sequence[Any], rows: int, first: int = 0) -> np.ndarray:
        """Return images as an array, filled up with black ones.

        Args:
          items: Images, as arrays or nested lists.
          rows: Rows of the array.
          first: Number of the first item, for messages.

        Returns:
          Pixels, uint8 ``(rows, height, width, channels)``.

        Raises:
          ValueError: An image has another shape, or pixels that are no bytes.
        """
        out = np.zeros((rows, *self.shape), np.uint8)
        for index, item in enumerate(items):
            name, image = f"image {index + first}", _array(item)
            if image is None or image.shape not in (self.shape, self.shape[:2]):
                found = "no array of numbers" if image is None else image.shape
                raise ValueError(
                    f"{name} must have shape {self.shape}, but has {found}"
                )
            if ((image < 0) | (image > 255) | (image != np.floor(image))).any():
                raise ValueError(f"pixels of {name} must be integers in 0-255")
            out[index] = image.reshape(self.shape)
        return out

    def outputs(self, answers: np.ndarray) -> list[int]:
        """Return answers as JSON has them."""
        return answers.tolist()

    def count(self, answers: np.ndarray) -> int:
        """Return how many units were made."""
        return len(answers)


def _array(item: Any) -> np.ndarray | None:
    """Return nested lists as an array, or None."""
    try:
        array = np.asarray(item)
    except ValueError:  # ragged
        return None
    return array if array.dtype.kind in "uif" else None


def _is_text(item: Any) -> bool:
    """Tell whether an item is a string that UTF-8 can encode."""
    return isinstance(item, str) and not any("\ud800" <= c <= "\udfff" for c in item)


class Translation:
    """A network from sentences to sentences, with the attributes of `Classifier`."""

    dense = ()  # embeddings are no kernels
    unit = "tokens"
    field = "sentences"

    def __init__(self, facts: Facts):
        """Make the model that the facts describe."""
        self.facts = facts
        self.vocabulary = tokenizers.Tokenizer.from_str(facts["vocabulary"])
        self.longest = facts["longest"]
        pieces = self.vocabulary.get_vocab_size()
        names = ("width", "heads", "layers", "dropout")
        sizes = {name: facts[name] for name in names}
        if facts["library"] == "linen":
            blank = jnp.ones((1, GRID), jnp.int32)
            model = translation.Translator(pieces, **sizes)
            self.network = networks.linen_network(model, blank, blank)
        else:
            self.network = networks.nnx_network(
                lambda rngs: nnx_models.Translator(pieces, **sizes, rngs=rngs), True
            )

    def loss(
        self, variables: Variables, batch: Any, key: jax.Array
    ) -> tuple[jax.Array, Any]:
        """Return the loss per token of ``(source, target)``, and ``rest``."""
        source, target = batch
        shifted = translation.shifted(target)
        logits, rest = self.network.apply(*variables, source, shifted, key=key)
        total, count = translation.token_losses(logits, target, 0.1)
        return total / count, rest

    def logits(self, variables: Variables, source: jax.Array) -> jax.Array:
        """Return the logits of the source, read as if it were its translation."""
        shifted = translation.shifted(source)
        return self.network.apply(*variables, source, shifted)[0]

    def answer(self, variables: Variables, source: jax.Array) -> jax.Array:
        """Translate greedily; every step runs the decoder over all places.

        Args:
          variables: The weights.
          source: Tokens, int32 ``(batch, time)``; rows of `PAD` are left out.

        Returns:
          Tokens, int32 ``(batch, longest)``, `PAD` after `EOS`.
        """

        def run(method: str, *inputs: jax.Array) -> jax.Array:
            return self.network.apply(*variables, *inputs, method=method)[0]

        def unfinished(carry: Any) -> jax.Array:
            place, _, done = carry
            return (place < self.longest) & ~done.all()

        def extend(carry: Any) -> Any:
            place, tokens, done = carry
            hidden = run("decode", memory, source, tokens[:, :-1])
            logits = run("logits", hidden[:, place]).at[:, PAD].set(-jnp.inf)
            token = jnp.where(done, PAD, jnp.argmax(logits, -1).astype(jnp.int32))
            tokens = tokens.at[:, place + 1].set(token)
            return place + 1, tokens, done | (token == EOS)

        memory = run("encode", source)
        shape = (len(source), self.longest + 1)
        tokens = jnp.full(shape, PAD, jnp.int32).at[:, 0].set(BOS)
        done = source[:, 0] == PAD
        return jax.lax.while_loop(unfinished, extend, (0, tokens, done))[1][:, 1:]

    def inputs(self, items: Sequence[Any], rows: int, first: int = 0) -> np.ndarray:
        """Return sentences as tokens.

        Args:
          items: Sentences; those without a word have no translation either.
          rows: Rows of the array; those below the sentences are `PAD`.
          first: Number of the first item, for messages.

        Returns:
          Tokens, int32 ``(rows, longest)``.

        Raises:
          ValueError: An item is no text, or too long.
        """
        for index, item in enumerate(items, first):
            if not _is_text(item):
                raise ValueError(f"sentence {index} must be a text, not {item!r:.40}")
        # One more than fits, to see what would be cut.
        ids = encode(self.vocabulary, items, self.longest + 1)
        for index, row in enumerate(ids, first):
            if len(row) > self.longest:
                raise ValueError(
                    f"sentence {index} has more than {self.longest - 1} byte pairs, "
                    "which is the longest that this model was made for"
                )
        with_words = [row if len(row) > 1 else [] for row in ids]
        return pad(with_words, rows, self.longest)

    def outputs(self, answers: np.ndarray) -> list[str]:
        """Return answers as texts."""
        return self.vocabulary.decode_batch(answers.tolist())

    def count(self, answers: np.ndarray) -> int:
        """Return how many tokens were made, `EOS` counted."""
        return int((answers != PAD).sum())


Client = Classifier | Translation


def build(facts: Facts) -> Client:
    """Make the client that facts describe."""
    return (Translation if facts["model"] == "translator" else Classifier)(facts)


# On disk ----------------------------------------------------------------------------


def save(
    folder: pathlib.Path,
    client: Client,
    dense: Variables,
    compressed: Variables | None,
    samples: Sequence[Any],
) -> None:
    """Write the facts, dense and compressed variables, and inputs to try it with."""
    checkpoints.save(folder / "dense", dense._asdict())
    if compressed is not None:
        checkpoints.save(folder / "compressed", compressed._asdict())
    facts = {**client.facts, "samples": [np.asarray(x).tolist() for x in samples]}
    (folder / "client.json").write_text(json.dumps(facts) + "\n")


def load(folder: pathlib.Path) -> tuple[Client, list[Any]]:
    """Return the client of a folder and the inputs to try it with."""
    path = folder / "client.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no client.json: give the folder of a model that "
            "`python examples/compress.py` saved, for example "
            "runs/compress/vit-linen-srste-seed0/model"
        )
    facts = json.loads(path.read_text())
    samples = facts.pop("samples")
    return build(facts), samples


def load_variables(folder: pathlib.Path, client: Client) -> Variables:
    """Read variables of the client, from its folder ``dense`` or ``compressed``."""
    like = Variables(*jax.eval_shape(client.network.init, jax.random.key(0)))
    return Variables(**checkpoints.load(folder, like._asdict()))
