"""Clients of compressed weights: models that know nothing of nmjax, and a server."""

import ast
import concurrent.futures
import http.client
import importlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nmjax as nm
from nmjax import formats
from nmjax import linen as nm_linen
from nmjax.paths import named_leaves

EXAMPLES = pathlib.Path(__file__).resolve().parent.parent / "examples"
if str(EXAMPLES) not in sys.path:
    sys.path.insert(0, str(EXAMPLES))
checkpoints = importlib.import_module("checkpoints")
client_data = importlib.import_module("client_data")
clients = importlib.import_module("clients")
compress = importlib.import_module("compress")
multi30k = importlib.import_module("multi30k")
serve = importlib.import_module("serve")
serving = importlib.import_module("serving")
translation = importlib.import_module("translation")

SENTENCES = multi30k.made_up_dates("train", 60)
VOCABULARY = multi30k.learn_vocabulary([*SENTENCES[0], *SENTENCES[1]], 100).to_str()
IMAGES = {"image": [8, 8, 1], "classes": 10, "mean": [5.0], "deviation": [6.0]}
FACTS = {
    "cnn": {**IMAGES, "width": 8, "shift": 1, "flip": False},
    "vit": {**IMAGES, "width": 16, "heads": 2, "layers": 1, "patch": 4},
    "translator": {
        "vocabulary": VOCABULARY,
        "longest": 24,
        "width": 16,
        "heads": 2,
        "layers": 1,
        "dropout": 0.1,
    },
}


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Compile with few optimisations: that is where these tests spend their time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def items_of(model, count=4):
    if model == "translator":
        return SENTENCES[0][:count]
    return list(np.random.default_rng(0).integers(0, 17, (count, 8, 8, 1), np.uint8))


def copied(variables, abstract):
    """Put the weights of a linen model into the structure of its twin in nnx."""

    def name(path):
        path = path.replace("batch_stats/", "")
        path = re.sub(r"(layers|coder)_(\d)", r"\1/\2", path)
        if "decoder" in path:
            path = path.replace("LayerNorm_1", "cross_norm")
        for linen, nnx in (("0", "norm1"), ("1", "norm2"), ("2", "norm2")):
            path = path.replace(f"LayerNorm_{linen}", nnx)
        return path

    found = {name(path): leaf for path, leaf in named_leaves(variables)[0]}
    wanted, treedef = named_leaves(abstract)
    assert {path for path, _ in wanted} == found.keys()
    return jax.tree.unflatten(treedef, [found[path] for path, _ in wanted])


@pytest.fixture(scope="module", params=FACTS)
def twins(request):
    """Clients of one model in both libraries, with the same weights."""
    model = request.param
    built, variables = {}, None
    for library in clients.LIBRARIES:
        client = clients.build({**FACTS[model], "model": model, "library": library})
        if variables is None:
            init = jax.jit(client.network.init)
            variables = clients.Variables(*init(jax.random.key(0)))
            # Larger weights, so that answers differ between inputs.
            variables = jax.tree.map(lambda leaf: 1.5 * leaf, variables)
        else:
            shapes = jax.eval_shape(client.network.init, jax.random.key(0))
            variables = copied(variables, clients.Variables(*shapes))
        built[library] = client, variables
    return built


# Models -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linen_models", "nnx_models"])
def test_models_import_nothing_of_nmjax(name):
    tree = ast.parse((EXAMPLES / f"{name}.py").read_text())
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    assert imported and not any("nmjax" in module for module in imported)


def sparse_and_small(client, variables, pattern):
    """Return sparse variables of a client, and the same compressed."""
    plan = nm.plan(variables.params, pattern, skip=client.dense)
    project = jax.jit(lambda params: nm.project(params, plan))
    sparse = variables._replace(params=project(variables.params))
    return sparse, sparse._replace(params=nm.compress(sparse.params, plan))


