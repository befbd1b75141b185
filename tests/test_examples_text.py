import contextlib
import functools
import importlib
import io
import itertools
import json
import pathlib
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nmjax as nm

EXAMPLES = pathlib.Path(__file__).resolve().parent.parent / "examples"
if str(EXAMPLES) not in sys.path:
    sys.path.insert(0, str(EXAMPLES))
char_lm = importlib.import_module("char_lm")
common = importlib.import_module("common")
methods = importlib.import_module("methods")
multi30k = importlib.import_module("multi30k")
translation = importlib.import_module("translation")

METHODS = ["dense", "one_shot", "srste"]


class Interrupted(Exception):
    """Stands for whatever stops a training in the middle."""


# The bias correction of `optax.adam` lets a float meet an int.
trains = functools.partial(jax.numpy_dtype_promotion, "standard")


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Compile with few optimisations: that is where these tests spend their time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


class Smoke(NamedTuple):
    """A smoke run of an example: its trainer, rows, folder and printed text."""

    trainer: Any
    rows: list[dict[str, Any]]
    out: pathlib.Path
    printed: str


def smoke_run(example, out):
    """Run an example's main, keeping its trainer so that no test compiles it again."""
    kept = []

    def keep(*args):
        kept.append(example_trainer(*args))
        return kept[0]

    example_trainer = example.Trainer
    arguments = ["--smoke", "--out", str(out), "--method", *METHODS]
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, trains():
        patch.setattr(example, "Trainer", keep)
        with contextlib.redirect_stdout(printed):
            rows = example.main(arguments)
    return Smoke(kept[0], rows, out, printed.getvalue())


def assert_same_bits(tree, other):
    leaves, others = jax.tree.leaves(tree), jax.tree.leaves(other)
    assert len(leaves) == len(others) > 0
    for leaf, o in zip(leaves, others, strict=True):
        assert np.asarray(leaf).tobytes() == np.asarray(o).tobytes()


def check_resumed_equals_uninterrupted(smoke, tmp_path, monkeypatch):
    """Stop a training at step 6, resume it from step 4, compare with the smoke run."""
    trainer, train = smoke.trainer, common.train

    def stopping_train(step, state, batch_at, **kwargs):
        def batch_or_stop(index):
            if index == 6:
                raise Interrupted
            return batch_at(index)

        return train(step, state, batch_or_stop, **kwargs)

    checkpoints = tmp_path / "srste-seed0" / "checkpoints"
    monkeypatch.setattr(trainer.options, "out", tmp_path)
    with trains(), monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(common, "train", stopping_train)
        trainer("srste", 0)
    assert [path.name for path in checkpoints.iterdir()] == ["4"]
    monkeypatch.setattr(trainer.options, "resume", True)
    with trains():
        resumed = trainer("srste", 0)
        like = trainer.start("srste")(jnp.uint32(0))

    states = []
    for folder in (smoke.out / "srste-seed0" / "checkpoints", checkpoints):
        with common.Checkpoints(folder) as found:
            step, state, history = found.restore(like)
        assert step == 8
        states.append(state)
        del history["seconds"]
        states.append(history)
    assert_same_bits(states[0], states[2])  # parameters, optimizer, tracker
    assert_same_bits(resumed.params, states[0]["params"])
    assert states[1] == states[3] and states[1]["step"] == [2, 4, 6, 8]
    # Training did something, so equal bits are not those of the initialisation.
    assert not np.array_equal(*(jax.tree.leaves(s)[-1] for s in (like, states[0])))


def check_results(smoke):
    dense, one_shot, srste = smoke.rows
    assert [row["method"] for row in smoke.rows] == METHODS
    assert [row["density"] for row in smoke.rows] == [1.0, 0.5, 0.5]
    score = list(dense)[2]  # after method and seed
    assert len({row[score] for row in smoke.rows}) == 3 or score == "BLEU"
    assert one_shot["training s"] == dense["training s"]  # one run, pruned afterwards
    assert not (smoke.out / "one_shot-seed0" / "checkpoints").exists()
    assert "flip rate" not in one_shot and srste["flip rate"] > 0
    results = json.loads((smoke.out / "results.json").read_text())
    assert results["rows"] == smoke.rows
    assert (smoke.out / "training.png").stat().st_size > 10_000
    assert "2:4 along -3" in smoke.printed
    assert "| srste    | 1     |" in smoke.printed
    with common.Checkpoints(smoke.out / "srste-seed0" / "checkpoints") as found:
        like = smoke.trainer.start("srste")(jnp.uint32(0))
        _, _, history = found.restore(like)
    sparse = smoke.trainer.plan.sparse_leaves
    assert history["density"] == [0.5] * 4
    assert all(history[f"density/{leaf.path}"] == [0.5] * 4 for leaf in sparse)
    assert max(history["flip_rate"]) > 0


