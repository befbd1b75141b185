"""The native CPU kernels beside a float64 oracle, and where they may be used."""

import dataclasses
import functools
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import nmjax as nm
from nmjax import formats
from nmjax.kernels import choosing, dispatch, native

built = pytest.mark.skipif(
    bool(native.load().problem) and shutil.which("c++") is None,
    reason="no C++ compiler: the native library is optional",
)


# The arrays are made by NumPy: JAX would compile every operation for every shape.


def normal(seed, shape, dtype=jnp.float32):
    values = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(values.astype(np.float32).astype(dtype))


def largest(sizes, count):
    """Mark the largest in each row."""
    order = np.argsort(-sizes, axis=-1, kind="stable")
    return np.argsort(order, axis=-1) < count


def grouped(n, m, shape, seed=0):
    weights = np.asarray(normal(seed, shape))
    groups = weights.reshape(-1, m, shape[1]).swapaxes(1, 2)
    mask = largest(groups, n).swapaxes(1, 2).reshape(shape)
    return formats.NMArray.from_dense(jnp.asarray(mask * weights), n, m)


def condensed(k, shape, seed=0, ablated=()):
    weights = np.asarray(normal(seed, shape))
    mask = largest(weights.T, k).T
    mask[:, list(ablated)] = False
    weights, mask = jnp.asarray(mask * weights), jnp.asarray(mask)
    return formats.FanInArray.from_dense(weights, mask=mask)


def in_windows(k, shape, seed=0, ablated=()):
    small = condensed(k, shape, seed, ablated)
    return formats.WindowArray.from_canonical(small)


