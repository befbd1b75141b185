"""The training examples: their shared loop, and CIFAR-10.

Examples are scripts, not modules of the package: `example` loads one by its file name.
"""

import contextlib
import functools
import importlib
import io
import os
import pathlib
import pickle
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nmjax as nm

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


def example(name):
    """Import ``examples/<name>.py`` as a script would: its folder is on the path."""
    if str(EXAMPLES) not in sys.path:
        sys.path.append(str(EXAMPLES))
    return importlib.import_module(name)


common = example("common")
cifar10 = example("cifar10")
image_options = example("image_options")
image_steps = example("image_steps")
images = example("images")
recipes = example("recipes")
resnets = example("resnets")


def assert_same_bits(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


# The shared loop --------------------------------------------------------------------


@jax.jit
def toy_step(state, batch):
    weights = 0.9 * state["weights"] + batch
    return {"weights": weights, "flag": ~state["flag"]}, {"loss": weights.sum()}


def toy_state():
    return {"weights": jnp.ones(3), "flag": jnp.array(True)}


def toy_train(run_dir, steps, **keywords):
    config = {"rate": 0.9, **keywords.pop("config", {})}
    settings = {"save_every": 4, "log_every": 2, "config": config} | keywords
    return common.train(
        toy_step, toy_state(), jnp.float32, steps=steps, run_dir=run_dir, **settings
    )


def test_history_has_one_entry_per_window(tmp_path):
    losses, state = [], toy_state()
    for i in range(5):
        state, metrics = toy_step(state, jnp.float32(i))
        losses.append(float(metrics["loss"]))
    trained, history = toy_train(tmp_path, 5)
    assert history["step"] == [2, 4, 5]
    windows = [losses[:2], losses[2:4], losses[4:]]
    np.testing.assert_allclose(history["loss"], [np.mean(w) for w in windows])
    assert_same_bits(trained, state)


def test_history_that_grows_while_it_is_saved_is_not_saved(tmp_path, monkeypatch):
    history = {"step": [2, 4], "loss": [0.5, 0.25]}
    with common.Checkpoints(tmp_path) as checkpoints:
        write = checkpoints._manager.save

        def write_late(step, args):  # as the background thread of orbax may
            history["step"].append(6)
            write(step, args=args)

        monkeypatch.setattr(checkpoints._manager, "save", write_late)
        checkpoints.save(4, toy_state(), history)
    with common.Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(toy_state())[2]["step"] == [2, 4]


def test_finished_run_is_not_trained_again_on_resume(tmp_path, monkeypatch):
    trained, history = toy_train(tmp_path, 6)
    monkeypatch.setattr(sys.modules[__name__], "toy_step", None)
    resumed, again = toy_train(tmp_path, 6, resume=True)
    assert_same_bits(resumed, trained)
    assert again == history


def test_without_resume_a_run_starts_afresh(tmp_path):
    toy_train(tmp_path, 6)
    trained, history = toy_train(tmp_path, 4)
    assert history["step"] == [2, 4]
    with common.Checkpoints(tmp_path / "checkpoints") as checkpoints:
        step, state, _ = checkpoints.restore(toy_state())
    assert step == 4
    assert_same_bits(state, trained)


def test_resume_with_other_settings_is_an_error(tmp_path):
    toy_train(tmp_path, 2)
    with pytest.raises(ValueError, match=r"started with rate=0.9, now rate=0.5"):
        toy_train(tmp_path, 2, resume=True, config={"rate": 0.5})


def test_loss_that_is_not_finite_is_an_error(tmp_path):
    with pytest.raises(FloatingPointError, match="loss is nan in the steps up to 2"):
        common.train(
            lambda state, _: (state, {"loss": jnp.float32(np.nan)}),
            toy_state(),
            lambda _: None,
            steps=4,
            run_dir=tmp_path,
            config={},
            log_every=2,
        )


def test_epoch_visits_every_example_once():
    steps = [common.batch_indices(7, step, 12, 4) for step in range(6)]
    first, second = np.concatenate(steps[:3]), np.concatenate(steps[3:])
    assert sorted(first) == sorted(second) == list(range(12))
    assert first.tolist() != second.tolist()
    assert common.batch_indices(8, 0, 12, 4).tolist() != steps[0].tolist()


def test_batch_larger_than_the_data_is_an_error():
    with pytest.raises(ValueError, match="batch_size=5 is larger .* 4 examples"):
        common.batch_indices(0, 0, 4, 5)


def test_mean_std_is_the_sample_deviation():
    assert common.mean_std([1.0, 2.0, 3.0]) == "2.00 +- 1.00"
    assert common.mean_std([1.5], digits=1) == "1.5"


# Data of CIFAR-10 -------------------------------------------------------------------


@pytest.fixture(scope="module")
def batches():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (6, 4, 3072), dtype=np.uint8)
    return pixels, rng.integers(0, 10, (6, 4))