# Character model --------------------------------------------------------------------


@pytest.fixture(scope="module")
def char_smoke(tmp_path_factory):
    return smoke_run(char_lm, tmp_path_factory.mktemp("char_lm"))


@pytest.fixture(scope="module")
def char_model(char_smoke):
    """The graph of the small model, its parameters and its text."""
    run = char_smoke.trainer
    params = run.start("dense")(jnp.uint32(0))["params"]
    return run.graph, params, run.text


def test_char_lm_smoke_compares_methods(char_smoke):
    check_results(char_smoke)


def test_char_lm_resumes_bit_for_bit(char_smoke, tmp_path, monkeypatch):
    check_resumed_equals_uninterrupted(char_smoke, tmp_path, monkeypatch)


def test_char_lm_prunes_projections_along_their_inputs(char_smoke):
    sparse = {
        leaf.path: leaf.pattern.axis for leaf in char_smoke.trainer.plan.sparse_leaves
    }
    assert sparse == {
        "blocks/0/attention/query/kernel": -3,
        "blocks/0/attention/key/kernel": -3,
        "blocks/0/attention/value/kernel": -3,
        "blocks/0/attention/out/kernel": -2,
        "blocks/0/up/kernel": -2,
        "blocks/0/down/kernel": -2,
    }


def test_char_lm_sees_no_later_character(char_model):
    graph, params, text = char_model
    window = np.arange(17, dtype=np.int32)[None] % 5
    changed = window.copy()
    changed[0, 9:] = 7
    nll = jax.jit(char_lm.nll, static_argnums=0)
    before, after = nll(graph, params, window), nll(graph, params, changed)
    np.testing.assert_array_equal(before[0, :8], after[0, :8])
    assert not np.array_equal(before[0, 9:], after[0, 9:])


def test_bits_per_character_of_uniform_guess(char_model):
    graph, params, text = char_model
    zeros = jax.tree.map(jnp.zeros_like, params)
    # 5 windows of 16 and a rest, so the last batch of 2 is cut short
    bits = char_lm.bits_per_character(graph, zeros, text.valid[:90], 16, batch=2)
    assert bits == pytest.approx(np.log2(len(text.characters)), rel=1e-6)


def test_sample_without_temperature_takes_the_likeliest(char_model):
    graph, params, text = char_model
    prompt = text.valid[:16]
    added = char_lm.sample(
        graph, params, prompt, jax.random.key(0), length=5, temperature=1e-6
    )
    logits_of = jax.jit(lambda window: char_lm.nnx.merge(graph, params)(window[None]))
    window = list(prompt)
    for _ in range(5):
        window.append(int(jnp.argmax(logits_of(jnp.array(window[-16:]))[0, -1])))
    assert added.tolist() == window[16:]


def test_windows_of_a_step_are_runs_of_the_text():
    numbers = np.arange(50, dtype=np.int32)
    first = char_lm.windows_at(numbers, 1, 2, batch=200, context=9)
    assert first.shape == (200, 10)
    np.testing.assert_array_equal(np.diff(first), 1)
    assert first.min() == 0 and first.max() == 49  # both ends are reached
    np.testing.assert_array_equal(first, char_lm.windows_at(numbers, 1, 2, 200, 9))
    assert not np.array_equal(first, char_lm.windows_at(numbers, 1, 3, 200, 9))
    assert not np.array_equal(first, char_lm.windows_at(numbers, 2, 2, 200, 9))


@pytest.mark.parametrize("place", ["tinyshakespeare/input.txt", "input.txt"])
def test_read_text_finds_the_file(tmp_path, place):
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text("abc")
    assert char_lm.read_text(tmp_path) == "abc"


def test_read_text_without_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither tinyshakespeare/input.txt"):
        char_lm.read_text(tmp_path)


def test_default_text_is_long_enough():
    assert len(char_lm.read_text(None)) > 200_000


# Translation ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def translation_smoke(tmp_path_factory):
    return smoke_run(translation, tmp_path_factory.mktemp("translation"))


@pytest.fixture(scope="module")
def tiny():
    """A model with six words, and weights large enough to tell them apart."""
    model = translation.Translator(6, width=8, heads=2, layers=1, dropout=0.0)
    blank = jnp.ones((1, 4), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(1), blank, blank)["params"]
    return model, jax.tree.map(lambda leaf: 2.0 * leaf, params)


@pytest.fixture(scope="module")
def logits_of(tiny):
    model, params = tiny
    return jax.jit(lambda source, words: model.apply({"params": params}, source, words))


