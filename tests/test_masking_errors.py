"""Every bad argument of a mask function against its error."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nmjax as nm

S = np.zeros((6, 8), np.float32)


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: nm.nm_mask(np.zeros((6, 2), np.float32), 2, 4, 0),
            r"axis 0 of shape \(6, 2\) has length 6, which is not a multiple of m=4",
        ),
        (lambda: nm.nm_mask(S, 5, 4), "n=5 of m=4 .* 1 <= n <= m"),
        (lambda: nm.nm_mask(S, 0, 4), "n=0 of m=4 .* 1 <= n <= m"),
        (lambda: nm.nm_mask(S, 2, 4, axis=2), r"axis=2 is out of range for shape"),
        (lambda: nm.nm_mask(S, 2, 4, axis=-3), r"axis=-3 .* of rank 2"),
        (lambda: nm.nm_mask(np.zeros(130, np.float32), 2, 65, 0), "m=65 is larger"),
        (lambda: nm.vnm_mask(S, 2, 5, 8, -1, 0), "n <= 4 <= m"),
        (lambda: nm.vnm_mask(S, 2, 2, 3, 0, 1), "n <= 4 <= m"),
        (lambda: nm.vnm_mask(S, 4, 2, 8, 1, 0), "axis 0 .* not a multiple of v=4"),
        (lambda: nm.vnm_mask(S, 2, 2, 8, 1, -1), "must differ"),
        (lambda: nm.vnm_mask(S, 2, 2, 8, 1, 5), "vector_axis=5 is out of range"),
        (lambda: nm.transposable_nm_mask(S, 2, 4), "axis 0 .* multiple of m=4"),
        (lambda: nm.transposable_nm_mask(S, 2, 4, (1, -1)), "twice"),
        (lambda: nm.topk_mask(S, 49), "k=49 is not between 0 and 48"),
        (lambda: nm.topk_mask(S, -1), "k=-1 is not between 0 and 48"),
        (lambda: nm.topk_mask(S, 7, axis=0), "k=7 is not between 0 and 6"),
        (lambda: nm.topk_mask(S, 1, axis=(0, -2)), "twice"),
        (lambda: nm.topk_mask(S, 1, axis=()), "names no axis"),
        (lambda: nm.topk_mask(S, 1, axis=2), "axis=2 is out of range"),
        (lambda: nm.global_topk_mask([S, S], 97), "k=97 is not between 0 and 96"),
        (lambda: nm.fan_in_mask(S, 7), "k=7 is not between 0 and 6"),
        (lambda: nm.fan_in_mask(S, 1, (0, 1)), "leaves no fan-in axis"),
        (lambda: nm.block_mask(S, 1, (4, 1)), "axis 0 .* not a multiple of block"),
        (lambda: nm.block_mask(S, 13, (2, 2)), "k=13 is not between 0 and 12"),
        (lambda: nm.block_mask(S, 1, (2,)), "1 lengths for 2 axes"),
        (lambda: nm.block_mask(S, 1, (0, 2)), "lengths of 1 or more"),
        (lambda: nm.block_mask(S, 1, (2, 1), batch_axes=0), "both in axes and in"),
        (lambda: nm.channel_mask(S, 9), "k=9 is not between 0 and 8"),
        (lambda: nm.channel_mask(S, 1, 0, (0,)), "axis 0 is also in batch_axes"),
    ],
)
def test_bad_values_raise_value_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("dtype", [np.int32, bool, np.complex64])
def test_scores_that_are_no_real_floats_raise_type_error(dtype):
    scores = np.zeros((4, 4), dtype)
    for call in (
        lambda: nm.nm_mask(scores, 2, 4),
        lambda: nm.vnm_mask(scores, 2, 2, 4),
        lambda: nm.transposable_nm_mask(scores, 2, 4),
        lambda: nm.topk_mask(scores, 2),
        lambda: nm.fan_in_mask(scores, 2),
        lambda: nm.block_mask(scores, 2, (2, 2)),
        lambda: nm.channel_mask(scores, 2),
    ):
        with pytest.raises(TypeError, match="real floating dtype"):
            call()
    with pytest.raises(TypeError, match=r"leaf \['a'\]: .* real floating dtype"):
        nm.global_topk_mask({"a": scores}, 2)


def test_counts_that_are_no_integers_raise_type_error(unchecked):
    with pytest.raises(TypeError, match="n must be an int"):
        nm.nm_mask(S, 2.0, 4)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="k must be an int"):
        nm.topk_mask(S, 2.5)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="k must be an integer, got the bool"):
        nm.topk_mask(S, True)
    with pytest.raises(TypeError, match="k must be an int"):
        jax.jit(nm.topk_mask)(S, jnp.float32(2))


def test_more_entries_than_counts_can_hold_are_refused():
    scores = jax.ShapeDtypeStruct((2**16, 2**15), jnp.float32)
    with pytest.raises(ValueError, match="32-bit"):
        jax.eval_shape(lambda s: nm.topk_mask(s, 1), scores)
    rows = jax.eval_shape(lambda s: nm.topk_mask(s, 1, axis=0), scores)
    assert rows.shape == scores.shape
