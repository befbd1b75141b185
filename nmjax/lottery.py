"""Lottery tickets: prune what training made small, start again from early values."""

from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from nmjax.masking import global_topk_mask
from nmjax.paths import is_masked, named_leaves
from nmjax.plans import Plan, matching_leaves
from nmjax.projection import apply_masks, keep_all
from nmjax.topology import drop_count, keep_largest, score_active
from nmjax.typing import Masks, Params


def rewind(
    trained: Params,
    early: Params,
    alive: Plan | Masks,
    *,
    prune: float,
    scope: Literal["leaf", "global"] = "leaf",
) -> tuple[Params, Masks]:
    r"""Prune alive weights by magnitude and put the others back to early values.

    One round of iterative magnitude pruning. With :math:`a` alive weights of a leaf,
    the :math:`\lfloor p \, a \rfloor` smallest :math:`|w|` after training die, and

    .. math:: w_i \leftarrow w_i^{(k)} \text{ if } e_i \text{ else } 0

    where :math:`w^{(k)}` are the weights after k steps; k = 0 is the initialisation.
    Train the result with `nm.static(inner, masks)` and rewind again; after r rounds
    a leaf keeps about :math:`(1 - p)^r` of its weights.

    Args:
      trained: params at the end of a training.
      early: params of the same training after its first k steps.
      alive: masks of the round before; in the first round a plan, all weights of whose
        sparse leaves are alive.
      prune: p, fraction of the alive weights that die, in [0, 1].
      scope: ``"leaf"`` prunes the fraction of every leaf, ``"global"`` that of all
        leaves together, which compete by magnitude.

    Returns:
      The rewound params, exactly sparse, and the masks of the weights still alive.
      Leaves without a mask, such as biases, go back to early values too.

    Raises:
      ValueError: `prune` is outside [0, 1], `scope` is another word, or the trees
        differ in their leaves.

    Example:
      >>> import jax.numpy as jnp
      >>> import nmjax as nm
      >>> early = {"kernel": jnp.full((2, 2), 0.5)}
      >>> trained = {"kernel": jnp.array([[3.0, -1.0], [2.0, 4.0]])}
      >>> plan = nm.plan(early, nm.Unstructured(density=1.0))
      >>> params, masks = nm.rewind(trained, early, plan, prune=0.25)
      >>> params["kernel"].tolist()
      [[0.5, 0.0], [0.5, 0.5]]

    Reference:
      Frankle and Carbin, "The Lottery Ticket Hypothesis: Finding Sparse, Trainable
      Neural Networks", 2019, arXiv 1803.03635. Rewinding to step k: Frankle,
      Dziugaite, Roy and Carbin, "Linear Mode Connectivity and the Lottery Ticket
      Hypothesis", 2020, arXiv 1912.05671.
    """
    if not 0 <= prune <= 1:
        raise ValueError(f"prune={prune!r} is a fraction and must be in [0, 1]")
    if scope not in ("leaf", "global"):
        raise ValueError(f"scope={scope!r} must be 'leaf' or 'global'")
    if isinstance(alive, Plan):
        alive = keep_all(trained, alive)
    pairs, treedef = named_leaves(trained)
    masks = dict(zip((p for p, _ in pairs), matching_leaves(pairs, alive), strict=True))
    held = {
        path: (weights, masks[path])
        for path, weights in pairs
        if not is_masked(masks[path])
    }
    if scope == "global":
        kept = _keep_largest_of_all(held, prune)
    else:
        kept = {path: keep_largest(w, e, prune)[0] for path, (w, e) in held.items()}
    new = jax.tree.unflatten(
        treedef, [kept.get(p, optax.MaskedNode()) for p, _ in pairs]
    )
    return apply_masks(early, new), new


def _keep_largest_of_all(
    held: dict[str, tuple[Array, Array]], prune: float
) -> dict[str, Array]:
    """Keep the largest alive weights of all leaves together."""
    counts = [jnp.sum(mask, dtype=jnp.int32) for _, mask in held.values()]
    total = jnp.sum(jnp.stack(counts), dtype=jnp.int32)
    scores = {path: score_active(w, mask) for path, (w, mask) in held.items()}
    return global_topk_mask(scores, total - drop_count(total, prune))
