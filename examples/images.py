"""The data of the image example: CIFAR-10 in its official formats, and digits."""

import pathlib
import pickle
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Data(NamedTuple):
    """A data set in memory: images are uint8 ``(n, height, width, channels)``."""

    name: str
    images: np.ndarray
    labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    pad: int  # random crops move by up to this many pixels
    flip: bool


class _ArrayUnpickler(pickle.Unpickler):
    """Loads arrays and plain values and nothing else: data should not run code."""

    allowed = frozenset(
        {
            ("numpy.core.multiarray", "_reconstruct"),  # written by NumPy 1
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),  # bytes, written by Python 3 in an old protocol
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(
                f"{module}.{name} does not belong in a file of images and labels"
            )
        return super().find_class(module, name)


def read_binary(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """Read images ``(n, 3, 32, 32)`` and labels of a file of the binary version."""
    records = np.fromfile(path, np.uint8)
    if records.size == 0 or records.size % 3073:
        raise ValueError(
            f"{path} has {records.size} bytes, which is not a multiple of 3073 (one "
            "label and 32 x 32 x 3 pixels): the file is incomplete, fetch it again"
        )
    records = records.reshape(-1, 3073)
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0].astype(np.int32)


def read_pickle(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """Read images ``(n, 3, 32, 32)`` and labels of a file of the Python version."""
    with path.open("rb") as file:
        batch = _ArrayUnpickler(file, encoding="bytes").load()
    return batch[b"data"].reshape(-1, 3, 32, 32), np.asarray(batch[b"labels"], np.int32)


def load_cifar10(data_dir: pathlib.Path) -> Data:
    """Read CIFAR-10, from whichever official version is there.

    Args:
      data_dir: The folder of the batches, or the folder that contains it.

    Returns:
      The 50,000 training and the 10,000 test images.

    Raises:
      FileNotFoundError: If no version is found.
    """
    for ending, read, usual in (
        (".bin", read_binary, "cifar-10-batches-bin"),
        ("", read_pickle, "cifar-10-batches-py"),
    ):
        for folder in (data_dir, data_dir / usual):
            files = [folder / f"data_batch_{i}{ending}" for i in range(1, 6)]
            files.append(folder / f"test_batch{ending}")
            if all(file.is_file() for file in files):
                images, labels = zip(*map(read, files), strict=True)
                images = [x.transpose(0, 2, 3, 1) for x in images]
                return Data(
                    "cifar10",
                    np.concatenate(images[:5]),
                    np.concatenate(labels[:5]),
                    np.ascontiguousarray(images[5]),
                    labels[5],
                    pad=4,
                    flip=True,
                )
    raise FileNotFoundError(
        f"{data_dir} has neither data_batch_1.bin ... test_batch.bin nor data_batch_1 "
        "... test_batch, all six, and no folder cifar-10-batches-bin or "
        "cifar-10-batches-py with them: give the unpacked folder of "
        "https://www.cs.toronto.edu/~kriz/cifar.html"
    )


def load_digits() -> Data:
    """Return scikit-learn's 1797 digits, 8x8 grey: 1257 to train on and 540 to test."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = images.astype(np.uint8).reshape(-1, 8, 8, 1)
    labels = labels.astype(np.int32)
    order = np.random.default_rng(0).permutation(
        len(labels)
    )  # same split for all seeds
    test, train = order[:540], order[540:]
    return Data(
        "digits", images[train], labels[train], images[test], labels[test], 1, False
    )


def pool(data: Data, side: int) -> Data:
    """Average the pixels of squares.

    Args:
      data: The data.
      side: Length of the squares; 2 makes 16x16 images of 32x32.

    Returns:
      The data with smaller images, uint8, rounded to the nearest.

    Raises:
      ValueError: If squares of this side do not tile the images.
    """

    def smaller(images: np.ndarray) -> np.ndarray:
        count, height, width, channels = images.shape
        if side < 1 or height % side or width % side:
            raise ValueError(
                f"squares of {side} pixels do not tile images of {height}x{width}"
            )
        shape = (count, height // side, side, width // side, side, channels)
        mean = images.reshape(shape).mean((2, 4), dtype=np.float32)
        return np.round(mean).astype(np.uint8)

    if side == 1:
        return data
    return data._replace(
        images=smaller(data.images), test_images=smaller(data.test_images)
    )


def augment(images: jax.Array, key: jax.Array, pad: int, flip: bool) -> jax.Array:
    """Move every image by up to ``pad`` pixels, zeros coming in, and flip half of them.

    Args:
      images: ``(batch, height, width, channels)``, any dtype.
      key: PRNG key.
      pad: Largest shift.
      flip: Whether to mirror left and right at random.

    Returns:
      Same shape and dtype.
    """
    batch, height, width, channels = images.shape
    key_crop, key_flip = jax.random.split(key)
    offsets = jax.random.randint(key_crop, (batch, 2), 0, 2 * pad + 1)
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    images = jax.vmap(
        lambda image, at: jax.lax.dynamic_slice(
            image, (at[0], at[1], 0), (height, width, channels)
        )
    )(padded, offsets)
    if not flip:
        return images
    mirror = jax.random.bernoulli(key_flip, shape=(batch, 1, 1, 1))
    return jnp.where(mirror, images[:, :, ::-1], images)
