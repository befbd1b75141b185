"""Compile for GPUs that are not there.

XLA compiles for a described device as it does for a present one, up to the machine code
that `ptxas` makes. Needs the extra `gpu-compile`.
"""

import atexit
import concurrent.futures
import functools
import multiprocessing
import os
import pathlib
import re
from typing import NamedTuple

import jax
import pytest
from jax import export
from jax.experimental import topologies
from jax.experimental.pallas import mosaic_gpu as plgpu

needs_compiler = pytest.mark.compiler
"""Skips a test where the extra is not installed, see `conftest.py`."""

interpreted = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"),
    reason="the interpreter of GPU kernels came with jax 0.11",
)

_DESCRIPTION = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared_core}
  shared_memory_per_block_optin: {shared_block}
  threads_per_core_limit: 2048
  core_count: {cores}
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  memory_bandwidth: {bandwidth}
  l2_cache_size: {cache}
  clock_rate_ghz: {clock}
  device_memory_size: {memory}
  cuda_compute_capability {{ major: {major} minor: 0 {features} }}
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{name}"
"""
_ACCELERATED = "feature_extension: ACCELERATED_FEATURES"
_FACTS = {
    "sm80": {
        "name": "NVIDIA A100-SXM4-80GB", "major": 8, "features": "", "cores": 108,
        "shared_core": 167936, "shared_block": 166912, "clock": 1.41,
        "bandwidth": 2039040000000, "cache": 41943040, "memory": 85100068864,
    },
    "sm90": {
        "name": "NVIDIA H200", "major": 9, "features": _ACCELERATED, "cores": 132,
        "shared_core": 233472, "shared_block": 232448, "clock": 1.98,
        "bandwidth": 4800000000000, "cache": 52428800, "memory": 151397597184,
    },
    "sm100": {
        "name": "NVIDIA B200", "major": 10, "features": _ACCELERATED, "cores": 148,
        "shared_core": 233472, "shared_block": 232448, "clock": 1.965,
        "bandwidth": 7672320000000, "cache": 132644864, "memory": 191514411008,
    },
}  # fmt: skip


def devices(target, count=1):
    """Describe GPUs of one machine."""
    return topologies.get_topology_desc(
        platform="cuda",
        topology_name=target,
        target_config=_DESCRIPTION.format(**_FACTS[target]),
        topology=f"1x1x{count}",
    )


class Kernel(NamedTuple):
    """A compiled Mosaic GPU kernel.

    `ptx` is what was given to the assembler, `log` what that said of registers,
    spills and instructions it had to serialize.
    """

    ptx: str
    log: str

    @property
    def spilled_bytes(self):
        found = re.findall(r"(\d+) bytes spill (?:stores|loads)", self.log)
        assert found, self.log
        return sum(map(int, found))

    @property
    def instructions(self):
        """Count the matrix instructions by name."""
        names = re.findall(r"\b((?:wgmma|mma|tcgen05)\.[\w.:]+)", self.ptx)
        return {name: names.count(name) for name in set(names)}


def compile_kernels(function, *args, target, folder, monkeypatch):
    """Compile a function for one GPU; give its Mosaic GPU kernels.

    args are arrays or their shapes and dtypes. A kernel that this process has compiled
    before is not compiled again, and missing here.
    """
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), args)
    folder = pathlib.Path(folder)
    if target == "sm90":
        with monkeypatch.context() as patch:
            for name, value in _settings(folder).items():
                patch.setenv(name, value)
            _compile(jax.jit(function), shapes, target)
    else:
        # Which instructions Mosaic emits follows the device it finds, and here is none.
        from jax.experimental.mosaic.gpu import utils

        with monkeypatch.context() as patch:
            version = _FACTS[target]["major"], 0
            patch.setattr(utils, "_infer_arch", lambda: version)
            allowed = export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")
            program = export.export(
                jax.jit(function), platforms=["cuda"], disabled_checks=[allowed]
            )(*shapes)
        serialized = bytes(program.serialize())
        _process_for(target).submit(_compile_there, serialized, target, folder).result()
    return [
        Kernel(ptx.read_text(), ptx.with_suffix(".ptxas").read_text())
        for ptx in sorted(folder.glob("*.ptx"))
    ]


def _settings(folder):
    return {
        "MOSAIC_GPU_DUMP_TO": str(folder),
        "MOSAIC_GPU_DUMP_PTX": "1",
        "MOSAIC_GPU_DUMP_PTXAS": "1",
    }


def _compile(function, shapes, target):
    sharding = jax.sharding.SingleDeviceSharding(devices(target).devices[0])
    placed = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), shapes
    )
    function.lower(*placed).compile({"xla_gpu_autotune_level": "0"})


@functools.cache
def _process_for(target):
    """Give a process of its own to a GPU: one process assembles for one kind only."""
    del target
    spawn = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(1, spawn)
    atexit.register(pool.shutdown)
    return pool


def _compile_there(serialized, target, folder):
    """Compile a program in the process for its GPU."""
    os.environ.update(_settings(folder))
    program = export.deserialize(bytearray(serialized))
    shapes, _ = jax.tree.unflatten(program.in_tree, program.in_avals)
    _compile(jax.jit(program.call), shapes, target)
