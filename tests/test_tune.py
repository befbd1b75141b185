"""Tiles are chosen by what was measured, and written for the kernels to follow."""

import argparse
import dataclasses
import json

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from nmjax.kernels import rotation, trials, tune
from nmjax.kernels.gpu import tiling
from nmjax.kernels.gpu.tiles import Tiles
from nmjax.kernels.trials import Product


def times(**of):
    """A measurement in which tiles that differ from the default take given times."""

    def measure(product, tiles):
        return [of.get(f"t{i}", of.get("rest", 9.0)) for i in range(len(tiles))]

    return measure


SOME = Product("bfloat16", 4096, 4096, 4096)


# Choosing ---------------------------------------------------------------------------


def test_fastest_tiles_are_chosen():
    entry = tune.choose(SOME, times(t0=2e-6, t2=1e-6, rest=3e-6))
    assert Tiles(**entry["tiles"]) == SOME.candidates[2]
    assert (entry["us"], entry["default_us"]) == (1.0, 2.0)
    assert entry["measured"] == len(SOME.candidates)


def test_default_stays_unless_others_save_more_than_the_margin():
    nearly = 1 - tune.MARGIN / 2
    assert tune.choose(SOME, times(t0=1.0, t1=nearly))["us"] == 1e6
    assert tune.choose(SOME, times(t0=1.0, t1=0.9))["us"] == 9e5


def test_tiles_that_do_not_run_are_not_chosen():
    entry = tune.choose(SOME, times(t0="wrong by 1", t1=2e-6, rest="no memory"))
    assert Tiles(**entry["tiles"]) == SOME.candidates[1]
    assert entry["default_us"] is None and entry["measured"] == 1
    assert tune.choose(SOME, times(rest="no memory")) == "no memory"


def test_products_that_share_an_entry_are_measured_once():
    told, asked = [], []

    def measure(product, tiles):
        asked.append(product.rows)
        return [1e-6] * len(tiles)

    rows = (1, 8, 5, 16)
    products = [Product("bfloat16", 4096, 4096, r) for r in rows]
    entries = tune.tune(products, measure, lambda *now: told.append(now))
    assert asked == [1, 16] and [e["rows"] for e in entries] == [8, 16]
    assert [now[:2] for now in told] == [(0, 2), (1, 2), (1, 2), (2, 2)]


def test_chosen_tiles_are_those_that_kernels_take(monkeypatch, tmp_path):
    product = Product("int8-weights", 4096, 14336, 3)
    entry = tune.choose(product, times(t0=2.0, t1=1.0))
    tune.write(tmp_path / "tiles.json", {"device": "H100", "entries": [entry]})
    monkeypatch.setattr(tiling.importlib.resources, "files", lambda _: tmp_path)
    tiling.table.cache_clear()
    try:
        chosen = tiling.choose("hopper_weight_only", jnp.int8, 4096, 14336, 7)
        other = tiling.choose("hopper_weight_only", jnp.int8, 4096, 14336, 9)
    finally:
        tiling.table.cache_clear()
    assert chosen == product.candidates[1]
    assert other == tiling.default("hopper_weight_only", jnp.int8, 4096, 14336, 9)


# The table --------------------------------------------------------------------------


def entry_of(rows, us):
    keys = {"kernel": "hopper", "dtype": "int8", "features": 128, "inputs": 128}
    return keys | {"rows": rows, "us": us}


def test_new_entries_replace_old_ones_of_the_same_device():
    old = {"device": "H100", "entries": [entry_of(8, 1.0), entry_of(16, 2.0)]}
    head = {"device": "H100", "date": "today"}
    found = tune.merge(old, head, [entry_of(16, 3.0), entry_of(4, 4.0)])
    assert [(e["rows"], e["us"]) for e in found["entries"]] == [(4, 4), (8, 1), (16, 3)]
    assert found["date"] == "today"
    other = tune.merge(old, {"device": "H200"}, [entry_of(16, 3.0)])
    assert [e["rows"] for e in other["entries"]] == [16]


@pytest.mark.parametrize("entries", [[], [entry_of(8, 1.0), entry_of(16, 2.0)]])
def test_written_table_is_read_again(tmp_path, entries):
    table = {"device": "H100", "versions": {"jax": "1"}, "entries": entries}
    tune.write(tmp_path / "tiles.json", table)
    assert tune.read(tmp_path / "tiles.json") == table
    assert list(tmp_path.iterdir()) == [tmp_path / "tiles.json"]
    assert tune.read(tmp_path / "none.json") == {"entries": []}


# The command ------------------------------------------------------------------------


