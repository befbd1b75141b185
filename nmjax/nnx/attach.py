"""Train a sparse flax.nnx model without touching it.

`attach` puts a hook on the planned parameters: whenever the model reads one, it gets
the sparse weights, with a straight-through gradient. What is stored stays dense, and
`nnx.state`, `nnx.split`, `nnx.as_pure`, `nnx.Optimizer` and checkpoints of `nnx.state`
see what is stored.

The functional route, `nm.sparsify` on the state that `nnx.split` gives, computes the
same to the bit; use it where masks come from the optimizer state or the model is
dense for a while (`nm.masks`, `nm.sparse_phase`).

Mind five things.

- Make the `nnx.Optimizer` before `attach`: made after it, its moments copy the hook's
  metadata, and flax warns.
- Every read computes the mask again: XLA merges the reads of one jit, but a model
  called eagerly pays for each.
- A read of a part (``kernel[0]``) has no mask and is an error, except for one layer of
  a stacked parameter.
- ``param[...] = f(param[...])`` would store sparse weights: assign from
  ``param.get_raw_value()``.
- `nnx.to_pure_dict` and printing read, so they show sparse weights: save
  ``nnx.state(model)``, or detach first.
"""

import dataclasses
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx

from nmjax.plans import LeafPlan, Plan
from nmjax.projection import sparsify

Model = TypeVar("Model", bound=nnx.Module)

_HOOK = "on_get_value"


@dataclasses.dataclass(frozen=True)
class SparseRead:
    """Hook that makes an `nnx.Variable` read sparse; put there by `attach`.

    Attributes:
      leaf: the plan of the variable.
    """

    leaf: LeafPlan

    def __call__(self, variable: nnx.Variable, value: Any) -> Any:
        """Give the sparse weights of a stored value."""
        del variable
        if not isinstance(value, jax.Array | np.ndarray):
            return value  # an abstract value, for example of nnx.eval_shape
        leaf = self.leaf
        if leaf.stacked and value.shape == leaf.layer_shape:
            # Inside nnx.scan or nnx.vmap over layers.
            leaf = dataclasses.replace(leaf, shape=leaf.layer_shape, stacked=0)
        if value.shape != leaf.shape:
            raise ValueError(
                f"parameter {leaf.path!r} of shape {leaf.shape} is sparse and was read "
                f"in part, as shape {value.shape}: read all of it, or detach the plan "
                "with nmjax.nnx.detach(model)"
            )
        return sparsify({leaf.path: value}, Plan((leaf,)))[leaf.path]


def attach(model: Model, plan: Plan) -> Model:
    r"""Let a model compute with sparse weights while it stores dense ones.

    Each planned parameter :math:`W` reads as :math:`E \odot W`, its mask recomputed
    from its magnitude at every read, and its gradient is the gradient of what was
    read (straight-through). Dense leaves of the plan are left alone.

    Args:
      model: an nnx module; changed in place.
      plan: a plan made from ``nnx.state(model)`` or ``nnx.state(model, nnx.Param)``.
        A plan attached before is replaced.

    Returns:
      The same model.

    Raises:
      ValueError: the plan was made for another model, or its leaves share one global
        budget, which no leaf can resolve alone.

    Example:
      >>> import jax.numpy as jnp
      >>> import nmjax as nm
      >>> from flax import nnx
      >>> from nmjax import nnx as nm_nnx
      >>> model = nnx.Linear(4, 8, use_bias=False, rngs=nnx.Rngs(0))
      >>> model = nm_nnx.attach(model, nm.plan(nnx.state(model), nm.NM(2, 4)))
      >>> int((model.kernel[...] == 0).sum())
      16
      >>> int((nnx.state(model)["kernel"].get_raw_value() == 0).sum())
      0
    """
    variables = {
        "/".join(str(key) for key in path): node
        for path, node in nnx.iter_graph(model)
        if isinstance(node, nnx.Variable)
    }
    for leaf in plan.sparse_leaves:
        _check_leaf(leaf, variables)
    detach(model)
    for leaf in plan.sparse_leaves:
        variable = variables[leaf.path]
        hooks = (*_hooks(variable), SparseRead(leaf))
        variable.set_metadata(**{_HOOK: hooks})
    return model


def detach(model: Model) -> Model:
    """Let a model read its stored, dense weights again.

    Args:
      model: an nnx module, changed in place. Hooks of others stay.

    Returns:
      The same model.

    Example:
      >>> import nmjax as nm
      >>> from flax import nnx
      >>> from nmjax import nnx as nm_nnx
      >>> model = nnx.Linear(4, 8, use_bias=False, rngs=nnx.Rngs(0))
      >>> model = nm_nnx.attach(model, nm.plan(nnx.state(model), nm.NM(2, 4)))
      >>> int((nm_nnx.detach(model).kernel[...] == 0).sum())
      0
    """
    for _, node in nnx.iter_graph(model):
        if not isinstance(node, nnx.Variable):
            continue
        hooks = _hooks(node)
        others = tuple(hook for hook in hooks if not isinstance(hook, SparseRead))
        if others:
            node.set_metadata(**{_HOOK: others})
        elif hooks:
            node.del_metadata(_HOOK)
    return model


def _hooks(variable: nnx.Variable) -> tuple[Any, ...]:
    """Give the hooks that a variable has."""
    hooks = variable.get_metadata().get(_HOOK, ())
    return hooks if isinstance(hooks, tuple) else (hooks,)


def _check_leaf(leaf: LeafPlan, variables: dict[str, nnx.Variable]) -> None:
    """Raise unless a leaf of the plan can be attached."""
    variable = variables.get(leaf.path)
    if variable is None:
        raise ValueError(
            f"the plan knows a leaf {leaf.path!r} that this model does not have; make "
            "the plan from the model: nm.plan(nnx.state(model), ...)"
        )
    shape = np.shape(variable.get_raw_value())
    if shape != leaf.shape:
        raise ValueError(
            f"leaf {leaf.path!r} has shape {shape}, the plan was made for shape "
            f"{leaf.shape}"
        )
    if leaf.is_global:
        raise ValueError(
            f"leaf {leaf.path!r} shares a global budget with others, so its mask "
            "cannot be read alone: use nm.sparsify on the state of the model"
        )
