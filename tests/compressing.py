"""What the tests of compressed models share: params of every format."""

import jax
import jax.numpy as jnp

import nmjax as nm
from nmjax import formats
from nmjax.paths import named_leaves

KINDS = ["nm", "fan_in", "block"]


def compressed(params, kind, stacked=None, **rules):
    """Give exactly sparse params, and the same compressed; fan-in has ablated neurons.

    Rules of leaves that are no kernels, by name, come before that of kernels.
    """
    pattern = {
        "nm": nm.NM(1, 2),
        "fan_in": nm.FanIn(density=0.5),
        "block": nm.Block(2, 2, density=0.5),
    }[kind]
    plan = nm.plan(params, {**rules, "kernel$": pattern}, stacked=stacked)
    sparse = jax.jit(lambda params: nm.project(params, plan))(params)
    if kind == "fan_in":
        paths = {leaf.path for leaf in plan.sparse_leaves}
        pairs, treedef = named_leaves(sparse)
        sparse = treedef.unflatten(
            leaf.at[..., 0].set(0.0) if path in paths else leaf for path, leaf in pairs
        )
    return sparse, nm.compress(sparse, plan)


def is_float(leaf):
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def split(tree):
    """Give the floating leaves, and what puts them back."""
    leaves, treedef = jax.tree.flatten(tree)
    floats = [leaf for leaf in leaves if is_float(leaf)]

    def join(floats):
        rest = iter(floats)
        return treedef.unflatten([next(rest) if is_float(x) else x for x in leaves])

    return floats, join


def products(function, *args):
    """Count the products with compressed weights in what a function traces."""
    return str(jax.make_jaxpr(function)(*args)).count("nmjax_matmul")


def count(tree):
    return sum(
        formats.is_compressed(leaf)
        for leaf in jax.tree.leaves(tree, is_leaf=formats.is_compressed)
    )
