"""Contractions and convolutions with compressed arrays, beside those of JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import nmjax as nm
from nmjax import formats


def normal(seed, shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def grouped(seed, shape, axis=-2):
    weights = normal(seed, shape)
    kept = jnp.where(nm.nm_mask(weights, 2, 4, axis), weights, 0)
    return formats.NMArray.from_dense(kept, 2, 4, axis)


def condensed(seed, shape, neuron_axes=(-1,)):
    weights = normal(seed, shape)
    kept = jnp.where(nm.fan_in_mask(weights, 2, neuron_axes), weights, 0)
    return formats.FanInArray.from_dense(kept, neuron_axes)


def blocked(seed, shape):
    weights = normal(seed, shape)
    kept = weights.at[..., :2, :].set(0.0)
    return formats.BlockArray.from_dense(kept, 2, 1)


def products(function, *arguments):
    """Count the compressed products that a function makes."""
    return str(jax.make_jaxpr(function)(*arguments)).count("nmjax_matmul")


CASES = [
    # lhs shape, weights, contracted axes of lhs and rhs, as one matrix
    ((3, 8), grouped(0, (8, 6)), (1,), (0,), True),
    ((8, 3), grouped(0, (8, 6)), (0,), (0,), True),
    ((2, 5, 8), condensed(1, (8, 2, 3), (-2, -1)), (2,), (0,), True),
    ((2, 5, 8), grouped(1, (8, 2, 3), -3), (-1,), (-3,), True),
    ((5, 2, 4), grouped(2, (2, 4, 6)), (1, 2), (0, 1), True),
    ((5, 4, 2), grouped(2, (2, 4, 6)), (2, 1), (0, 1), True),
    ((5, 4, 2), condensed(2, (2, 4, 6)), (1, 2), (1, 0), True),
    ((5, 2, 4), blocked(3, (2, 4, 6)), (1, 2), (0, 1), True),
    ((5, 8), grouped(4, (6, 8), -1), (1,), (1,), True),
    ((5, 8), condensed(4, (6, 8), (0,)), (1,), (1,), True),
    ((5, 8), grouped(4, (6, 8), -1), (1,), (1,), True),
    ((8,), grouped(0, (8, 6)), (0,), (0,), True),
    ((5, 6), grouped(0, (8, 6)), (1,), (1,), False),
    ((5, 6), blocked(0, (8, 6)), (1,), (1,), False),
    ((5, 2), grouped(2, (2, 4, 6)), (1,), (0,), False),
]


@pytest.mark.parametrize(("shape", "w", "left", "right", "one_matrix"), CASES)
def test_dot_general_equals_that_of_jax(shape, w, left, right, one_matrix):
    x = normal(9, shape)
    left = tuple(axis % x.ndim for axis in left)
    positive = ((left, tuple(axis % w.ndim for axis in right)), ((), ()))
    expected = lax.dot_general(x, w.todense(), positive)
    found = nm.dot_general(x, w, ((left, right), ((), ())))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    count = products(lambda x, w: nm.dot_general(x, w, positive), x, w)
    assert count == one_matrix


def test_dot_general_keeps_batches_precision_and_wider_results():
    x, w = normal(0, (5, 8)), grouped(1, (8, 6))
    numbers = (((1,), (0,)), ((), ()))
    for options in (
        {"precision": lax.Precision.HIGHEST},
        {"preferred_element_type": jnp.float16},
    ):
        found = nm.dot_general(x, w, numbers, **options)
        expected = lax.dot_general(x, w.todense(), numbers, **options)
        assert found.dtype == expected.dtype
        np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-2)
    stack = jax.tree.map(lambda *parts: jnp.stack(parts), w, grouped(2, (8, 6)))
    batched = (((2,), (1,)), ((0,), (0,)))
    x = normal(3, (2, 5, 8))
    np.testing.assert_allclose(
        nm.dot_general(x, stack, batched),
        lax.dot_general(x, stack.todense(), batched),
        rtol=1e-5,
        atol=1e-5,
    )


def test_dot_general_names_shapes_that_do_not_fit():
    with pytest.raises(TypeError, match=r"lhs of shape \(5, 4\) cannot be contracted"):
        nm.dot_general(normal(0, (5, 4)), grouped(1, (8, 6)), (((1,), (0,)), ((), ())))


def test_dense_arrays_pass_through():
    x, w = normal(0, (5, 8)), normal(1, (8, 6))
    numbers = (((1,), (0,)), ((), ()))
    np.testing.assert_array_equal(nm.dot_general(x, w, numbers), x @ w)
    image, kernel = normal(2, (2, 5, 5, 8)), normal(3, (3, 3, 8, 6))
    arguments = ((1, 1), "SAME", None, None, ("NHWC", "HWIO", "NHWC"))
    np.testing.assert_array_equal(
        nm.conv_general_dilated(image, kernel, *arguments),
        lax.conv_general_dilated(image, kernel, *arguments),
    )


LAYOUTS = [("NHWC", "HWIO", "NHWC"), ("NCHW", "HWIO", "NHWC"), ("NHWC", "HWIO", "NCHW")]


@pytest.mark.parametrize("make", [grouped, condensed, blocked])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("window", "strides", "padding", "pointwise"),
    [
        ((1, 1), (1, 1), "SAME", True),
        ((1, 1), (2, 3), "VALID", True),
        ((1, 1), (1, 2), [(0, 0), (0, 0)], True),
        ((1, 1), (1, 1), [(1, 0), (0, 0)], False),
        ((3, 2), (2, 1), "SAME", False),
    ],
)
def test_convolutions_equal_those_of_jax(
    make, layout, window, strides, padding, pointwise
):
    w = make(0, (*window, 8, 6))
    x = normal(1, (2, 7, 5, 8))
    if layout[0] == "NCHW":
        x = x.transpose(0, 3, 1, 2)

    def conv(x, w, function):
        return function(x, w, strides, padding, dimension_numbers=layout)

    expected = conv(x, w.todense(), lax.conv_general_dilated)
    found = conv(x, w, nm.conv_general_dilated)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    count = products(lambda x, w: conv(x, w, nm.conv_general_dilated), x, w)
    assert count == pointwise


def test_grouped_convolutions_are_decompressed():
    w, x = grouped(0, (1, 1, 4, 6)), normal(1, (2, 3, 3, 8))
    options = {"dimension_numbers": LAYOUTS[0], "feature_group_count": 2}
    np.testing.assert_allclose(
        nm.conv_general_dilated(x, w, (1, 1), "SAME", **options),
        lax.conv_general_dilated(x, w.todense(), (1, 1), "SAME", **options),
        rtol=1e-5,
        atol=1e-5,
    )


def test_gradients_reach_inputs_and_values():
    w, x = grouped(0, (2, 4, 6)), normal(1, (3, 2, 4))
    numbers = (((1, 2), (0, 1)), ((), ()))

    def loss(product, x, w):
        return jnp.sum(jnp.sin(product(x, w, numbers)))

    dx, dw = jax.grad(lambda x, w: loss(nm.dot_general, x, w), (0, 1), allow_int=True)(
        x, w
    )
    ex, ew = jax.grad(lambda x, w: loss(lax.dot_general, x, w), (0, 1))(x, w.todense())
    np.testing.assert_allclose(dx, ex, rtol=1e-5, atol=1e-5)
    stored = w.place(jnp.ones_like(w.values))
    np.testing.assert_allclose(w.place(dw.values), ew * stored, rtol=1e-5, atol=1e-5)