def test_twins_and_their_compressed_weights_compute_the_same(twins):
    patterns = {"linen": nm.NM(2, 4), "nnx": nm.FanIn(density=0.25)}
    kinds = {"linen": formats.NMArray, "nnx": formats.FanInArray}
    found = {}
    for library, (client, variables) in twins.items():
        items = items_of(client.facts["model"])
        inputs = client.inputs(items, len(items))
        logits = jax.jit(client.logits)
        found[library] = logits(variables, inputs)
        if client.facts["model"] == "cnn":  # compressed by other tests
            continue
        sparse, small = sparse_and_small(client, variables, patterns[library])
        compressed = compressed_leaves(small)
        assert {type(leaf) for leaf in compressed} == {kinds[library]}
        assert len(compressed) >= 4
        expected = logits(sparse, inputs)
        largest = jnp.abs(expected).max()
        assert jnp.abs(logits(small, inputs) - expected).max() <= 1e-5 * largest
        assert jnp.abs(found[library] - expected).max() > 0.01 * largest
    np.testing.assert_allclose(found["nnx"], found["linen"], rtol=1e-4, atol=1e-4)


def compressed_leaves(tree):
    leaves = jax.tree.leaves(tree, is_leaf=formats.is_compressed)
    return [leaf for leaf in leaves if formats.is_compressed(leaf)]


@pytest.fixture(scope="module")
def translators(tmp_path_factory):
    """A linen translator, its sparse and compressed variables, and their folder."""
    client = clients.build(
        {**FACTS["translator"], "model": "translator", "library": "linen"}
    )
    return client, *saved(client, tmp_path_factory.mktemp("translator"))


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory):
    """An nnx classifier, its sparse and compressed variables, and their folder."""
    client = clients.build({**FACTS["cnn"], "model": "cnn", "library": "nnx"})
    return client, *saved(client, tmp_path_factory.mktemp("cnn"))


def saved(client, folder):
    variables = clients.Variables(*jax.jit(client.network.init)(jax.random.key(0)))
    # Larger weights, so that answers differ between inputs.
    variables = jax.tree.map(lambda leaf: 2.0 * leaf, variables)
    sparse, small = sparse_and_small(client, variables, nm.NM(2, 4))
    items = items_of(client.facts["model"], 5)
    clients.save(folder, client, sparse, small, items)
    return sparse, small, folder


def test_unmodified_search_takes_compressed_weights(translators):
    client, sparse, small, _ = translators
    names = ("width", "heads", "layers", "dropout")
    pieces = client.vocabulary.get_vocab_size()
    sizes = {name: client.facts[name] for name in names}
    model = translation.Translator(pieces, **sizes)
    source = client.inputs(items_of("translator"), 4)
    expected = translation.search(model, sparse.params, source, length=24)
    with nm_linen.intercept():
        found = translation.search(model, small.params, source, length=24)
    np.testing.assert_array_equal(found, expected)
    assert len({tuple(row) for row in np.asarray(found).tolist()}) > 1
    # and the example's own greedy decoding is the same
    np.testing.assert_array_equal(jax.jit(client.answer)(small, source), expected)


# Checkpoints ------------------------------------------------------------------------


