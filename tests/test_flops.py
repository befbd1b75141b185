"""Counts of multiply-accumulates by hand, and fractions as published."""

import functools
import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import nmjax as nm
from nmjax import flops
from nmjax.transforms.growing import DynamicTopology


def struct(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def count(model, *inputs):
    """Count a linen model's MACs; give those that are not 0, without ``params/``."""
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    found = flops.macs(model.apply, params, *inputs)
    leaves = {p.removeprefix("params/"): n for p, n in found.leaves.items() if n}
    return leaves, found.other


@pytest.mark.parametrize(
    ("model", "shape", "wanted"),
    [
        (nn.Dense(7), (3, 5), 3 * 5 * 7),
        (nn.Dense(7), (2, 3, 5), 2 * 3 * 5 * 7),
        (nn.DenseGeneral((2, 4), axis=(-2, -1)), (3, 5, 6), 3 * 5 * 6 * 2 * 4),
        (nn.Conv(8, (3, 3)), (2, 6, 6, 4), 2 * 6 * 6 * 3 * 3 * 4 * 8),
        (nn.Conv(8, (3, 3), 2, "VALID"), (1, 7, 9, 4), 3 * 4 * 3 * 3 * 4 * 8),
        (nn.Conv(8, (3,), kernel_dilation=2), (1, 10, 4), 10 * 3 * 4 * 8),
        (nn.Conv(8, (3, 3), feature_group_count=2), (1, 6, 6, 4), 36 * 9 * 2 * 8),
        (nn.Conv(4, (3, 3), feature_group_count=4), (1, 6, 6, 4), 36 * 9 * 4),
        (nn.Conv(8, (2, 3, 3)), (1, 4, 6, 6, 3), 4 * 36 * 18 * 3 * 8),
        # Each of 6 inputs meets the whole kernel once.
        (nn.ConvTranspose(8, (4,), (2,), "VALID"), (1, 6, 3), 7 * 4 * 3 * 8),
        (nn.ConvTranspose(8, (2, 2), (2, 2)), (1, 6, 6, 3), 36 * 4 * 3 * 8),
    ],
)
def test_layer_costs_what_the_hand_counts(model, shape, wanted):
    leaves, other = count(model, struct(*shape))
    assert leaves == {"kernel": wanted}
    assert other == 0


def test_batch_groups_of_a_convolution():
    conv = partial(
        jax.lax.conv_general_dilated,
        window_strides=(1,),
        padding="SAME",
        batch_group_count=2,
        dimension_numbers=("NWC", "WIO", "NWC"),
    )
    found = flops.macs(lambda w, x: conv(x, w), struct(3, 4, 8), struct(6, 10, 4))
    # A batch of 3 for each half of the 8 features.
    assert found.leaves == {"": 3 * 10 * 8 * 3 * 4}


def test_attention_scores_belong_to_no_leaf():
    batch, length, width = 2, 5, 8
    leaves, other = count(nn.MultiHeadDotProductAttention(2), struct(2, 5, 8))
    projection = batch * length * width * width
    wanted = dict.fromkeys(["query", "key", "value", "out"], projection)
    assert {p.removesuffix("/kernel"): n for p, n in leaves.items()} == wanted
    assert other == 2 * batch * length * length * width


@pytest.mark.parametrize("remat", [False, True])
def test_scanned_layers_count_in_their_stacked_leaf(remat):
    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.remat(nn.Dense) if remat else nn.Dense
            scan = nn.scan(
                lambda layer, x, _: (nn.relu(layer(x)), None),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=3,
            )
            return nn.Dense(4, name="head")(scan(layer(8, name="l"), x, None)[0])

    leaves, other = count(Stack(), struct(5, 8))
    assert leaves == {"l/kernel": 3 * 5 * 8 * 8, "head/kernel": 5 * 8 * 4}
    assert other == 0


def test_nnx_state_is_counted_by_the_paths_of_the_plan():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
            self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
            self.heads = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
            self.out = nnx.Linear(8, 5, rngs=rngs)

        def __call__(self, x):
            h = nnx.relu(self.norm(self.conv(x))).reshape(1, -1, 8)
            return self.out(self.heads(h).mean(1))

    graph, params, rest = nnx.split(
        nnx.eval_shape(lambda: Net(nnx.Rngs(0))), nnx.Param, ...
    )
    found = flops.macs(
        lambda p, r, x: nnx.merge(graph, p, r)(x), params, rest, struct(1, 6, 6, 3)
    )
    spent = {path: cost for path, cost in found.leaves.items() if cost}
    assert spent == {
        "conv/kernel": 36 * 9 * 3 * 8,
        "out/kernel": 8 * 5,
        **{f"heads/{p}/kernel": 36 * 64 for p in ("query", "key", "value", "out")},
    }
    assert found.other == 2 * 36 * 36 * 8
    plan = nm.plan(params, {"conv": nm.Unstructured(density=0.5)})
    saved = 36 * 9 * 3 * 8 / 2
    assert flops.forward(found, plan).sparse == found.total - saved


W, V, X = struct(6, 4), struct(6, 4), struct(2, 6)


@pytest.mark.parametrize(
    "fn",
    [
        lambda w, x: x @ w.astype(jnp.bfloat16).astype(jnp.float32),
        lambda w, x: jnp.einsum("bi,ij->bj", x, w.reshape(24).reshape(6, 4)),
        lambda w, x: jnp.swapaxes(w, 0, 1) @ x.T,
        lambda w, x: x @ jnp.concatenate([w[:3], w[3:]]),
        lambda w, x: x @ ((w - w.mean(0)) / (w.std(0) + 1e-5)),
        lambda w, x: x @ (w * np.eye(6, 4, dtype=np.float32)),
        lambda w, x: x @ nm.sparsify({"kernel": w}, HALF)["kernel"],
        lambda w, x: x @ (w + jax.lax.stop_gradient(jnp.sign(w) - w)),
        lambda w, x: jax.jit(jax.checkpoint(lambda w: x @ w))(w),
        lambda w, x: jax.vmap(lambda row: row @ w)(x),
        lambda w, x: jax.lax.cond(x.sum() > 0, lambda: x @ w, lambda: x[:, :4]),
        lambda w, x: jax.lax.cond(x.sum() > 0, lambda: w, lambda: -w).T @ x.T,
        lambda w, x: jnp.where(x.sum() > 0, w, 0.0).T @ x.T,
        lambda w, x: jax.lax.map(lambda row: row @ w, x),
        lambda w, x: jax.lax.fori_loop(0, 2, lambda i, h: h + x[i] @ w, jnp.zeros(4)),
        lambda w, x: jax.lax.scan(lambda c, row: (c, row @ c), w, x),
        lambda w, x: x @ jax.lax.while_loop(lambda w: w[0, 0] > 1, lambda w: w / 2, w),
        lambda w, x: (
            jax.lax.optimization_barrier((x, w))[0]
            @ jax.lax.optimization_barrier((x, w))[1]
        ),
        lambda w, x: _custom_vjp(w, x),
    ],
)
def test_a_leaf_is_followed_to_its_product(fn):
    found = flops.macs(lambda p, x: fn(p["w"], x), {"w": W}, X)
    assert found == flops.Macs({"w": 2 * 6 * 4}, 0)


HALF = nm.plan({"kernel": W}, {"kernel": nm.NM(1, 2)})


@jax.custom_vjp
def _custom_vjp(w, x):
    return x @ w


_custom_vjp.defvjp(lambda w, x: (x @ w, (w, x)), lambda kept, g: kept)


def test_masks_from_the_args_leave_a_leaf_what_it_is():
    masks = {"w": struct(6, 4, dtype=bool)}

    def fn(params, masks, x):
        product = x @ (params["w"] * masks["w"].astype(jnp.float32))
        return product + x @ nm.apply_masks(params, masks)["w"]

    assert flops.macs(fn, {"w": W}, masks, X) == flops.Macs({"w": 2 * 2 * 24}, 0)


def one_hot(x):
    return jax.nn.one_hot(x.astype(int), 6)


def masked_or_not(x):
    x = x[:1, :4]
    return one_or_other(x, x, (x > 0).astype(jnp.float32))


def one_or_other(x, one, other):
    return jax.lax.cond(x.sum() > 0, lambda: one, lambda: other)


@pytest.mark.parametrize(
    ("fn", "leaves", "other"),
    [
        # Used twice, summed; concatenated, shared out; tied to an embedding.
        (lambda p, x: x @ p["w"] + x @ p["w"] @ p["w"].T @ p["w"], (48 * 4, 0), 0),
        (lambda p, x: x @ jnp.concatenate([p["w"], p["v"][:, :2]], 1), (48, 24), 0),
        (lambda p, x: x @ jnp.stack([p["w"], p["v"]]), (48, 48), 0),
        (lambda p, x: one_hot(x[:, 0]) @ p["w"], (48, 0), 0),
        (lambda p, x: p["w"][x[:, 0].astype(int)] @ p["w"].T, (48, 0), 0),
        (lambda p, x: (x[:1, :4] * p["v"][0]) @ p["w"].T, (24, 0), 0),
        # A bias of as many entries as a batch of one does not make it a leaf.
        (lambda p, x: (one_hot(x[:1, 0]) @ p["w"] + p["v"][0]) @ p["w"].T, (48, 0), 0),
        (lambda p, x: (masked_or_not(x) * p["v"][0]) @ p["w"].T, (24, 0), 0),
        (lambda p, x: (jnp.ones((2, 6)) * p["v"][:, 0]) @ p["w"], (48, 0), 0),
        # No leaf's: two leaves in one, one leaf on the other, data on data, a sum.
        (lambda p, x: x @ (p["w"] + p["v"]), (0, 0), 48),
        (lambda p, x: p["w"].T @ p["v"], (0, 0), 4 * 6 * 4),
        (lambda p, x: x @ x.T, (0, 0), 2 * 6 * 2),
        (lambda p, x: x @ (p["w"] * x[0, 0]), (0, 0), 48),
        (lambda p, x: x @ p["w"].sum(1), (0, 0), 12),
        (lambda p, x: x @ one_or_other(x, p["w"], p["v"]), (0, 0), 48),
        (lambda p, x: x @ jnp.split(jnp.stack([p["w"], p["v"]]), 2)[0][0], (0, 0), 48),
        # Merged low rank weights stand for the larger leaf no more.
        (lambda p, x: x @ (p["w"] + p["v"] @ jnp.eye(4)), (0, 24 * 4), 48),
        # Constants are multiplied when the program is compiled.
        (lambda p, x: x + (jnp.ones((2, 3)) @ jnp.ones((3, 6))), (0, 0), 0),
    ],
)
def test_whose_product_it_is(fn, leaves, other):
    found = flops.macs(fn, {"w": W, "v": V}, X)
    assert (found.leaves["w"], found.leaves["v"]) == leaves
    assert found.other == other


def test_the_dearest_branch_counts():
    def fn(p, x):
        branches = [lambda x: x, lambda x: x @ p @ p.T, lambda x: x @ p[:, :1] + x]
        return jax.lax.switch(x[0, 0].astype(int), branches, x)

    assert flops.macs(fn, W, X).leaves == {"": 2 * 48}


@pytest.mark.parametrize("whose", ["leaf 'w'", "activations"])
def test_products_in_a_while_loop_are_an_error(whose):
    def body(p, x):
        return x @ (p["w"] if whose == "leaf 'w'" else x.T @ x)

    def fn(p, x):
        return jax.lax.while_loop(lambda h: h[0, 0] > 0, partial(body, p), x)

    with pytest.raises(ValueError, match=f"multiplies {whose} inside lax.while_loop"):
        flops.macs(lambda p, x: fn(p, x), {"w": struct(6, 6)}, X)


def test_a_leaf_in_a_callback_is_an_error_and_data_in_one_is_not():
    def call(w, x):
        return jax.pure_callback(lambda w, x: x @ w, struct(2, 4), w, x)

    with pytest.raises(ValueError, match="inside 'pure_callback', which cannot"):
        flops.macs(call, W, X)
    found = flops.macs(lambda w, x: x @ w + call(jnp.ones((6, 4)), x), W, X)
    assert found.leaves == {"": 48}


def test_dropout_keys_and_masked_leaves_are_no_trouble():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4)(nn.Dropout(0.5, deterministic=False)(x))

    key = jax.eval_shape(jax.random.key, 0)
    kernel = {"Dense_0": {"kernel": W, "bias": struct(4)}, "no": optax.MaskedNode()}

    def fn(params, key, x):
        params = {"Dense_0": params["Dense_0"]}
        return Net().apply({"params": params}, x, rngs={"dropout": key})

    found = flops.macs(fn, kernel, key, X)
    assert found == flops.Macs({"Dense_0/bias": 0, "Dense_0/kernel": 48}, 0)