def write_binary(folder, batches):
    folder.mkdir(parents=True)
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    for name, pixels, labels in zip(names, *batches, strict=True):
        records = np.concatenate([labels[:, None].astype(np.uint8), pixels], axis=1)
        (folder / name).write_bytes(records.tobytes())


def write_pickles(folder, batches):
    folder.mkdir(parents=True)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for name, pixels, labels in zip(names, *batches, strict=True):
        batch = {b"data": pixels, b"labels": labels.tolist(), b"batch_label": b"x"}
        # The official files are of protocol 2 and name numpy.core, as NumPy 1 did.
        data = pickle.dumps(batch, protocol=2).replace(b"numpy._core", b"numpy.core")
        (folder / name).write_bytes(data)


def test_both_official_formats_give_the_same_images(tmp_path, batches):
    write_binary(tmp_path / "a" / "cifar-10-batches-bin", batches)
    write_pickles(tmp_path / "b" / "cifar-10-batches-py", batches)
    binary = images.load_cifar10(tmp_path / "a")
    python = images.load_cifar10(tmp_path / "b" / "cifar-10-batches-py")
    pixels, labels = batches
    assert binary.images.shape == (20, 32, 32, 3)
    # Channels come first in a record: pixel (row 1, column 2) of green.
    assert binary.images[4, 1, 2, 1] == pixels[1, 0, 1024 + 32 + 2]
    assert binary.test_labels.tolist() == labels[5].tolist()
    for a, b in zip(binary, python, strict=True):
        np.testing.assert_array_equal(a, b)


def test_truncated_binary_file_is_an_error(tmp_path, batches):
    write_binary(tmp_path / "x", batches)
    path = tmp_path / "x" / "data_batch_3.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="data_batch_3.bin has 12291 bytes"):
        images.load_cifar10(tmp_path / "x")


def test_missing_data_is_an_error_that_says_what_to_fetch(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="(?s)data_batch_1.bin .*cs.toronto.edu"
    ):
        images.load_cifar10(tmp_path)


def test_pickle_that_would_run_code_is_refused(tmp_path):
    path = tmp_path / "data_batch_1"
    path.write_bytes(pickle.dumps({b"data": os.system}))
    with pytest.raises(pickle.UnpicklingError, match="does not belong"):
        images.read_pickle(path)


def test_digits_are_split_once_and_for_all():
    data = images.load_digits()
    assert data.images.shape == (1257, 8, 8, 1)
    assert data.test_images.shape == (540, 8, 8, 1)
    pairs = {x.tobytes() for x in data.images} & {x.tobytes() for x in data.test_images}
    assert not pairs
    assert np.bincount(data.labels).min() > 100


def test_augment_shifts_and_mirrors_every_image():
    originals = np.arange(1, 1 + 64 * 4 * 5 * 2).reshape(64, 4, 5, 2)
    key = jax.random.key(0)
    moved = images.augment(jnp.asarray(originals), key, pad=2, flip=True)
    padded = np.pad(originals, [(0, 0), (2, 2), (2, 2), (0, 0)])
    seen = set()
    for image, result in zip(padded, np.asarray(moved), strict=True):
        found = [
            (top, left, mirror)
            for top in range(5)
            for left in range(5)
            for mirror in (1, -1)
            if (image[top : top + 4, left : left + 5][:, ::mirror] == result).all()
        ]
        assert len(found) == 1
        seen.add(found[0])
    assert len({place[:2] for place in seen}) > 15  # of 25
    assert {place[2] for place in seen} == {1, -1}


def test_digits_are_shifted_but_not_mirrored():
    data = images.load_digits()
    assert (data.pad, data.flip) == (1, False)
    x = jnp.asarray(data.images[:4])
    assert (images.augment(x, jax.random.key(0), pad=0, flip=False) == x).all()


# Models of CIFAR-10 -----------------------------------------------------------------


def abstract_params(name, width):
    model = resnets.MODELS[name][1](width)
    blank = jnp.zeros((1, 32, 32, 3))
    init = functools.partial(model.init, train=False)
    return jax.eval_shape(init, jax.random.key(0), blank)["params"]


@pytest.mark.parametrize(
    ("name", "width", "expected"),
    [("resnet18", 64, 11_173_962), ("wrn22-2", 16, 1_079_642)],
)
def test_models_have_the_published_number_of_parameters(name, width, expected):
    leaves = jax.tree.leaves(abstract_params(name, width))
    assert sum(leaf.size for leaf in leaves) == expected


