"""What the text examples share: the methods side by side, and what is reported.

``dense`` trains all weights. ``one_shot`` is the dense model, pruned once by magnitude
and not trained again. ``ste`` is sparse from the first step, with straight-through
gradients. ``srste`` is the same with SR-STE's decay of pruned weights.
"""

import argparse
import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import common
import jax

import nmjax as nm

PLACES = {"density": 2, "training s": 0, "flip rate": 4}
METHODS = ("dense", "one_shot", "ste", "srste")


class Trained(NamedTuple):
    """A finished run: the model, its latent weights, their plan, the history."""

    model: Any
    params: Any
    plan: nm.Plan
    history: common.History


class Outcome(NamedTuple):
    """What an evaluation found: numbers by name, and text to look at."""

    scores: Mapping[str, float]
    text: Any


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which methods run, and how SR-STE does."""
    add = parser.add_argument
    add("--method", nargs="+", choices=METHODS, default=list(METHODS))
    add("--decay", type=float, default=2e-4, help="SR-STE's decay of pruned weights")
    add(
        "--mode",
        choices=("coupled", "decoupled"),
        default="coupled",
        help="SR-STE's decay before or after Adam's preconditioner",
    )


def run_config(
    method: str, seed: int, options: argparse.Namespace, names: Sequence[str]
) -> dict[str, Any]:
    """Return all that determines a run, for the check when it is resumed.

    Args:
      method: Name of the method.
      seed: Seed of the run.
      options: The command line.
      names: The options that matter, those of SR-STE aside.

    Returns:
      Name -> value.
    """
    names = [*names, "smoke", *(("decay", "mode") if method == "srste" else ())]
    chosen = {name: getattr(options, name) for name in names}
    data = None if options.data_dir is None else str(options.data_dir.absolute())
    return {"method": method, "seed": seed, "data": data, **chosen}


@functools.partial(jax.jit, static_argnums=0)
def used_params(method: str, params: Any, plan: nm.Plan) -> Any:
    """Return the weights that a model of this method computes with."""
    return params if method == "dense" else nm.sparsify(params, plan)


def compare(
    options: argparse.Namespace,
    train: Callable[[str, int], Trained],
    evaluate: Callable[[Trained, Any, int], Outcome],
    *,
    digits: int,
    note: str,
) -> list[dict[str, Any]]:
    """Train and evaluate every method with every seed; print and save the results.

    Args:
      options: The command line.
      train: ``(method, seed) -> Trained``.
      evaluate: ``(trained, weights, seed) -> Outcome``, ``weights`` being those that
        the model computes with.
      digits: Digits after the point of the scores in the table.
      note: What the scores were measured on, printed below the table.

    Returns:
      One row per method and seed.
    """
    rows, texts, histories = [], {}, {}
    for seed in options.seeds:
        runs: dict[str, Trained] = {}
        for method in options.method:
            # One-shot pruning starts from the dense run, which is made only once.
            base = "dense" if method == "one_shot" else method
            if base not in runs:
                runs[base] = train(base, seed)
                histories[f"{base} seed {seed}"] = runs[base].history
            run = runs[base]
            weights = used_params(method, run.params, run.plan)
            folder = options.out / f"{method}-seed{seed}" / "model"
            common.save_model(folder, weights)
            weights = common.load_model(folder, weights)  # what a user would run
            scores, texts[method] = evaluate(run, weights, seed)
            row = {
                "method": method,
                "seed": seed,
                **scores,
                "density": common.nonzero_fraction(weights, run.plan),
                "training s": run.history["seconds"][-1],
            }
            if method == base:  # pruning once flips nothing
                row["flip rate"] = statistics.fmean(run.history["flip_rate"])
            rows.append(row)
            shown = ", ".join(f"{name} {x:.{digits}f}" for name, x in scores.items())
            print(f"{method} seed {seed}: {shown}", flush=True)
            if len(rows) == 1:
                print(f"\n{run.plan}\n", flush=True)
    for method, text in texts.items():
        print(f"\n--- {method}, seed {options.seeds[-1]} ---\n{text}")
    print("\n" + common.format_table(summarize(rows, digits)))
    print(f"{note}; {common.hardware()}")
    common.write_results(
        options.out, rows, note=note, texts=texts, options=vars(options)
    )
    common.save_plot(options.out / "training.png", histories)
    return rows


def summarize(rows: Sequence[Mapping[str, Any]], digits: int) -> list[dict[str, Any]]:
    """Return one row per method: mean and standard deviation over its seeds."""
    summary = []
    for method in dict.fromkeys(row["method"] for row in rows):
        of = [row for row in rows if row["method"] == method]
        places = {name: digits for name in of[0]} | PLACES
        cells = {
            name: common.mean_std((row[name] for row in of), places[name])
            for name in of[0]
            if name not in ("method", "seed")
        }
        summary.append({"method": method, "seeds": len(of), **cells})
    return summary