def test_translation_smoke_compares_methods(translation_smoke):
    check_results(translation_smoke)


def test_translation_resumes_bit_for_bit(translation_smoke, tmp_path, monkeypatch):
    check_resumed_equals_uninterrupted(translation_smoke, tmp_path, monkeypatch)


def test_translation_prunes_projections_along_their_inputs(translation_smoke):
    plan = translation_smoke.trainer.plan
    sparse = {leaf.path: leaf.pattern.axis for leaf in plan.sparse_leaves}
    assert len(sparse) == 6 + 10  # one layer of the encoder, one of the decoder
    assert sparse["decoder_0/cross_attention/query/kernel"] == -3
    assert sparse["decoder_0/cross_attention/out/kernel"] == -2
    assert not any("embedding" in path for path in sparse)


def test_padding_and_later_words_change_nothing(logits_of):
    source = jnp.array([[4, 5, 3, 2, 0, 0]])
    target = jnp.array([[1, 4, 4, 5, 3, 2]])
    logits = logits_of(source, target)
    # row 1 of a batch is padding only, as in the last batch of a bucket
    both = logits_of(
        jnp.pad(source, ((0, 1), (0, 2))), jnp.pad(target, ((0, 1), (0, 0)))
    )
    np.testing.assert_allclose(both[0], logits[0], rtol=1e-5, atol=1e-5)
    assert jnp.isfinite(both).all()
    changed = logits_of(source, target.at[0, 3:].set(3))
    np.testing.assert_allclose(changed[0, :3], logits[0, :3], rtol=1e-5, atol=1e-5)
    assert not np.allclose(changed[0, 3:], logits[0, 3:], atol=1e-3)


def test_greedy_search_takes_the_likeliest_word_each_time(tiny, logits_of):
    model, params = tiny
    source = jnp.array([[4, 5, 3, 2], [5, 2, 0, 0], [3, 3, 4, 2]], jnp.int32)
    found = translation.search(model, params, source, length=6)
    for row, tokens in zip(source, found.tolist(), strict=True):
        wanted = [multi30k.BOS]
        while len(wanted) < 7 and wanted[-1] != multi30k.EOS:
            padded = jnp.array([wanted + [multi30k.PAD] * (7 - len(wanted))])
            logits = np.asarray(logits_of(row[None], padded))[0, len(wanted) - 1]
            wanted.append(1 + int(np.argmax(logits[1:])))  # never PAD
        wanted += [multi30k.PAD] * (7 - len(wanted))
        assert tokens == wanted[1:]


def test_wide_beam_search_finds_the_best_of_all_sentences(tiny, logits_of):
    model, params = tiny
    source = jnp.array([[4, 5, 3, 2]], jnp.int32)
    length = 3
    # every sentence: words but PAD, up to EOS or the length
    words = [1, 3, 4, 5]
    sentences = [
        [*start, 2]
        for n in range(length)
        for start in itertools.product(words, repeat=n)
    ]
    sentences += [list(s) for s in itertools.product(words, repeat=length)]
    padded = multi30k.pad(sentences, len(sentences), length)
    inputs = np.pad(padded[:, :-1], ((0, 0), (1, 0)), constant_values=multi30k.BOS)
    sources = jnp.repeat(source, len(sentences), 0)
    logits = logits_of(sources, jnp.array(inputs))
    log_p = np.asarray(jax.nn.log_softmax(logits))
    log_p = np.take_along_axis(log_p, padded[..., None], -1)[..., 0]
    scores = np.where(padded > 0, log_p, 0).sum(1) / (padded > 0).sum(1)
    found = translation.search(model, params, source, length=length, beams=100)
    assert found[0].tolist() == padded[np.argmax(scores)].tolist()


def test_token_losses_are_those_of_smoothed_labels():
    logits = jax.random.normal(jax.random.key(0), (2, 3, 5))
    target = jnp.array([[3, 2, 0], [4, 1, 2]])
    total, count = translation.token_losses(logits, target, 0.1)
    labels = optax.smooth_labels(jax.nn.one_hot(target, 5), 0.1)
    losses = optax.softmax_cross_entropy(logits, labels)
    assert count == 5
    np.testing.assert_allclose(total, losses.sum() - losses[0, 2], rtol=1e-6)


def test_shifted_target_starts_with_bos():
    shifted = translation.shifted(jnp.array([[5, 4, 2], [3, 2, 0]]))
    assert shifted.tolist() == [[1, 5, 4], [1, 3, 2]]


@pytest.fixture(scope="module")
def pairs():
    rng = np.random.default_rng(0)
    sides = [
        [[i + 4] * int(n) for i, n in enumerate(rng.integers(1, 30, 100))]
        for _ in range(2)
    ]
    return multi30k.Pairs([], [], *sides)