def test_plan_leaves_stem_and_head_dense():
    plan = nm.plan(abstract_params("resnet18", 16), nm.NM(2, 4), skip="head")
    dense = {p.path for p in plan.leaves if p.path.endswith("kernel")} - {
        p.path for p in plan.sparse_leaves
    }
    assert dense == {"stem/kernel", "head/kernel"}
    assert len(plan.sparse_leaves) == 19  # 16 convolutions in blocks, 3 shortcuts


def test_pattern_option_says_what_it_wants(capsys):
    with pytest.raises(SystemExit):
        cifar10.parse(["--pattern", "4:2"])
    assert "'4:2' is no pattern N:M" in capsys.readouterr().err


# The script -------------------------------------------------------------------------


def test_batch_larger_than_the_subset_is_an_error():
    with pytest.raises(ValueError, match="64 images in batches of 100 have no step"):
        cifar10.main(["--smoke", "--batch-size", "100"])


METHODS = ["dense", "one_shot", "ste", "srste"]


def run_of(method, sparsity=None):
    return image_options.Run(method, sparsity)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """Run the script once: its trainer, rows and printed text."""
    kept = []

    class Kept(cifar10.Trainer):
        def __init__(self, *args):
            super().__init__(*args)
            kept.append(self)

    out = tmp_path_factory.mktemp("smoke")
    arguments = ["--smoke", "--epochs", "3", "--out", str(out), "--method", *METHODS]
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(cifar10, "Trainer", Kept)
        rows = cifar10.main(arguments)
    return kept[0], rows, printed.getvalue()


def test_script_trains_saves_and_reloads_every_method(smoke):
    trainer, rows, printed = smoke
    assert [row["method"] for row in rows] == METHODS
    assert [row["density"] for row in rows] == [1.0, 0.5, 0.5, 0.5]
    assert [row["sparsity"] for row in rows] == [None] * 4
    for row in rows:
        assert row["reloaded"] == row["accuracy"]
    assert rows[1]["as_trained"] == rows[0]["accuracy"]
    out = trainer.settings.out
    assert not (out / "one_shot-seed0" / "checkpoints").exists()
    files = {path.name for path in out.iterdir()}
    assert files >= {"results.json", "training.png", "srste-seed0.png"}
    assert "| srste    | 1     | 0.50    |" in printed


def test_saved_network_is_exactly_sparse(smoke):
    trainer, _, _ = smoke
    like = trainer.initialise(0)
    model = common.load_model(trainer.settings.out / "srste-seed0" / "model", like)
    for leaf in trainer.recipe(run_of("srste")).plan.sparse_leaves:
        kernel = functools.reduce(
            lambda x, k: x[k], leaf.path.split("/"), model["params"]
        )
        groups = np.moveaxis(np.asarray(kernel), -2, -1).reshape(-1, 4)
        assert (np.count_nonzero(groups, axis=1) == 2).all()


def test_dense_run_logs_flips_but_no_density(smoke, monkeypatch):
    trainer, _, _ = smoke
    monkeypatch.setattr(trainer.settings, "resume", True)
    _, dense = trainer.train(run_of("dense"), 0)
    _, srste = trainer.train(run_of("srste"), 0)
    assert "flip_rate" in dense and "density" not in dense
    assert set(srste["density"]) == {0.5}
    assert srste["step"] == list(range(2, 26, 2))


def test_killed_run_resumes_to_the_same_bits(smoke, tmp_path, monkeypatch):
    trainer, _, _ = smoke
    monkeypatch.setattr(trainer.settings, "resume", True)
    whole, whole_history = trainer.train(
        run_of("srste"), 0
    )  # as its last checkpoint has it

    # Step 12 has just begun to be saved when the process is killed.
    script = textwrap.dedent(
        """
        import os, signal, sys
        import cifar10

        class Trainer(cifar10.Trainer):
            def batch_at(self, seed, step):
                if step == 12:
                    os.kill(os.getpid(), signal.SIGKILL)
                return super().batch_at(seed, step)

        cifar10.Trainer = Trainer
        cifar10.main(sys.argv[1:])
        """
    )
    arguments = ["--smoke", "--epochs", "3", "--out", str(tmp_path)]
    command = [sys.executable, "-c", script, *arguments, "--method", "srste"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(EXAMPLES),
        "JAX_NUM_CPU_DEVICES": str(jax.device_count()),
    }
    killed = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    with common.Checkpoints(tmp_path / "srste-seed0" / "checkpoints") as checkpoints:
        step, *_ = checkpoints.restore(whole)
    assert step in (8, 12)

    monkeypatch.setattr(trainer.settings, "out", tmp_path)
    resumed, history = trainer.train(run_of("srste"), 0)
    assert_same_bits(resumed, whole)
    assert history["step"] == whole_history["step"]
    assert history["loss"] == whole_history["loss"]
    assert history["flip_rate"] == whole_history["flip_rate"]


# Methods that hold masks ------------------------------------------------------------