def assert_same_tree(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("which", ["translators", "classifiers"])
def test_checkpoints_come_back_without_a_template(which, request):
    _, sparse, small, folder = request.getfixturevalue(which)
    client, samples = clients.load(folder)
    assert_same_tree(clients.load_variables(folder / "dense", client), sparse)
    assert_same_tree(clients.load_variables(folder / "compressed", client), small)
    items = items_of(client.facts["model"], 5)
    np.testing.assert_array_equal(np.asarray(samples), np.asarray(items))


def test_checkpoint_of_dicts_needs_nothing_but_the_folder(tmp_path):
    weights = np.where(np.arange(64).reshape(16, 4) % 8 < 4, 1.5, 0.0)
    dense = {"a": {"kernel": jnp.asarray(weights, "bfloat16"), "bias": jnp.arange(4)}}
    plan = nm.plan(dense, {"a/kernel": nm.FanIn(density=0.5)})
    small = nm.compress(dense, plan)
    checkpoints.save(tmp_path / "x", dense)
    checkpoints.save(tmp_path / "x", small)  # replaces
    assert_same_tree(checkpoints.load(tmp_path / "x"), small)
    assert checkpoints.size(tmp_path / "x") > small["a"]["kernel"].nbytes
    for like, message in (
        ({"a": {"kernel": dense["a"]["kernel"]}}, "more leaves: a/bias"),
        ({"a": {**dense["a"], "c": jnp.ones(1)}}, "'a/c' is not in the checkpoint"),
        (
            {"a": {**dense["a"], "kernel": jnp.ones((4, 4), "bfloat16")}},
            r"'a/kernel' .* shape \(16, 4\), not \(4, 4\)",
        ),
        (
            {"a": {**dense["a"], "kernel": jnp.ones((16, 4))}},
            "'a/kernel' .* dtype bfloat16, not float32",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            checkpoints.load(tmp_path / "x", like=like)


def test_prepared_arrays_are_saved_as_what_they_were_made_from(tmp_path):
    weights = jnp.arange(1.0, 65.0).reshape(8, 8).astype(jnp.bfloat16)
    kept = jnp.where(nm.nm_mask(weights, 2, 4), weights, 0)
    small = {"kernel": formats.NMArray.from_dense(kept, 2, 4)}
    checkpoints.save(tmp_path / "x", nm.prepare(small, "sm90"))
    assert_same_tree(checkpoints.load(tmp_path / "x"), small)
    small = {"kernel": formats.FanInArray.from_dense(jnp.eye(64, 3))}
    ready = nm.prepare(small, "cpu")
    assert isinstance(ready["kernel"], formats.WindowArray)
    checkpoints.save(tmp_path / "y", ready)
    assert_same_tree(checkpoints.load(tmp_path / "y"), small)


def test_missing_checkpoints_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint of"):
        checkpoints.load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no client.json: give the folder"):
        clients.load(tmp_path)


# Training and comparing -------------------------------------------------------------


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """Rows of a smoke run of the script, and its folder."""
    out = tmp_path_factory.mktemp("smoke")
    chosen = ["--model", "cnn", "--library", "linen", "--method", "srste"]
    with jax.numpy_dtype_promotion("standard"):  # `optax.adam` lets a float meet an int
        rows = compress.main(["--smoke", *chosen, "--out", str(out)])
    return rows, out


def test_script_trains_compresses_and_compares(smoke):
    rows, out = smoke
    assert [row["density"] for row in rows] == [0.5]
    assert rows[0]["equal answers %"] == 100.0
    assert rows[0]["difference"] <= compress.TOLERANCE
    assert 0.5 < rows[0]["bytes"] / rows[0]["dense bytes"] < 0.6
    results = json.loads((out / "results.json").read_text())
    assert [time["batch"] for time in results["times"]] == [1, 2]
    for time in results["times"]:
        assert 0 < time["low"] <= time["ratio"] <= time["high"]
        assert min(time["dense per s"], time["compressed per s"]) > 0
    assert (out / "cnn-linen-srste-seed0.png").exists()


def test_srigl_is_compressed_at_its_masks_and_served(tmp_path):
    options = compress.parse(["--smoke", "--density", "0.2"])
    client = clients.build({**FACTS["cnn"], "model": "cnn", "library": "linen"})
    shapes, _ = jax.eval_shape(client.network.init, jax.random.key(0))
    recipe = client_data.make_recipe("srigl", shapes, client.dense, 10, options)

    @jax.jit
    def start(key):
        params, rest = client.network.init(key)
        params = recipe.start(key, params)
        return params, rest, recipe.masks(recipe.optimizer.init(params))

    params, rest, masks = start(jax.random.key(0))
    small = nm.compress(params, recipe.plan, masks=masks)
    found = {leaf.layout for leaf in compressed_leaves(small)}
    assert "fan-in 14 of 72, 16 of 16 neurons" in found
    assert_same_tree(nm.decompress(small), params)
    sparse, items = clients.Variables(params, rest), items_of("cnn", 3)
    clients.save(tmp_path, client, sparse, clients.Variables(small, rest), items)
    one, other = (
        serve.load_engine(tmp_path, False, [3], prepare=prepare)
        for prepare in (False, True)
    )
    assert one(items) == other(items)
    kinds = {type(leaf).__name__ for leaf in compressed_leaves(other.variables.params)}
    assert kinds == {"FanInArray", "WindowArray"}


def test_differing_weights_are_found(classifiers):
    client, sparse, small, _ = classifiers
    answer, items = jax.jit(client.answer), items_of("cnn", 5)

    def agree(factor):
        other = jax.tree.map(lambda leaf: leaf * factor, sparse.params)
        changed = sparse._replace(params=other)
        return compress.agreement(client, answer, changed, small, items)

    same = agree(1.0)
    assert same.equal == 1.0 and same.difference <= 1e-5
    assert agree(-1.0).equal < 1.0
    assert 1e-3 < agree(1.01).difference < 0.2
    compress.check(same)
    with pytest.raises(ValueError, match="answer otherwise to 25.0% of the inputs"):
        compress.check(compress.Agreement(0.75, 0.0))
    with pytest.raises(ValueError, match="differ by 1.01e-04 .* more than 1e-04"):
        compress.check(compress.Agreement(1.0, 1.01e-4))


def test_timings_alternate():
    calls = []
    names = ["a", "b"]
    functions = {name: lambda name=name: calls.append(name) for name in names}
    seconds = compress.interleaved(functions, rounds=3, target=0.0)
    assert calls[-6:] == ["a", "b"] * 3
    assert [len(seconds[name]) for name in names] == [3, 3]


# Serving ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(classifiers):
    client, _, small, _ = classifiers
    return serving.Engine(client, small, sizes=(4, 1))


@pytest.fixture(scope="module")
def server(engine):
    with serving.Server(("127.0.0.1", 0), engine) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_batches_are_filled_up_and_cut(engine, classifiers):
    client, _, small, _ = classifiers
    items = items_of("cnn", 5)
    answers = engine(items)
    expected = jax.jit(client.answer)(small, client.inputs(items, 5)).tolist()
    assert answers == expected
    assert engine([]) == []
    lines = engine.table().splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["1", "4"]


def test_meter_tells_median_and_tail():
    meter = serving.Meter()
    for milliseconds in range(1, 101):
        meter.add(milliseconds / 1000, units=2)
    assert meter.row("images") == {
        "calls": 100,
        "p50 ms": "50.50",
        "p95 ms": "95.05",
        "images per s": "40",  # 200 in 5.05 seconds
    }


def request(server, method="POST", path="/answer", body=None, headers=None):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    if body is not None and not isinstance(body, bytes):
        body = json.dumps(body).encode()
    connection.request(method, path, body, headers or {})
    response = connection.getresponse()
    content = json.loads(response.read())
    connection.close()
    return response.status, content


def test_http_answers_many_at_once(server, engine):
    items = [image.tolist() for image in items_of("cnn", 12)]
    expected = engine(items)
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda x: request(server, body={"images": [x]}), items))
    assert [status for status, _ in found] == [200] * 12
    assert [content["answers"] for _, content in found] == [[x] for x in expected]
    status, content = request(server, "GET", "/health")
    assert (status, content["model"], content["field"]) == (200, "cnn", "images")
    assert content["requests"] >= 12


BLANK = np.zeros((8, 8), int).tolist()


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"{", 400, "the body is no JSON"),
        (b"\xff\xfe\x00", 400, "the body is no JSON"),
        (b"[" * 100_000, 400, "the body is no JSON"),
        ([BLANK], 400, r'the body must be \{"images"'),
        ({"sentences": ["x"]}, 400, r'the body must be \{"images"'),
        ({"images": []}, 400, "at least one item"),
        ({"images": [BLANK, [1, 2]]}, 400, r"image 1 must have shape \(8, 8, 1\)"),
        ({"images": [[[1], [2, 3]]]}, 400, "image 0 .* no array of numbers"),
        ({"images": ["text"]}, 400, "image 0 .* no array of numbers"),
        ({"images": [[[256] * 8] * 8]}, 400, "image 0 must be integers in 0-255"),
        ({"images": [[[0.5] * 8] * 8]}, 400, "image 0 must be integers in 0-255"),
        (b'{"images": [[[NaN]]]}', 400, "image 0 must have shape"),
    ],
)
def test_malformed_requests_are_refused(server, body, status, message):
    found, content = request(server, body=body)
    assert found == status
    assert re.search(message, content["error"])
    assert request(server, body={"images": [BLANK]})[0] == 200  # it goes on