def test_command_refuses_where_there_is_no_gpu(tmp_path, capsys):
    assert tune.main(["--out", str(tmp_path / "tiles.json")]) == 2
    assert "GPU of the Hopper generation" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_command_writes_what_was_measured(tmp_path, capsys):
    file = tmp_path / "tiles.json"
    command = ["--shapes", "256x512x3", "128x128x100", "--dtypes", "bfloat16", "int8"]
    assert tune.main([*command, "--out", str(file)], times(t0=1e-6)) == 0
    table = json.loads(file.read_text())
    assert table["versions"]["jax"] == jax.__version__
    assert table["device"] == jax.devices()[0].device_kind and table["date"]
    keys = [(e["kernel"], e["dtype"], e["rows"]) for e in table["entries"]]
    assert keys == [
        ("hopper", "bfloat16", 128),
        ("hopper", "int8", 128),
        ("hopper_decode", "bfloat16", 8),
        ("hopper_decode", "int8", 8),
    ]
    printed = capsys.readouterr()
    assert "[########################] 2/2" in printed.err
    assert "int8: 2 of 2 shapes" in printed.out


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("4096x4096", "is not outputs x inputs x rows"),
        ("axbxc", "is not outputs x inputs x rows"),
        ("100x128x1", "multiples of 128"),
        ("128x128x0", "rows at least 1"),
    ],
)
def test_shapes_that_make_no_sense_are_refused(text, why):
    with pytest.raises(argparse.ArgumentTypeError, match=why):
        tune.parse_shape(text)


# Trials -----------------------------------------------------------------------------


def test_products_name_their_kernel():
    assert Product("bfloat16", 128, 128, 64).kind == "hopper_decode"
    assert Product("bfloat16", 128, 128, 65).kind == "hopper"
    assert Product("int8-weights", 128, 128, 1).kind == "hopper_weight_only"
    assert str(Product("float8_e5m2", 128, 128, 1).result_dtype) == "bfloat16"
    with pytest.raises(ValueError, match="dtype='float32' is none of bfloat16"):
        Product("float32", 128, 128, 1)


@pytest.mark.parametrize("dtype", trials.DTYPES)
def test_drawn_weights_are_2_of_4_in_all_six_ways(dtype):
    small, x = trials.draw(jax.random.key(0), Product(dtype, 64, 64, 3))
    groups = np.asarray(small.positions).reshape(-1, 2)
    assert {tuple(pair) for pair in groups.tolist()} == {
        (a, b) for b in range(4) for a in range(b)
    }
    assert x.shape == (3, 64) and small.dtype == x.dtype
    assert np.unique(np.asarray(small.values, np.float32)).size > 20
    ready = trials.prepare(small)
    np.testing.assert_array_equal(ready.canonical.codes, small.codes)


@pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"), reason="no interpreter of GPU kernels"
)
def test_trial_multiplies_with_the_weights():
    product = Product("int8-weights", 128, 128, 3)
    small, x = trials.draw(jax.random.key(0), product)
    multiply = trials.multiplier(product, interpret=plgpu.InterpretGPUParams())
    found = multiply(trials.prepare(small), x)
    assert found.dtype == product.result_dtype
    expected = trials.by_dense(small, x, product)
    assert trials.difference(found, expected) < 1e-2


def test_difference_is_relative_and_never_small_with_nan():
    ones = jnp.ones(4)
    assert trials.difference(1.5 * ones, ones) == 0.5
    assert np.isnan(trials.difference(ones * jnp.nan, ones))
    integers = jnp.arange(4)
    assert trials.difference(integers.at[0].set(7), integers) == 0.25


# Rotation ---------------------------------------------------------------------------


def test_program_makes_every_call():
    calls = []

    def function(x):
        jax.debug.callback(lambda value: calls.append(float(value)), x[0])
        return x

    sets = [(jnp.full(2, i, jnp.float32),) for i in range(3)]
    program = rotation.Program(function, sets, passes=2)
    jax.effects_barrier()
    assert sorted(calls) == [0, 0, 1, 1, 2, 2] and program.calls == 6
    assert program.run().tolist() == [0, 1, 2, 0, 1, 2]
    assert program.seconds(3) > 0 and 0 < program.host <= 1


def test_sets_exceed_the_cache_and_passes_fill_time():
    assert rotation.sets_for(1e6) * 1e6 < 3 * rotation.CACHE  # as many as there may be
    assert rotation.sets_for(20e6) * 20e6 >= 3 * rotation.CACHE
    sets = rotation.sets_for(SOME.least_bytes)
    assert rotation.passes_for(SOME.operations, SOME.least_bytes, sets) * sets < 10
    assert rotation.passes_for(1, 1, 32) * 32 <= rotation.CALLS


def test_program_without_some_products_is_refused():
    text = "%a = f32[2] custom-call(%x)\n %b = f32[2] fusion(%x)"
    rotation.check_calls(text, 2)
    with pytest.raises(RuntimeError, match="2 operations for 3 products"):
        rotation.check_calls(text, 3)


def test_programs_are_timed_in_turn():
    order = []

    @dataclasses.dataclass
    class Fake(rotation.Program):
        name: str
        calls: int = 2

        def seconds(self, repeats=1):
            order.append((self.name, repeats))
            return 0.25

    fakes = [Fake("a"), "no", Fake("b")]
    assert trials.measure_in_turn(fakes, 2, 0.5) == [0.125, "no", 0.125]
    assert order == [("a", 1), ("b", 1), *[("a", 2), ("b", 2)] * 2]
