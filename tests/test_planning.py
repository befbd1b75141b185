"""nm.plan: rules, defaults, reasons, budgets, names, errors."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import nmjax as nm
from nmjax import paths, patterns


def spec(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def patterns_of(plan):
    return {leaf.path: str(leaf.pattern) for leaf in plan.leaves}


@pytest.fixture
def convnet():
    return {
        "stem": {"kernel": spec(3, 3, 3, 64)},
        "block": {
            "conv": {"kernel": spec(3, 3, 64, 64)},
            "depthwise": {"kernel": spec(3, 3, 1, 64)},
            "norm": {"scale": spec(64), "bias": spec(64)},
        },
        "embed": {"embedding": spec(100, 64)},
        "head": {"kernel": spec(64, 10), "bias": spec(10)},
    }


def test_default_pattern_leaves_what_does_not_fit_dense_and_says_why(convnet):
    plan = nm.plan(convnet, nm.NM(2, 4))
    assert [leaf.path for leaf in plan.sparse_leaves] == ["block/conv/kernel"]
    reasons = {leaf.path: leaf.reason for leaf in plan.leaves}
    assert "length 3, which is not a multiple of m=4" in reasons["stem/kernel"]
    assert "length 1, which is not a multiple" in reasons["block/depthwise/kernel"]
    assert "10 outputs are not a multiple of 8" in reasons["head/kernel"]
    assert "named 'embedding'" in reasons["embed/embedding"]
    assert "rank 1" in reasons["head/bias"]


def test_a_rule_overrides_the_hardware_default(convnet):
    plan = nm.plan(convnet, {"head/kernel": nm.NM(2, 4)})
    assert [leaf.path for leaf in plan.sparse_leaves] == ["head/kernel"]


def test_first_matching_rule_wins(convnet):
    rules = {"conv": nm.NM(1, 4), "block/.*kernel": nm.Dense(), ...: nm.NM(2, 4)}
    found = patterns_of(nm.plan(convnet, rules))
    assert found["block/conv/kernel"] == "1:4 along -2"
    assert found["block/depthwise/kernel"] == "dense"


def test_ellipsis_rule_is_lenient_and_last(convnet):
    plan = nm.plan(convnet, {"head": nm.Dense(), ...: nm.NM(2, 4)})
    assert [leaf.path for leaf in plan.sparse_leaves] == ["block/conv/kernel"]
    with pytest.raises(ValueError, match="must come last"):
        nm.plan(convnet, {...: nm.NM(2, 4), "head": nm.Dense()})


def test_skip_wins_over_rules(convnet):
    plan = nm.plan(convnet, {"kernel": nm.Unstructured(0.5)}, skip=["head", "stem"])
    assert {leaf.path for leaf in plan.sparse_leaves} == {
        "block/conv/kernel",
        "block/depthwise/kernel",
    }


def test_a_leaf_named_by_a_rule_must_fit(convnet):
    with pytest.raises(ValueError, match=r"leaf 'stem/kernel'.*length 3.*nm.Dense"):
        nm.plan(convnet, {"stem|conv": nm.NM(2, 4)})


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (({"nowhere": nm.NM(2, 4)},), ValueError, "'nowhere' matches no leaf"),
        (({"conv": "2:4"},), TypeError, "unknown rule 'conv': '2:4'"),
        (({"conv": nm.NM},), TypeError, "unknown rule 'conv'"),
        (("2:4",), TypeError, "pattern_or_rules must be a pattern"),
        (({"(": nm.NM(2, 4)},), ValueError, "is not a regex"),
        (({3: nm.NM(2, 4)},), TypeError, "rule must be a regex string"),
        ((nm.NM(2, 6),), ValueError, "the plan matches nothing"),
        ((nm.Unstructured(),), ValueError, "needs a density"),
        (
            ({"norm/scale": nm.NM(2, 4)},),
            ValueError,
            r"axis=-2 is out of range for shape \(64,\)",
        ),
    ],
)
def test_bad_rules_are_refused(unchecked, convnet, arguments, error, match):
    with pytest.raises(error, match=match):
        nm.plan(convnet, *arguments)


def test_bad_options_are_refused(convnet):
    with pytest.raises(ValueError, match="'nowhere' matches no leaf"):
        nm.plan(convnet, nm.NM(2, 4), skip="nowhere")
    with pytest.raises(ValueError, match="'nowhere' matches no leaf"):
        nm.plan(convnet, nm.NM(2, 4), stacked="nowhere")
    with pytest.raises(ValueError, match="density=0.5 has no use"):
        nm.plan(convnet, nm.NM(2, 4), density=0.5)
    with pytest.raises(ValueError, match="no entry of density names it"):
        nm.plan(convnet, nm.Unstructured(), density={"conv": 0.5})
    with pytest.raises(ValueError, match=r"global density needs Unstructured"):
        nm.plan(convnet, nm.FanIn(), density=nm.global_(0.5))


def test_rule_on_an_integer_leaf_is_refused():
    tree = {"kernel": spec(8, 8), "ids": spec(8, 8, dtype=jnp.int32)}
    with pytest.raises(TypeError, match="leaf 'ids'.*not a floating point"):
        nm.plan(tree, {"ids|kernel": nm.NM(2, 4)})


def test_a_budget_that_keeps_nothing_is_refused():
    tree = {"kernel": spec(8, 100)}
    with pytest.raises(ValueError, match=r"'kernel'.*at least 0.125 \(100 weights\)"):
        nm.plan(tree, nm.FanIn(), density=0.1)


def test_n_of_zero_and_n_above_m_are_refused():
    with pytest.raises(ValueError, match="n=0"):
        nm.NM(0, 4)
    with pytest.raises(ValueError, match="n=5"):
        nm.NM(5, 4)


class Attention(nn.Module):
    partitioned: bool = False

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.lecun_normal()
        if self.partitioned:
            init = nn.with_partitioning(init, ("in", "out"))
        x = nn.Dense(16, name="mlp", kernel_init=init)(x)
        return nn.MultiHeadDotProductAttention(2, name="attention")(x, x)


class NnxAttention(nnx.Module):
    def __init__(self, rngs):
        self.mlp = nnx.Linear(16, 16, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 16, rngs=rngs, decode=False)


@pytest.fixture(scope="module")
def same_model():
    x = jnp.ones((1, 3, 16))
    linen = Attention().init(jax.random.key(0), x)["params"]
    boxed = Attention(partitioned=True).init(jax.random.key(0), x)["params"]
    state = nnx.state(NnxAttention(nnx.Rngs(0)), nnx.Param)
    return linen, boxed, state


def test_path_names_are_the_same_for_linen_boxed_and_nnx(same_model):
    found = [patterns_of(nm.plan(tree, nm.NM(2, 4))) for tree in same_model]
    assert found[0] == found[1] == found[2]


def test_attention_kernels_are_grouped_along_their_inputs(same_model):
    found = patterns_of(nm.plan(same_model[0], nm.NM(2, 4)))
    assert found["attention/query/kernel"] == "2:4 along -3"
    assert found["attention/out/kernel"] == "2:4 along -2"
    assert found["mlp/kernel"] == "2:4 along -2"


def test_masks_of_boxed_and_nnx_trees_keep_their_structure(same_model):
    for tree in same_model:
        plan = nm.plan(tree, nm.NM(2, 4))
        small = nm.project(tree, plan)
        assert jax.tree.structure(small) == jax.tree.structure(tree)
        kept = [int((leaf != 0).sum()) for leaf in jax.tree.leaves(small)]
        assert sum(kept) > 0
        assert plan.count == sum(
            int((leaf != 0).sum())
            for path, leaf in paths.named_leaves(small)[0]
            if path.endswith("kernel")
        )


def test_lists_and_tuples_are_planned_by_rank():
    params = [(spec(8, 16), spec(16)), (spec(16, 8), spec(8))]
    found = patterns_of(nm.plan(params, nm.NM(2, 4)))
    assert found == {
        "0/0": "2:4 along -2",
        "0/1": "dense",
        "1/0": "2:4 along -2",
        "1/1": "dense",
    }


def test_stacked_layers_are_pruned_layer_by_layer():
    params = {"layers": {"query": {"kernel": spec(3, 16, 16)}}}
    wrong = nm.plan(params, nm.NM(2, 4, axis=-2))
    stacked = nm.plan(params, nm.NM(2, 4), stacked="layers")
    assert patterns_of(stacked) == patterns_of(wrong)
    assert stacked.leaves[0].layer_shape == (16, 16)
    scores = jax.random.uniform(jax.random.key(0), (3, 16, 16))
    tree = {"layers": {"query": {"kernel": scores}}}
    for pattern in (
        nm.Unstructured(0.25),
        nm.FanIn(0.25),
        nm.Block(4, 1, density=0.25),
        nm.Channel(0.25),
        nm.NM(1, 4),
        nm.TransposableNM(1, 4),
        nm.VNM(4, 2, 8),
    ):
        plan = nm.plan(tree, pattern, stacked="layers")
        mask = nm.compute_masks(tree, plan)["layers"]["query"]["kernel"]
        single = nm.plan({"kernel": scores[0]}, pattern)
        for i in range(3):
            one = nm.compute_masks({"kernel": scores[i]}, single)["kernel"]
            assert (mask[i] == one).all(), pattern


def test_positive_axes_count_from_the_layer():
    tree = {"kernel": jnp.arange(3 * 8 * 8, dtype=jnp.float32).reshape(3, 8, 8)}
    first = nm.plan(tree, nm.NM(2, 4, axis=0), stacked="kernel")
    last = nm.plan(tree, nm.NM(2, 4, axis=-2), stacked="kernel")
    masks = [nm.compute_masks(tree, plan)["kernel"] for plan in (first, last)]
    assert (masks[0] == masks[1]).all()


@pytest.mark.parametrize("distribution", [nm.uniform, nm.er, nm.erk, nm.global_])
def test_plan_totals_meet_the_target_exactly(convnet, distribution):
    plan = nm.plan(convnet, nm.Unstructured(), density=distribution(0.137), skip="stem")
    assert plan.count == round(0.137 * plan.size)


def test_stacked_leaves_and_others_still_add_up():
    params = {"a": {"kernel": spec(7, 5, 3)}, "b": {"kernel": spec(11, 13)}}
    plan = nm.plan(params, nm.Unstructured(), density=nm.erk(0.3), stacked="a/")
    assert plan.count == round(0.3 * (105 + 143))


def test_fan_in_budget_is_rounded_down_to_whole_neurons():
    plan = nm.plan({"kernel": spec(20, 10)}, nm.FanIn(), density=1 - 0.8)
    assert (plan.leaves[0].budget, plan.leaves[0].count) == (40, 40)
    plan = nm.plan({"kernel": spec(20, 10)}, nm.FanIn(), density=0.17)
    assert (plan.leaves[0].budget, plan.leaves[0].count) == (34, 30)


def test_density_by_regex():
    params = {"a": {"kernel": spec(8, 8)}, "b": {"kernel": spec(8, 8)}}
    plan = nm.plan(params, nm.Unstructured(), density={"a/": 0.5, ".*": 0.25})
    assert [leaf.count for leaf in plan.leaves] == [32, 16]


def test_the_table_names_path_shape_pattern_density_and_reason(convnet):
    text = str(nm.plan(convnet, nm.NM(2, 4)))
    row = next(line for line in text.splitlines() if "conv/kernel" in line)
    assert row.split() == (
        "block/conv/kernel 3×3×64×64 2:4 along -2 0.5 default pattern".split()
    )
    assert "1 of 8 leaves sparse: 18,432 of 36,864 weights kept" in text


def test_a_plan_is_static_and_hashable(convnet):
    first, second = nm.plan(convnet, nm.NM(2, 4)), nm.plan(convnet, nm.NM(2, 4))
    assert first == second
    assert hash(first) == hash(second)
    assert jax.tree.leaves(first) == []
    assert jax.jit(lambda plan: plan.count)(first) == first.count


def test_keys_with_slashes_are_refused_when_they_collide():
    tree = {"a": {"kernel": spec(8, 8)}, "a/kernel": spec(8, 8)}
    with pytest.raises(ValueError, match="two leaves have the path name 'a/kernel'"):
        nm.plan(tree, nm.NM(2, 4))


def test_fan_in_axes_of_flax_kernels():
    assert patterns.fan_in_axes("mlp/kernel", 2) == (-2,)
    assert patterns.fan_in_axes("query/kernel", 3) == (-3,)
    assert patterns.fan_in_axes("out/kernel", 3) == (-3, -2)