@pytest.fixture(scope="module")
def small_trainer(tmp_path_factory):
    out = str(tmp_path_factory.mktemp("held"))
    settings = cifar10.parse(["--smoke", "--out", out])
    return cifar10.Trainer(image_options.load(settings), settings)


HELD = [run_of(method, 50.0) for method in recipes.FREE]
HELD += [run_of("retrain"), run_of("progressive")]


@pytest.mark.parametrize("run", HELD, ids=lambda run: run.method)
def test_held_methods_start_sparse_and_their_step_traces(small_trainer, run):
    trainer = small_trainer
    recipe = trainer.recipe(run)
    variables = trainer.initialise(0)
    params = recipe.start(common.key_for(0, 2), variables["params"])
    opt_state = recipe.optimizer.init(params)
    masks = recipe.masks(opt_state)
    for leaf, mask in zip(recipe.plan.leaves, tree_leaves(masks), strict=True):
        assert leaf.is_sparse == (not isinstance(mask, optax.MaskedNode))
    starts_sparse = run.method in ("static", "set", "rigl", "srigl", "srigl_noablation")
    share = common.nonzero_fraction(params, recipe.plan)
    assert share == pytest.approx(0.5 if starts_sparse else 1.0, abs=0.02)
    tracked = image_steps.make_tracker(recipe).init(params, masks)
    state = cifar10.State(params, variables["batch_stats"], opt_state, tracked)
    out, metrics = jax.eval_shape(trainer.step(run), state, trainer.batch_at(0, 0))
    assert jax.tree.structure(out) == jax.tree.structure(state)
    assert {"loss", "density", "flip_rate", "itop", "active_neurons"} <= metrics.keys()


def tree_leaves(tree):
    return jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, optax.MaskedNode))


def test_script_finds_tickets_and_resumes(tmp_path, capsys):
    arguments = ["--smoke", "--out", str(tmp_path), "--method", "lottery"]
    [row] = cifar10.main([*arguments, "--sparsity", "36"])
    assert row["density"] == pytest.approx(0.64, abs=2e-3)
    assert row["reloaded"] == row["accuracy"]
    assert row["active_neurons"] == 100
    folders = {path.name for path in (tmp_path / "lottery-36-seed0").iterdir()}
    assert folders >= {"early", "round0", "round1", "round2", "model"}
    assert (tmp_path / "sparsity.png").stat().st_size > 0
    assert "| lottery-36 | 1     | 0.64    |" in capsys.readouterr().out

    settings = cifar10.parse([*arguments, "--sparsity", "36", "--resume"])
    trainer = cifar10.Trainer(image_options.load(settings), settings)
    state, history = trainer.train(run_of("lottery", 36.0), 0)
    assert history["seconds"][-1] == row["train_seconds"]
    assert trainer.report(run_of("lottery", 36.0), 0, state) == {
        name: row[name] for name in row if name not in ("flip_rate", "train_seconds")
    }


def test_published_recipes_are_the_defaults():
    free = cifar10.parse(["--data-dir", "x", "--method", "dense", "rigl"])
    assert (free.model, free.epochs, free.batch_size) == ("resnet18", 250, 128)
    assert (free.schedule, free.lr, free.delta_t) == ("steps", 0.1, 100)
    assert (free.drop_fraction, free.weight_decay) == (0.3, 5e-4)
    structured = cifar10.parse(["--data-dir", "x", "--method", "dense", "srste"])
    assert (structured.epochs, structured.schedule) == (200, "cosine")


def test_the_learning_rate_falls_in_steps():
    settings = cifar10.parse(["--data-dir", "x", "--method", "rigl"])
    settings.weight_decay = 0.0
    ones = jnp.ones(1)
    rates = []
    for first in (0, 76, 77, 154, 231, 249):
        tx = cifar10.make_sgd(settings, 250, 1, first)
        updates, _ = tx.update(ones, tx.init(ones), ones)
        rates.append(-float(updates[0]) / 1.9)  # Nesterov's first step
    np.testing.assert_allclose(
        rates, [0.1, 0.1, 0.02, 0.004, 0.0008, 0.0008], rtol=1e-5
    )


def test_pooled_images_are_means_of_squares():
    data = images.load_digits()
    small = images.pool(data, 2)
    assert small.images.shape == (1257, 4, 4, 1)
    square = data.images[3, 2:4, 4:6, 0].astype(float)
    assert small.images[3, 1, 2, 0] == np.round(square.mean())
    with pytest.raises(ValueError, match="squares of 3 pixels do not tile .* 8x8"):
        images.pool(data, 3)


def test_sparsity_option_says_what_it_wants(capsys):
    with pytest.raises(SystemExit):
        cifar10.parse(["--sparsity", "100"])
    assert "100 is no sparsity in per cent" in capsys.readouterr().err