def test_an_epoch_has_every_pair_once(pairs):
    batches = multi30k.Batches(pairs, tokens=128, seed=0)
    seen = []
    for step in range(batches.per_epoch):
        source, target = batches(step)
        assert source.shape == target.shape
        assert source.shape[1] % 8 == 0 and source.size <= 128
        np.testing.assert_array_equal(source[:, 0], target[:, 0])  # pairs stay pairs
        seen += [int(first) - 4 for first in source[:, 0] if first]
        for row in source[source[:, 0] > 0]:
            assert (row > 0).sum() == len(pairs.source_ids[row[0] - 4])
    assert sorted(seen) == list(range(100))


def test_batches_depend_on_seed_and_step_alone(pairs):
    batches = multi30k.Batches(pairs, tokens=128, seed=0)
    late = batches(batches.per_epoch + 3)
    again = multi30k.Batches(pairs, tokens=128, seed=0)(batches.per_epoch + 3)
    assert_same_bits(late, again)
    orders = [
        [batch(step)[0].tobytes() for step in range(batches.per_epoch)]
        for batch in (batches, multi30k.Batches(pairs, tokens=128, seed=1))
    ]
    assert orders[0] != orders[1]
    second = range(batches.per_epoch, 2 * batches.per_epoch)
    assert orders[0] != [batches(step)[0].tobytes() for step in second]


def test_vocabulary_gives_the_sentence_back():
    lines = ["Zwei junge Männer sind im Freien.", "Two young men, outside!"]
    vocabulary = multi30k.learn_vocabulary(lines, 80)
    for line, ids in zip(lines, multi30k.encode(vocabulary, lines, 99), strict=True):
        assert ids[-1] == multi30k.EOS
        assert vocabulary.decode([*ids, multi30k.PAD]) == line
    cut = multi30k.encode(vocabulary, lines, 5)
    assert [len(ids) for ids in cut] == [5, 5] and cut[0][-1] == multi30k.EOS
    special = ["[PAD]", "[BOS]", "[EOS]", "[UNK]"]
    assert [vocabulary.token_to_id(s) for s in special] == [0, 1, 2, 3]


def write_corpus(root, english):
    root.mkdir()
    for name in ("train", "val", "test_2016_flickr"):
        (root / f"{name}.de").write_text("Ein Haus\nEine Katze\n", encoding="utf-8")
        (root / f"{name}.en").write_text(english, encoding="utf-8")


def test_read_task_reads_all_splits(tmp_path):
    write_corpus(tmp_path / "multi30k", "A house\nA cat\n")
    task = multi30k.read_task(tmp_path, 60, 20)
    assert task.test.source == ["Ein Haus", "Eine Katze"]
    assert task.train.target == ["A house", "A cat"]
    assert task == multi30k.read_task(tmp_path / "multi30k", 60, 20)._replace(
        vocabulary=task.vocabulary
    )


def test_read_task_with_unequal_sides(tmp_path):
    write_corpus(tmp_path / "multi30k", "A house\n")
    with pytest.raises(ValueError, match="2 German, 1 English"):
        multi30k.read_task(tmp_path, 60, 20)


def test_read_task_without_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train\.de is missing"):
        multi30k.read_task(tmp_path, 60, 20)


# Methods ----------------------------------------------------------------------------


@pytest.mark.parametrize("example", [char_lm, translation])
@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_srste_pulls_pruned_weights_only(example, mode):
    options = example.parse(["--mode", mode, "--decay", "0.5"])
    params = {"kernel": jnp.tile(jnp.arange(1.0, 5.0)[:, None], (1, 8))}
    plan = nm.plan(params, nm.NM(2, 4))
    options.steps, options.weight_decay = 100, 0.0
    args = (100,) if example is translation else ()
    tx = example.make_optimizer("srste", plan, *args, options)
    grads = jax.tree.map(jnp.zeros_like, params)
    with trains():  # twice, because the first step has a learning rate of 0
        _, state = tx.update(grads, tx.init(params), params)
        updates, state = tx.update(grads, state, params)
    assert (updates["kernel"][:2] < 0).all()
    assert (updates["kernel"][2:] == 0).all()


def test_used_params_are_sparse_unless_dense():
    params = {"kernel": jnp.tile(jnp.arange(1.0, 5.0)[:, None], (1, 8))}
    plan = nm.plan(params, nm.NM(2, 4))
    assert methods.used_params("dense", params, plan)["kernel"].tolist() == (
        params["kernel"].tolist()
    )
    for method in ("one_shot", "ste", "srste"):
        used = methods.used_params(method, params, plan)
        assert used["kernel"][:, 0].tolist() == [0.0, 0.0, 3.0, 4.0]
