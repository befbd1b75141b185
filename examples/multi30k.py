"""The data of the translation example: sentence pairs, byte pairs, batches."""

import functools
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import tokenizers

PAD, BOS, EOS, UNK = range(4)
GRID = 8  # lengths are padded to multiples of this: few shapes, few compilations


class Pairs(NamedTuple):
    """Sentences and their translations, as text and as numbered byte pairs."""

    source: list[str]
    target: list[str]
    source_ids: list[list[int]]
    target_ids: list[list[int]]


class Task(NamedTuple):
    """A translation task; both languages share the vocabulary."""

    vocabulary: tokenizers.Tokenizer
    train: Pairs
    val: Pairs
    test: Pairs


def read_task(
    data_dir: pathlib.Path | None, size: int, longest: int, most: int | None = None
) -> Task:
    """Read the sentences of all splits and turn them into byte pairs.

    Args:
      data_dir: Folder with ``multi30k/`` or its files, or None for made-up dates.
      size: Entries of the vocabulary, which is learned from the training pairs.
      longest: Most byte pairs of a sentence; longer ones are cut.
      most: Most sentences of a split, or None for all.

    Returns:
      The `Task`.

    Raises:
      FileNotFoundError: If a file is missing.
      ValueError: If the two sides of a split differ in length.
    """
    texts = []
    for name, count in (("train", 4000), ("val", 200), ("test_2016_flickr", 200)):
        pair = made_up_dates(name, count) if data_dir is None else read(data_dir, name)
        texts.append([side[:most] for side in pair])
    vocabulary = learn_vocabulary([line for side in texts[0] for line in side], size)
    splits = [
        Pairs(*text, *(encode(vocabulary, side, longest) for side in text))
        for text in texts
    ]
    return Task(vocabulary, *splits)


def read(data_dir: pathlib.Path, name: str) -> tuple[list[str], list[str]]:
    """Return the German and the English lines of one split."""
    root = data_dir / "multi30k"
    root = root if root.exists() else data_dir
    sides = []
    for language in ("de", "en"):
        path = root / f"{name}.{language}"
        if not path.exists():
            raise FileNotFoundError(f"--data-dir {data_dir}: {path} is missing")
        sides.append(path.read_text(encoding="utf-8").splitlines())
    if len(sides[0]) != len(sides[1]):
        raise ValueError(
            f"{root / name} has {len(sides[0])} German, {len(sides[1])} English lines"
        )
    return sides[0], sides[1]


def made_up_dates(name: str, count: int) -> tuple[list[str], list[str]]:
    """Return ``vom 3. März 1997 bis 12. Juli 2004``-like pairs, the same every time."""
    german = (
        "Januar Februar März April Mai Juni Juli August September Oktober November "
        "Dezember"
    ).split()
    english = (
        "January February March April May June July August September October November "
        "December"
    ).split()
    rng = np.random.default_rng(list(name.encode()))
    source, target = [], []
    for _ in range(count):
        (d1, d2), (m1, m2) = rng.integers(1, 29, 2), rng.integers(12, size=2)
        y1, y2 = sorted(rng.integers(1900, 2100, 2))
        source.append(f"vom {d1}. {german[m1]} {y1} bis {d2}. {german[m2]} {y2}")
        target.append(f"from {d1} {english[m1]} {y1} to {d2} {english[m2]} {y2}")
    return source, target


def learn_vocabulary(lines: Sequence[str], size: int) -> tokenizers.Tokenizer:
    """Learn a byte-pair vocabulary; a space belongs to the word after it."""
    vocabulary = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="[UNK]"))
    splits = tokenizers.pre_tokenizers
    vocabulary.pre_tokenizer = splits.Sequence(
        [splits.Metaspace(), splits.Punctuation()]
    )
    vocabulary.decoder = tokenizers.decoders.Metaspace()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["[PAD]", "[BOS]", "[EOS]", "[UNK]"],  # PAD, BOS, EOS, UNK
        show_progress=False,
    )
    vocabulary.train_from_iterator(lines, trainer)
    return vocabulary


def encode(
    vocabulary: tokenizers.Tokenizer, sentences: Sequence[str], longest: int
) -> list[list[int]]:
    """Return the byte pairs of every sentence, cut to ``longest - 1``, and `EOS`."""
    encoded = vocabulary.encode_batch(list(sentences))
    return [one.ids[: longest - 1] + [EOS] for one in encoded]


def pad(rows: Sequence[Sequence[int]], count: int, length: int) -> np.ndarray:
    """Return rows of tokens as int32 ``(count, length)``, `PAD` right and below."""
    padded = np.full((count, length), PAD, np.int32)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return padded


class Batches:
    """Batches of about equally many tokens, made of pairs of about equal length.

    Every epoch shuffles the pairs, puts them into buckets by the length of the longer
    side and cuts each bucket into batches; the batch of a step depends on nothing but
    the seed and the step. The last batch of a bucket is filled up with empty rows.

    Attributes:
      per_epoch: Number of batches in an epoch.
    """

    def __init__(self, pairs: Pairs, tokens: int, seed: int):
        """Sort the pairs into buckets; ``tokens`` is what a side of a batch holds."""
        self._source, self._target, self._seed = *pairs[2:], seed
        both = zip(self._source, self._target, strict=True)
        longer = np.array([max(len(s), len(t)) for s, t in both])
        self._lengths = -(-longer // GRID) * GRID
        self._rows = {n: max(1, tokens // n) for n in set(self._lengths.tolist())}
        self._order = functools.lru_cache(maxsize=2)(self._order_of_epoch)
        self.per_epoch = len(self._order(0))

    def _order_of_epoch(self, epoch: int) -> list[tuple[int, np.ndarray]]:
        rng = np.random.default_rng([self._seed, epoch])
        shuffled = rng.permutation(len(self._lengths))
        batches = []
        for length, rows in sorted(self._rows.items()):
            members = shuffled[self._lengths[shuffled] == length]
            cuts = range(0, len(members), rows)
            batches += [(length, members[i : i + rows]) for i in cuts]
        return [batches[i] for i in rng.permutation(len(batches))]

    def __call__(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Return source and target of a step, int32 ``(rows, length)`` each."""
        epoch, place = divmod(step, self.per_epoch)
        length, members = self._order(epoch)[place]
        rows = self._rows[length]
        return (
            pad([self._source[i] for i in members], rows, length),
            pad([self._target[i] for i in members], rows, length),
        )