def blocked(outputs, inputs, shape, seed=0):
    weights = np.asarray(normal(seed, shape))
    rows, columns = shape[0] // inputs, shape[1] // outputs
    tiles = abs(weights).reshape(rows, inputs, columns, outputs).sum((1, 3))
    kept = largest(tiles.ravel(), max(1, tiles.size // 5)).reshape(tiles.shape)
    mask = kept.repeat(inputs, 0).repeat(outputs, 1)
    weights, mask = jnp.asarray(mask * weights), jnp.asarray(mask)
    return formats.BlockArray.from_dense(weights, outputs, inputs, mask=mask)


def has(instructions):
    best = native.INSTRUCTIONS.index(native.load().instructions)
    return native.INSTRUCTIONS.index(instructions) >= best


# Values -----------------------------------------------------------------------------

PATTERNS = [(1, 2), (2, 4), (1, 4), (3, 4), (4, 8), (1, 8), (4, 16), (1, 16), (5, 20)]
SIZES = [(4, 1), (16, 1), (1, 16), (8, 3), (5, 2), (1, 1)]
BATCHES = (1, 2, 5, 13, 70)


@functools.cache
def every_array():
    """Make an array of every kind; each has lengths that leave remainders."""
    wide = condensed(9, (50, 12))
    return [
        condensed(7, (60, 24)),
        condensed(21, (300, 17), ablated=(0, 9)),
        dataclasses.replace(wide, indices=wide.indices.astype(jnp.uint32)),
        condensed(1, (20, 3)),
        condensed(3, (30, 250)),
        in_windows(9, (130, 37), ablated=(0, 36)),
        in_windows(64, (64, 16)),
        in_windows(2, (300, 3)),
        *(grouped(n, m, (m * 41, 5)) for n, m in PATTERNS),
        *(blocked(outputs, inputs, (48, 80)) for outputs, inputs in SIZES),
        blocked(4, 1, (700, 8)),
        blocked(8, 1, (400, 8)),
    ]


def inputs_for(arrays, dtype):
    return [
        [normal(batch, (batch, w.shape[0]), dtype) for batch in BATCHES] for w in arrays
    ]


@jax.jit
def dense_of(arrays):
    """Give dense weights, those of scaled values not rounded."""
    arrays = [getattr(w, "canonical", w) for w in arrays]
    return [
        w.todense()
        if w.scales is None
        else w.place(w.values.astype(jnp.float32) * w.scales.astype(jnp.float32))
        for w in arrays
    ]


def assert_products(found, dense, inputs, dtype):
    tolerance = 1e-5 if dtype == jnp.float32 else 8e-3
    for w, xs, outs in zip(dense, inputs, found, strict=True):
        for x, out in zip(xs, outs, strict=True):
            assert out.dtype == dtype and out.shape == (x.shape[0], w.shape[1])
            expected = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
            error = np.abs(np.asarray(out, np.float64) - expected).max()
            assert error <= tolerance * max(1, np.abs(expected).max()), (w, x.shape)


@built
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_every_kernel_equals_an_oracle(dtype, quantized):
    arrays = [w.astype(dtype) for w in every_array()]
    if quantized:
        arrays = [formats.quantize(w) for w in arrays]
    inputs = inputs_for(arrays, dtype)
    dense = dense_of(arrays)
    sets = [name for name in native.INSTRUCTIONS if has(name)]

    @jax.jit  # one function for all: compilation is what takes long
    def run(arrays, inputs):
        def each(**options):
            return [
                [native.multiply(x, w, **options) for x in xs]
                for w, xs in zip(arrays, inputs, strict=True)
            ]

        return [
            each(instructions=name, expand=expand)
            for name in sets
            for expand in (False, True)
        ]

    for found in run(arrays, inputs):
        assert_products(found, dense, inputs, dtype)


@built
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_bias_and_relu_follow_the_sums(dtype, activation):
    arrays = [
        condensed(7, (60, 24)),
        condensed(21, (300, 17), ablated=(0, 9)),
        in_windows(7, (80, 24), ablated=(5,)),
        grouped(2, 4, (164, 5)),
        grouped(3, 4, (164, 5)),
        *(blocked(*sides, (48, 80)) for sides in [(16, 1), (1, 16), (5, 2)]),
    ]
    arrays = [w.astype(dtype) for w in arrays]
    biases = [normal(9, (w.shape[1],), dtype) for w in arrays]
    inputs = [
        [x for x in xs if len(x) in (1, 5, 70)] for xs in inputs_for(arrays, dtype)
    ]
    sets = [name for name in native.INSTRUCTIONS if has(name)]

    @jax.jit
    def run(arrays, biases, inputs):
        def each(name, expand):
            options = {"instructions": name, "activation": activation}
            options |= {"expand": expand}
            return [
                [native.multiply(x, w, bias=bias, **options) for x in xs]
                for w, bias, xs in zip(arrays, biases, inputs, strict=True)
            ]

        return [each(name, expand) for name in sets for expand in (False, True)]

    dense = dense_of(arrays)
    for found in run(arrays, biases, inputs):
        for w, bias, xs, outs in zip(dense, biases, inputs, found, strict=True):
            for x, out in zip(xs, outs, strict=True):
                terms = (np.asarray(array, np.float64) for array in (x, w, bias))
                x, weights, offsets = terms
                expected = x @ weights + offsets
                if activation:
                    expected = np.maximum(expected, 0)
                error = np.abs(np.asarray(out, np.float64) - expected).max()
                tolerance = 1e-5 if dtype == jnp.float32 else 8e-3
                assert error <= tolerance * max(1, np.abs(expected).max()), (w, x.shape)


@built
def test_matmul_leaves_relu_to_the_kernel_and_others_to_xla():
    w, x, bias = condensed(3, (16, 8)), normal(0, (2, 16)), normal(1, (8,))
    sums = x @ w.todense() + bias
    for activation in ("relu", "silu"):
        product = functools.partial(
            nm.matmul, bias=bias, activation=activation, implementation="native"
        )
        text = jax.jit(product).lower(x, w).as_text()
        assert ("stablehlo.add" in text) == (activation == "silu")
        assert "stablehlo.maximum" not in text
        expected = getattr(jax.nn, activation)(sums)
        np.testing.assert_allclose(product(x, w), expected, rtol=1e-5, atol=1e-6)


@built
def test_an_activation_that_kernels_do_not_apply_is_refused():
    w, x = condensed(3, (16, 8)), normal(0, (2, 16))
    with pytest.raises(ValueError, match="activation='silu' is none of"):
        native.multiply(x, w, activation="silu")


@built
def test_a_stack_of_biases_is_mapped_over():
    layers = [condensed(3, (16, 8), seed) for seed in range(3)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    x, biases = normal(0, (3, 2, 16)), normal(1, (3, 8))

    def product(x, w, bias):
        return nm.matmul(x, w, bias=bias, activation="relu", implementation="native")

    found = jax.vmap(product)(x, stack, biases)
    for i, w in enumerate(layers):
        expected = jax.nn.relu(x[i] @ w.todense() + biases[i])
        np.testing.assert_allclose(found[i], expected, rtol=1e-5, atol=1e-5)


@built
def test_there_is_a_library_where_there_is_a_compiler():
    library = native.load()
    assert library.problem == "" and library.instructions in native.INSTRUCTIONS
    backend = nm.backends()["cpu"]
    assert backend.implementation == "native"
    assert library.instructions in backend.reason


@built
def test_no_rows_and_nan_are_multiplied_as_they_are():
    w = condensed(3, (16, 8))
    for expand in (False, True):
        assert native.multiply(jnp.zeros((0, 16)), w, expand=expand).shape == (0, 8)
    many = normal(1, (2 * 512 + 5, 16))  # rows in three parts
    close(native.multiply(many, w, expand=True), many @ w.todense())
    x = jnp.zeros((1, 16)).at[0, int(w.indices[2, 0])].set(jnp.nan)
    reached = (np.asarray(w.indices) == int(w.indices[2, 0])).any(1)
    for activation in native.ACTIVATIONS:
        found = np.asarray(native.multiply(x, w, activation=activation))[0]
        np.testing.assert_array_equal(np.isnan(found), reached)


@built
def test_results_do_not_depend_on_the_number_of_threads():
    script = """
import jax.numpy as jnp, numpy as np
from nmjax import formats
from nmjax.kernels import native
rng = np.random.default_rng(0)
keep = np.argsort(rng.random((256, 512)), 0) < 40
w = formats.FanInArray.from_dense(jnp.asarray(keep * rng.normal(size=keep.shape), "f4"))
for rows in (1, 9, 65, 100):
    x = jnp.asarray(rng.normal(size=(rows, 256)), jnp.float32)
    both = w, formats.WindowArray.from_canonical(w)
    for form, expand in ((form, expand) for form in both for expand in (False, True)):
        print(np.asarray(native.multiply(x, form, expand=expand)).tobytes().hex())
"""
    # Each process may use other cores, and so has another number of threads.
    outputs = set()
    for pinned in (["taskset", "-c", "0"], []):
        if pinned and shutil.which("taskset") is None:
            pytest.skip("taskset is not there to take cores away")
        run = subprocess.run(
            [*pinned, sys.executable, "-c", script],
            capture_output=True,
            text=True,
            check=True,
        )
        outputs.add(run.stdout)
    assert len(outputs) == 1


# Transformations ---------------------------------------------------------------------

KINDS = {"fan_in": lambda seed=0: condensed(4, (16, 12), seed=seed, ablated=(3,))}
KINDS["nm"] = lambda seed=0: grouped(2, 4, (16, 12), seed=seed)
KINDS["window"] = lambda seed=0: in_windows(4, (80, 12), seed=seed, ablated=(3,))
KINDS["block"] = lambda seed=0: blocked(4, 2, (16, 12), seed=seed)


def stacked(layers):
    """Stack layers; windows are laid out for all of them at once."""
    if not isinstance(layers[0], formats.WindowArray):
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    return formats.WindowArray.from_canonical(stacked([w.canonical for w in layers]))


def product(x, w):
    return nm.matmul(x, w, implementation="native")


def calls(function, *arguments):
    """Count the native calls in a compiled function."""
    text = jax.jit(function).lower(*arguments).compile().as_text()
    assert text is not None
    return text.count('custom_call_target="nmjax_')


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@built
@pytest.mark.parametrize("kind", KINDS)
def test_it_works_in_jit_grad_cond_scan_and_vmap(kind):
    w = KINDS[kind]()
    x = normal(1, (3, w.shape[-2]))
    dense = w.todense()
    assert calls(product, x, w) == 1
    close(product(x, w), x @ dense)

    def loss(multiply, x, w):
        return jnp.sum(jnp.sin(multiply(x, w)))

    close(jax.grad(loss, 1)(product, x, w), jax.grad(loss, 1)(jnp.matmul, x, dense))
    branch = lax.cond(x[0, 0] > 0, product, lambda x, w: -product(x, w), x, w)
    close(jnp.abs(branch), jnp.abs(x @ dense))
    stack = stacked([KINDS[kind](seed) for seed in range(3)])
    _, scanned = lax.scan(lambda _, w: (None, product(x, w)), None, stack)
    close(scanned, x @ stack.todense())
    close(jax.vmap(product, (None, 0))(x, stack), x @ stack.todense())
    close(
        jax.vmap(product, (0, None))(jnp.stack([x, 2 * x]), w),
        [x @ dense] * 1 + [2 * x @ dense],
    )
    nested = jax.vmap(jax.vmap(product, (None, 0)), (0, None))(
        jnp.stack([x, -x]), stack
    )
    close(nested, jnp.stack([x @ stack.todense(), -x @ stack.todense()]))


@built
@pytest.mark.parametrize("kind", KINDS)
def test_it_works_under_shard_map_and_gives_way_to_the_partitioner(kind):
    w = KINDS[kind]()
    x = normal(1, (8, w.shape[-2]))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = jax.NamedSharding(mesh, P("data"))
    mapped = jax.shard_map(
        product, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data")
    )
    assert calls(mapped, jax.device_put(x, rows), w) == 1
    close(jax.jit(mapped)(x, w), x @ w.todense())
    sharded = jax.device_put(x, rows)
    spread = jax.device_put(w, jax.NamedSharding(mesh, P()))
    assert calls(nm.matmul, sharded, spread) == 0
    close(jax.jit(nm.matmul)(sharded, spread), x @ w.todense())
    with pytest.raises(NotImplementedError, match="over 8 devices; call it under"):
        jax.jit(product)(sharded, spread)


@built
def test_windows_pass_on_what_is_not_finite_as_documented():
    w = in_windows(5, (80, 12))
    dense = np.asarray(w.todense())
    # No window of these weights starts at input 43: its zeros have no part in it.
    x = jnp.ones((1, 80)).at[0, 43].set(jnp.inf)
    found = np.asarray(native.multiply(x, w))[0]
    needed = dense[43] != 0
    assert needed.any() and np.isinf(found[needed]).all()
    close(found[~needed], dense.sum(0)[~needed])
    # At the first input of a window they have, as all zeros of dense weights do.
    first = int(w.starts[-1])
    found = np.asarray(native.multiply(jnp.ones((1, 80)).at[0, first].set(jnp.inf), w))
    assert np.isnan(found[0, dense[first] == 0]).any()


@built
def test_many_devices_at_once_do_not_wait_for_each_other():
    # So many weights that every device divides its work among threads.
    w, x = condensed(100, (512, 1024)), normal(1, (64, 512))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    step = jax.jit(
        jax.shard_map(
            product, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data")
        )
    )
    expected = np.asarray(x) @ np.asarray(w.todense())
    for _ in range(50):
        np.testing.assert_allclose(step(x, w), expected, rtol=1e-4, atol=1e-4)


def test_exported_programs_do_not_need_the_library():
    w, x = KINDS["fan_in"](), normal(1, (1, 16))
    exported = export.export(jax.jit(nm.matmul), platforms=["cpu", "cuda"])(x, w)
    assert "nmjax_fan_in" not in exported.mlir_module()
    close(export.deserialize(exported.serialize()).call(x, w), x @ w.todense())


@built
def test_a_named_native_kernel_that_cannot_serve_says_why():
    w, x = KINDS["fan_in"](), normal(1, (1, 16))
    with pytest.raises(
        NotImplementedError, match="exported program has to run without"
    ):
        export.export(jax.jit(product))(x, w)
    with pytest.raises(NotImplementedError, match="serves CPUs only"):
        jax.jit(product).trace(x, w).lower(lowering_platforms=("cuda",))
    with pytest.raises(NotImplementedError, match="w is a dense array"):
        product(x, w.todense())
    with pytest.raises(NotImplementedError, match="inputs, not float16"):
        product(x.astype(jnp.float16), w.astype(jnp.float16))
    with pytest.raises(NotImplementedError, match="not float8_e4m3fn"):
        product(x, formats.quantize(w, jnp.float8_e4m3fn))
    with pytest.raises(NotImplementedError, match="neurons in the columns"):
        product(normal(1, (1, 12)), w.transposed)
    window = KINDS["window"]()
    with pytest.raises(NotImplementedError, match="columns of a WindowArray"):
        product(normal(1, (1, 12)), window.transposed)
    with pytest.raises(NotImplementedError, match="groups along the inputs"):
        product(x, formats.NMArray.from_dense(jnp.zeros((16, 4)), 2, 4, -1))
    with pytest.raises(ValueError, match="implementation='fast' is not None"):
        nm.matmul(x, w, implementation="fast")


# Choosing ---------------------------------------------------------------------------


def test_the_table_is_whole():
    found = choosing.table()
    assert {key[0] for key in found} == {"FanIn", "Window", "NM", "Block"}
    for ratios in found.values():
        assert set(ratios) <= set(choosing.FORMS) and "decompress" in ratios
        assert all(ratio > 0 for ratio in ratios.values())


@built
def test_the_fastest_measured_form_that_serves_is_chosen(monkeypatch):
    rows = {
        ("FanIn", "", "float32", 0.1, 1): {
            "direct": 0.2,
            "slots": 0.8,
            "decompress": 3.0,
        },
        ("FanIn", "", "float32", 0.1, 64): {
            "direct": 0.5,
            "slots": 0.4,
            "decompress": 2.0,
        },
        ("FanIn", "", "float32", 0.5, 64): {"direct": 2.0, "expand": 1.2, "slots": 3.0},
        ("NM", "2:4", "float32", 0.5, 1): {
            "direct": 0.6,
            "expand": 2.0,
            "decompress": 4.0,
        },
        ("Block", "16x1", "float32", 0.1, 1): {"blocks": 0.1, "decompress": 2.0},
        ("Block", "32x32", "float32", 0.1, 1): {"blocks": 1.4, "decompress": 1.3},
    }
    monkeypatch.setattr(choosing, "table", lambda: rows)
    w = condensed(2, (20, 8))
    one, many = jnp.ones((1, 20)), jnp.ones((100, 20))
    assert choosing.choose(one, w) == "direct"
    assert choosing.choose(one, w, choosing.XLA) == "slots"
    assert choosing.choose(many, w) == "slots"
    assert choosing.relative_time(many, w) == 0.4
    assert choosing.choose(many, condensed(10, (20, 8))) == "expand"
    found = choosing.choose(many, condensed(10, (20, 8)), choosing.XLA)
    assert found == "slots"
    half = condensed(2, (20, 8)).astype(jnp.float16)
    assert choosing.choose(one.astype(jnp.float16), half) == "slots"
    assert choosing.choose(one, grouped(2, 4, (20, 8))) == "direct"
    # Another pattern is like the one that is about as dense, another format is not.
    assert choosing.layout_of(grouped(2, 5, (20, 8))) == ("NM", "2:4")
    assert choosing.choose(one, grouped(2, 5, (20, 8))) == "expand"
    lines = formats.BlockArray.from_dense(jnp.eye(20, 8), 8, 1)
    squares = formats.BlockArray.from_dense(jnp.ones((32, 32)), 16, 16)
    assert choosing.choose(one, lines) == "blocks"
    assert choosing.choose(jnp.ones((1, 32)), squares) == "decompress"


def test_a_missing_library_leaves_the_forms_in_xla(monkeypatch):
    missing = native.Library("", "the native library was not built: for a test")
    monkeypatch.setattr(native, "load", lambda: missing)
    jax.clear_caches()
    w, x = condensed(2, (24, 8)), jnp.ones((1, 24))
    close(nm.matmul(x, w), x @ w.todense())
    assert nm.backends()["cpu"] == ("xla", missing.problem)
    with pytest.raises(NotImplementedError, match="was not built: for a test"):
        product(x, w)
    jax.clear_caches()


def test_dispatch_uses_the_native_kernel_where_the_table_says_so(monkeypatch):
    w, x = KINDS["nm"](), normal(1, (1, 16))
    for ratio, count in ((0.5, 1), (5.0, 0)):
        rows = {("NM", "2:4", "float32", 0.5, 1): {"direct": ratio, "decompress": 1.0}}
        monkeypatch.setattr(choosing, "table", lambda rows=rows: rows)
        jax.clear_caches()
        expected = 0 if native.load().problem else count
        assert calls(lambda x, w: dispatch.compressed_matmul(x, w), x, w) == expected
    jax.clear_caches()
