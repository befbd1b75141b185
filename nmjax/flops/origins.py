"""Origins: which leaf of the params a traced value still stands for.

A value is made of constants, of data (what depends on the args of the traced
function), or of params. One made of params stands for a leaf as long as it holds that
leaf's entries, moved or changed one by one; `combine` and the others say when.
"""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where the entries of a value come from.

    Attributes:
      data: whether they depend on the args.
      gate: whether they are bools of data, or bools turned into numbers.
      entries: number of distinct entries made from params; 0 for constants and data.
      parts: leaves that the value stands for, each with its number of entries;
        several where leaves were concatenated, none where no leaf can be named.
    """

    data: bool = False
    gate: bool = False
    entries: int = 0
    parts: tuple[tuple[str, int], ...] = ()


CONSTANT = Origin()
DATA = Origin(data=True)
GATE = Origin(data=True, gate=True)


def of_leaf(path: str, size: int) -> Origin:
    """Give the origin of a leaf itself."""
    return Origin(entries=size, parts=((path, size),)) if size else CONSTANT


def move(origin: Origin, size: int, *, cuts: bool = False) -> Origin:
    """Follow entries to another place.

    Args:
      origin: origin of the operand.
      size: size of the result.
      cuts: whether entries are left out, so that concatenated leaves come apart.

    Returns:
      The origin of the result.
    """
    parts = () if cuts and len(origin.parts) > 1 else origin.parts
    return dataclasses.replace(origin, parts=parts, entries=min(origin.entries, size))


def join_along(origins: Sequence[Origin], sizes: Sequence[int]) -> Origin:
    """Follow operands that are concatenated.

    Args:
      origins: origins of the operands.
      sizes: their sizes.

    Returns:
      The origin of the result; its parts add up by leaf.
    """
    if any(origin.data for origin in origins):
        return GATE if not _has_data(origins) else DATA
    entries = sum(origin.entries for origin in origins)
    parts: dict[str, int] = {}
    for origin, size in zip(origins, sizes, strict=True):
        if not origin.parts and (origin.entries or entries):
            return Origin(entries=entries)
        total = sum(count for _, count in origin.parts)
        for path, count in origin.parts:
            parts[path] = parts.get(path, 0) + size * count // total
    return Origin(entries=entries, parts=tuple(parts.items()))


def combine(origins: Sequence[Origin], sizes: Sequence[int]) -> Origin:
    """Follow operands of elementwise arithmetic.

    Data makes data, unless it is a mask (bools) of no more entries than the weights.
    Of several params the one with the most distinct entries is followed: a kernel
    times a gain per channel is the kernel. Two leaves of one size are neither.

    Args:
      origins: origins of the operands.
      sizes: their sizes.

    Returns:
      The origin of the result.
    """
    if _has_data(origins):
        return DATA
    gated = any(origin.gate for origin in origins)
    widest = max((origin.entries for origin in origins), default=0)
    if not widest:
        return GATE if gated else CONSTANT
    if any(
        size > widest and not origin.entries
        for origin, size in zip(origins, sizes, strict=True)
    ):
        return DATA if gated else Origin(entries=widest)
    winners = {origin.parts for origin in origins if origin.entries == widest}
    return Origin(entries=widest, parts=winners.pop() if len(winners) == 1 else ())


def mix(origins: Sequence[Origin], size: int) -> Origin:
    """Lose the leaf: sums, sorts, products and whatever else mixes entries.

    Args:
      origins: origins of the operands.
      size: size of the result.

    Returns:
      The origin of the result.
    """
    if any(origin.data for origin in origins):
        return DATA if _has_data(origins) else GATE
    return Origin(entries=size) if any(o.entries for o in origins) else CONSTANT


def either(a: Origin, b: Origin) -> Origin:
    """Give what is true of both: of two branches, or of a carry and its start."""
    if a == b or b == CONSTANT:
        return a
    if a == CONSTANT:
        return b
    if a.data or b.data:
        return GATE if a.gate and b.gate else DATA
    return Origin(
        entries=max(a.entries, b.entries), parts=a.parts if a.parts == b.parts else ()
    )


def _has_data(origins: Sequence[Origin]) -> bool:
    """Tell whether there is data that is no mask."""
    return any(origin.data and not origin.gate for origin in origins)
