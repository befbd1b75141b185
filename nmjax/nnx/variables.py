"""Variables that hold compressed arrays."""

from typing import Any

from flax import nnx

from nmjax.formats import is_compressed
from nmjax.operands import Origin, guarded


class CompressedParam(nnx.Param):
    """A parameter whose value is a compressed array; put there by `load`.

    It reads as the compressed array, which `nmjax.matmul` takes and which names its
    leaf where it is used as a dense array. In layers of Flax that can compute with
    nothing else it reads as the dense array.

    Positions are integers and have no gradient: differentiate with respect to
    `dense_params`, or train a `FanInDense` or `NMDense`.
    """

    def get_value(self, *, index: Any = ...) -> Any:
        """Give the array to compute with."""
        value: Any = super().get_value()
        metadata = self.get_metadata()
        if is_compressed(value):
            if metadata.get("reads_dense", False):
                value = value.todense()
            else:
                origin = metadata.get("origin", Origin("?", "a model"))
                value = guarded(value, origin.path, origin.holder)
        return value if index is ... else value[index]


def is_parameter(variable: Any) -> bool:
    """Tell whether a variable is an `nnx.Param`, and of no other subclass of it."""
    return type(variable) in (nnx.Param, CompressedParam)


def dense_params(path: Any, variable: Any) -> bool:
    """Tell whether a variable is a parameter that is not compressed: a filter.

    Args:
      path: path of the variable, which is not looked at.
      variable: a variable, or what stands for one in a filter.

    Returns:
      True for dense params. Use it as ``nnx.DiffState(0, dense_params)`` or
      ``nnx.Optimizer(model, tx, wrt=dense_params)``.

    Example:
      >>> import nmjax as nm
      >>> from flax import nnx
      >>> model = nnx.Linear(4, 8, rngs=nnx.Rngs(0))
      >>> plan = nm.plan(nnx.state(model), nm.NM(2, 4))
      >>> nnx.update(model, nm.project(nnx.state(model), plan))
      >>> model = nm.nnx.compress(model, plan)
      >>> list(nnx.state(model, nm.nnx.dense_params))
      ['bias']
    """
    is_any, is_small = map(nnx.filterlib.to_predicate, (nnx.Param, CompressedParam))
    return is_any(path, variable) and not is_small(path, variable)