def test_products_that_cannot_be_looked_into_are_an_error():
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("d")
    fn = jax.shard_map(
        lambda w, x: x @ w, mesh=mesh, in_specs=(None, spec), out_specs=spec
    )
    with pytest.raises(ValueError, match="inside 'shard_map', which cannot be looked"):
        flops.macs(fn, W, X)


# ResNet-50 v1.5 at 224 px, of which nothing is computed.


class Bottleneck(nn.Module):
    width: int
    stride: int

    @nn.compact
    def __call__(self, x):
        norm = partial(nn.BatchNorm, use_running_average=True)
        conv = partial(nn.Conv, use_bias=False)
        h = nn.relu(norm()(conv(self.width, (1, 1))(x)))
        h = nn.relu(norm()(conv(self.width, (3, 3), self.stride)(h)))
        h = norm()(conv(4 * self.width, (1, 1))(h))
        if x.shape != h.shape:
            x = norm()(conv(4 * self.width, (1, 1), self.stride, name="project")(x))
        return nn.relu(x + h)


class ResNet50(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(64, (7, 7), 2, use_bias=False, name="stem")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for stage, blocks in enumerate((3, 4, 6, 3)):
            for block in range(blocks):
                x = Bottleneck(64 * 2**stage, 2 if stage and not block else 1)(x)
        return nn.Dense(1000, name="head")(x.mean((1, 2)))


@functools.cache
def resnet():
    """Give the params and the counts."""
    model, image = ResNet50(), struct(1, 224, 224, 3)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    params = variables.pop("params")
    found = flops.macs(
        lambda p, rest, x: model.apply({"params": p, **rest}, x),
        params,
        variables,
        image,
    )
    return params, found


def resnet_by_hand():
    """Add up the MACs of ResNet-50 v1.5: the stride is in the 3x3 convolution."""
    total, channels, pixels = 112**2 * 7 * 7 * 3 * 64, 64, 56
    for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(blocks):
            total += pixels**2 * channels * width
            pixels //= 1 if block else stride
            total += pixels**2 * (9 * width * width + width * 4 * width)
            total += 0 if block else pixels**2 * channels * 4 * width
            channels = 4 * width
    return total + 2048 * 1000


def test_resnet50_costs_4_1_gmacs():
    params, found = resnet()
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == 25_557_032
    assert found.total == resnet_by_hand() == 4_089_184_256
    assert found.other == 0


@pytest.mark.parametrize(
    ("distribution", "skip", "fractions"),
    [
        # Every kernel takes part, stem and head too.
        (nm.erk, None, {0.8: 0.414, 0.9: 0.242, 0.95: 0.122, 0.99: 0.024}),
        # The stem is dense, and not made up for elsewhere; the head is sparse.
        (nm.uniform, "stem", {0.8: 0.223, 0.9: 0.126, 0.95: 0.077}),
    ],
)
def test_resnet50_has_the_published_fractions(distribution, skip, fractions):
    params, found = resnet()
    for sparsity, wanted in fractions.items():
        density = distribution(round(1 - sparsity, 2))
        plan = nm.plan(params, nm.Unstructured(), density=density, skip=skip)
        assert round(flops.forward(found, plan).fraction, 3) == wanted


# Fractions

PARAMS = {
    "in": {"kernel": jnp.arange(1.0, 129.0).reshape(8, 16)},
    "out": {"kernel": jnp.arange(1.0, 65.0).reshape(16, 4)},
}
FOUND = flops.Macs({"in/kernel": 1280, "out/kernel": 640}, 80)


def test_forward_weighs_by_exact_counts_and_keeps_the_rest():
    plan = nm.plan(PARAMS, {"in": nm.Unstructured()}, density=0.3)
    kept = plan.by_path["in/kernel"].count
    assert kept == 38  # of 128
    cost = flops.forward(FOUND, plan)
    assert cost.dense == 2000
    assert cost.sparse == 1280 * kept / 128 + 640 + 80
    assert cost.fraction == cost.sparse / 2000


def test_forward_takes_masks_plan_and_densities_alike():
    plan = nm.plan(PARAMS, nm.FanIn(), density=0.25)
    by_plan = flops.forward(FOUND, plan)
    assert by_plan == flops.forward(FOUND, nm.compute_masks(PARAMS, plan))
    densities = {leaf.path: leaf.density for leaf in plan.leaves}
    assert by_plan == flops.forward(FOUND, densities)


def test_masks_say_what_global_leaves_and_ablated_neurons_keep():
    plan = nm.plan(PARAMS, nm.Unstructured(), density=nm.global_(0.5))
    with pytest.raises(ValueError, match="'in/kernel' shares a global budget"):
        flops.forward(FOUND, plan)
    masks = nm.compute_masks(PARAMS, plan)
    kept = [int(mask.sum()) for mask in jax.tree.leaves(masks)]
    assert sum(kept) == 96
    wanted = 1280 * kept[0] / 128 + 640 * kept[1] / 64 + 80
    assert flops.forward(FOUND, masks).sparse == pytest.approx(wanted, rel=1e-12)
    ablated = {
        "in": {"kernel": jnp.ones((8, 16), bool).at[:, :4].set(False)},
        "out": {"kernel": optax.MaskedNode()},
    }
    assert flops.forward(FOUND, ablated).sparse == 1280 * 0.75 + 640 + 80


def test_table_shows_other_products_and_leaves_out_biases():
    found = flops.Macs({"bias": 0, "kernel": 1000}, 24)
    lines = str(flops.forward(found, {"kernel": 0.5})).splitlines()
    assert [line.split() for line in lines if line[0] != "-"] == [
        ["path", "dense", "MACs", "density", "sparse", "MACs"],
        ["kernel", "1,000", "0.5", "500"],
        ["other", "24", "1", "24"],
        ["total", "1,024", "0.5117", "524"],
    ]


def test_errors_of_forward():
    plan = nm.plan(PARAMS, nm.NM(2, 4))
    with pytest.raises(ValueError, match="'more' is not in the plan, whose leaves are"):
        flops.forward(flops.Macs({**FOUND.leaves, "more": 1}, 0), plan)
    with pytest.raises(ValueError, match="'out/kernel' was not counted"):
        flops.forward(flops.Macs({"in/kernel": 1}, 0), plan)
    with pytest.raises(ValueError, match="'x' was not counted; .* in/kernel"):
        flops.forward(FOUND, {"x": jnp.ones(3, bool)})
    with pytest.raises(TypeError, match="'in/kernel' has dtype float32, must be bool"):
        flops.forward(FOUND, {"in": PARAMS["in"]})
    with pytest.raises(ValueError, match=r"'in/kernel' is 1.5, not in \[0, 1\]"):
        flops.forward(FOUND, {"in/kernel": 1.5})
    with pytest.raises(ValueError, match="counts no products"):
        flops.forward(flops.Macs({"bias": 0}, 0), {"bias": 1.0})


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize(("steps", "stop"), [(100, None), (100, 100), (95, 96), (9, 0)])
def test_dynamic_training_adds_up_its_steps(steps, stop, accumulate):
    fraction, every = 0.2, 5
    end = steps * 3 // 4 if stop is None else stop
    topology = DynamicTopology(HALF, max, lambda step: step, every, end, accumulate)
    changes = [c for c in range(1, steps + 1) if topology.due(jnp.asarray(c))]
    cost = 0.0
    for step in range(1, steps + 1):
        dense = any(0 <= change - step < accumulate for change in changes)
        cost += 2 * fraction + (1.0 if dense else fraction)
    found = flops.dynamic_training(
        fraction, total_steps=steps, delta_t=every, stop=stop, accumulate=accumulate
    )
    assert found == pytest.approx(cost / (3 * steps), rel=1e-12)


def test_dynamic_training_is_near_the_papers_accounting():
    # There, delta_t steps of 3 f and one change of 2 f + 1, over delta_t + 1 steps.
    f, delta_t = 0.242, 100
    paper = (3 * f * delta_t + 2 * f + 1) / (3 * (delta_t + 1))
    ours = flops.dynamic_training(f, total_steps=100_000, delta_t=100, stop=100_001)
    assert ours == pytest.approx(f + (1 - f) / 300, rel=1e-12)
    assert 0 < ours - paper < 3e-5


def test_soft_training_has_dense_weight_gradients():
    assert flops.soft_training(0.5) == pytest.approx((0.5 + 0.5 + 1) / 3)
    dense = flops.soft_training(0.5, sparse_input_gradient=False)
    assert dense == pytest.approx((0.5 + 1 + 1) / 3)
    assert flops.soft_training(1.0, sparse_input_gradient=False) == 1.0


def test_phased_training_is_the_mean_over_steps():
    fractions = [1.0, 1.0, 0.5, 0.5, 0.5, 0.25]
    assert flops.phased_training((1, f) for f in fractions) == np.mean(fractions)
    phases = [(2, 1.0), (3, 0.5), (1, 0.25)]
    assert flops.phased_training(phases) == np.mean(fractions)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: flops.soft_training(1.5), r"fraction=1.5 must be in \[0, 1\]"),
        (lambda: flops.phased_training([]), "the phases have no steps"),
        (lambda: flops.phased_training([(-1, 1.0)]), "a phase of -1 steps"),
        (lambda: flops.phased_training([(1, 2.0)]), "fraction of a phase=2.0 must be"),
        (
            lambda: flops.dynamic_training(-0.1, total_steps=5),
            r"fraction=-0.1 must be in \[0, 1\]",
        ),
        (lambda: flops.dynamic_training(0.1, total_steps=0), "total_steps=0 must be"),
        (
            lambda: flops.dynamic_training(0.1, total_steps=5, delta_t=0),
            "delta_t=0 must be >= 1",
        ),
        (
            lambda: flops.dynamic_training(0.1, total_steps=5, delta_t=2, accumulate=3),
            "accumulate=3 gradients do not fit .* delta_t=2 steps",
        ),
    ],
)
def test_errors_of_trainings(call, message):
    with pytest.raises(ValueError, match=message):
        call()
