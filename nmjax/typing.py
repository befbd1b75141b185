"""Names for the trees and arrays that the library passes around."""

from typing import TypeAlias

import jax
from jaxtyping import Bool, Float, Int, Num, PyTree

Params: TypeAlias = PyTree
"""Any pytree of arrays: linen variables, `nnx.State`, tuples, lists, boxed leaves."""

Masks: TypeAlias = PyTree
"""A tree with the structure of the params: bool arrays, True = kept, and
`optax.MaskedNode()` at every leaf that stays dense."""

FloatArray: TypeAlias = Float[jax.Array, "..."]
"""A floating point array of any rank."""

WeightArray: TypeAlias = Num[jax.Array, "..."]
"""Weights of any rank: floating, or integers of a quantized layer."""

MaskArray: TypeAlias = Bool[jax.Array, "..."]
"""A bool array of any rank, True = kept."""

Budget: TypeAlias = int | Int[jax.Array, ""]
"""A number of weights that one layer may keep; traced where it changes in training."""
