"""Masks of sharded arrays: nothing but counts may cross devices."""

import re
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import nmjax as nm
from nmjax.masking import ranking

COLLECTIVE = re.compile(
    r"= (?P<types>[^=]*?) (?P<name>all-gather|all-reduce|all-to-all|collective-permute"
    r"|collective-broadcast|reduce-scatter|ragged-all-to-all)(-start)?\("
)


def hlo_of(compiled: jax.stages.Compiled) -> str:
    return re.sub(r"/\*.*?\*/", "", compiled.as_text() or "")


def collectives(hlo: str) -> Counter:
    """Count the collectives of a compiled program by name and largest operand size."""
    found: Counter = Counter()
    for line in hlo.splitlines():
        if match := COLLECTIVE.search(line):
            shapes = re.findall(r"\w+\[([\d,]*)\]", match["types"])
            sizes = [np.prod([int(d) for d in s.split(",") if d]) for s in shapes]
            found[match["name"], int(max(sizes, default=0))] += 1
    return found


def mesh(axis_type: AxisType):
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(axis_type,) * 2)


def compile_sharded(function, shape, spec, axis_type):
    """Compile a mask function of one sharded array; return its values and its HLO."""
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    scores = jnp.asarray(np.round(values * 4))
    with jax.set_mesh(mesh(axis_type)):
        sharded = jax.device_put(scores, NamedSharding(mesh(axis_type), spec))
        compiled = jax.jit(function).lower(sharded).compile()
        mask = compiled(sharded)
    np.testing.assert_array_equal(np.asarray(mask), np.asarray(function(scores)))
    if axis_type == AxisType.Explicit:
        assert mask.sharding.is_equivalent_to(sharded.sharding, len(shape))
    return collectives(hlo_of(compiled))


SPECS = [P("model", None), P(None, "model"), P("data", "model"), P(("data", "model"))]
LOCAL = {
    "2:4": partial(nm.nm_mask, n=2, m=4),
    "2:4 last axis": partial(nm.nm_mask, n=2, m=4, axis=-1),
    "4:16": partial(nm.nm_mask, n=4, m=16),
    "3:24": partial(nm.nm_mask, n=3, m=24),
    "4:2:8": partial(nm.vnm_mask, v=4, n=2, m=8),
    "transposable 2:4": partial(nm.transposable_nm_mask, n=2, m=4),
    "transposable 4:8": partial(nm.transposable_nm_mask, n=4, m=8),
}


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", LOCAL)
def test_groups_need_no_collective(name, axis_type):
    for spec in SPECS[2:] if "transposable" in name else SPECS:
        found = compile_sharded(LOCAL[name], (384, 96), spec, axis_type)
        assert not found, (name, spec, found)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(
    "spec", [P(None, None, "model"), P(None, None, "data", "model")]
)
def test_convolution_kernels_need_no_collective(spec, axis_type):
    function = partial(nm.nm_mask, n=2, m=4)
    assert not compile_sharded(function, (3, 3, 32, 16), spec, axis_type)


def globally(scores):
    masks = nm.global_topk_mask({"a": scores, "b": jnp.cos(scores)}, 999)
    return masks["a"] ^ masks["b"]


# name -> function, and the most entries of a count (per device) for the specs.
COUNTED = {
    "flat": (partial(nm.topk_mask, k=5000), lambda s: 1),
    "global": (globally, lambda s: 1),
    "fan-in": (partial(nm.fan_in_mask, k=100), lambda s: s[1]),
    "last axis": (partial(nm.topk_mask, k=20, axis=-1), lambda s: s[0]),
    "channel": (partial(nm.channel_mask, k=20), lambda s: s[1]),
}


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", COUNTED)
def test_top_k_communicates_counts_only(name, axis_type):
    function, largest = COUNTED[name]
    shape = (1024, 64)  # large enough to be counted in parts
    for spec in (P("model", None), P("data", "model")):
        found = compile_sharded(function, shape, spec, axis_type)
        assert {kind for kind, _ in found} <= {"all-reduce"}, (spec, found)
        assert max([size for _, size in found], default=0) <= largest(shape)
    unsharded = {"fan-in": P(None, "model"), "last axis": P("model", None)}
    if name in unsharded:
        found = compile_sharded(function, shape, unsharded[name], axis_type)
        # Every slice is local; only the question whether all are done is shared.
        assert max([size for _, size in found], default=0) <= 1, found


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_blocks_communicate_counts_only(axis_type):
    function = partial(nm.block_mask, k=300, block=(4, 4))
    for spec in (P("model", None), P("data", "model")):
        found = compile_sharded(function, (256, 64), spec, axis_type)
        assert {kind for kind, _ in found} <= {"all-reduce"}, (spec, found)
        assert max([size for _, size in found], default=0) <= 1, found


def test_masks_trace_inside_shard_map():
    scores = jnp.asarray(np.random.default_rng(0).normal(size=(16, 64)), jnp.float32)
    here = mesh(AxisType.Auto)

    def local(block):
        mask = nm.nm_mask(block, 2, 4) & nm.topk_mask(block, 100)
        return mask & nm.transposable_nm_mask(block, 4, 8)

    spec = P(None, ("data", "model"))
    mapped = jax.jit(jax.shard_map(local, mesh=here, in_specs=spec, out_specs=spec))
    expected = [local(part) for part in jnp.split(scores, 8, axis=1)]
    np.testing.assert_array_equal(mapped(scores), jnp.concatenate(expected, axis=1))


def fused_loops(hlo: str) -> int:
    return len(re.findall(r"fusion\(.*kind=kLoop", hlo))


@pytest.mark.parametrize("n, m, axis", [(2, 4, 0), (2, 4, 1), (4, 8, 1), (4, 16, 1)])
def test_codes_are_computed_once_per_group(n, m, axis, monkeypatch):
    """The fusion stop keeps the code out of the pass that expands it."""
    scores = jax.ShapeDtypeStruct((256, 256), jnp.float32)

    def compiled():
        # A new function: jit would find the old one in its cache.
        return jax.jit(lambda s: nm.nm_mask(s, n, m, axis)).lower(scores).compile()

    hlo = hlo_of(compiled())
    assert hlo.count(" divide(") == 1
    stopped = fused_loops(hlo)
    monkeypatch.setattr(ranking, "stop_fusion", lambda values, lane: values)
    jax.clear_caches()
    assert fused_loops(hlo_of(compiled())) < stopped
    jax.clear_caches()


@pytest.mark.parametrize("name", ["2:4", "4:16", "transposable 2:4"])
def test_the_stop_divides_by_one(name):
    scores = jnp.asarray(
        np.random.default_rng(0).choice([-1.0, 0, 1, np.nan], (64, 64))
    )
    mask = LOCAL[name](scores.astype(jnp.float32))
    assert mask.sum() == mask.size // (2 if "2:4" in name else 4)