@pytest.mark.parametrize(
    ("method", "path", "headers", "status", "message"),
    [
        ("POST", "/other", {}, 404, "POST to /answer"),
        ("GET", "/answer", {}, 404, "POST to /answer"),
        ("POST", "/answer", {"Content-Length": "many"}, 411, "Content-Length"),
        ("POST", "/answer", {"Content-Length": "-1"}, 411, "Content-Length"),
        ("POST", "/answer", {"Content-Length": "999999999"}, 413, "more than"),
    ],
)
def test_wrong_requests_are_refused(server, method, path, headers, status, message):
    found, content = request(server, method, path, headers=headers)
    assert (found, message in content["error"]) == (status, True)


def test_server_that_fails_says_so_and_goes_on(server, engine, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_answer", fail)
        status, content = request(server, body={"images": [BLANK]})
    assert (status, content) == (500, {"error": "the server failed; it printed why"})
    assert request(server, body={"images": [BLANK]})[0] == 200
    assert "RuntimeError: out of memory" in capsys.readouterr().err


def test_arguments_are_checked(classifiers, tmp_path, capsys):
    client, *_, folder = classifiers
    with pytest.raises(SystemExit):
        serve.parse(["--sizes", "0"])
    assert "--sizes 0 is no size of a batch" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--input - is for lines of text"):
        serve.read_items(client, "-")
    np.save(tmp_path / "x.npy", np.zeros(3))
    with pytest.raises(ValueError, match="x.npy has no array of images"):
        serve.read_items(client, str(tmp_path / "x.npy"))
    (tmp_path / "client.json").write_text((folder / "client.json").read_text())
    with pytest.raises(FileNotFoundError, match="no compressed weights: .* --dense"):
        serve.load_engine(tmp_path, False, [1])


def test_sentences_are_checked(translators):
    client = translators[0]
    tokens = client.inputs(["", "vom 1. Mai"], 3)
    assert not tokens[0].any() and tokens[1].any() and not tokens[2].any()
    for item in (3, None, ["vom"], "\ud800"):
        with pytest.raises(ValueError, match="sentence 8 must be a text"):
            client.inputs(["vom", item], 2, first=7)
    with pytest.raises(ValueError, match="sentence 0 has more than 23 byte pairs"):
        client.inputs(["vom " * 24], 1)


def test_file_is_answered_and_checked(translators, tmp_path, capsys):
    *_, folder = translators
    lines = [*items_of("translator"), ""]
    (tmp_path / "in.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    files = ["--input", str(tmp_path / "in.txt"), "--output", str(tmp_path / "out.txt")]
    serve.main(["--model", str(folder), *files, "--sizes", "5", "--check"])
    answers = (tmp_path / "out.txt").read_text(encoding="utf-8").split("\n")
    assert len(answers) == 6 and answers[4:] == ["", ""] and all(answers[:4])
    printed = capsys.readouterr()
    assert "5 of 5 answers equal those of the dense weights" in printed.out
    assert "tokens per s" in printed.err


def test_separate_process_serves_until_it_is_stopped(classifiers, engine):
    *_, folder = classifiers
    items = [image.tolist() for image in items_of("cnn", 3)]
    command = [sys.executable, str(EXAMPLES / "serve.py"), "--model", str(folder)]
    process = subprocess.Popen(
        [*command, "--http", "0", "--sizes", "4"],
        env={**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        line = process.stdout.readline()
        port = re.fullmatch(r"serving on http://127.0.0.1:(\d+)/answer\n", line)
        assert port, line + process.stderr.read()

        class There:
            server_port = int(port[1])

        status, content = request(There, body={"images": items})
        process.send_signal(signal.SIGTERM)
        printed, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (status, content["answers"]) == (200, engine(items))
    assert process.returncode == 0, errors
    assert "p95 ms" in printed
