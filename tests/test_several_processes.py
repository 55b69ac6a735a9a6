import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

import jaxkv
from jaxkv.snapshot import inspect
from tests.snapshot.test_snapshot import with_random_bits

pytestmark = pytest.mark.slow


def run(module, *arguments, processes=2, devices=1):
    """Start processes that find each other, and wait until each has said that it is right."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = f"--xla_force_host_platform_device_count={devices}"
    started = [
        subprocess.Popen(
            [sys.executable, "-m", module, str(port), str(number), *arguments],
            cwd=pathlib.Path(__file__).parents[1],
            env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(processes)
    ]
    for number, process in enumerate(started):
        output = process.communicate()[0]
        assert f"right {number}" in output, output[-2000:]


def test_a_cache_over_several_processes_is_written_and_read_outside_jit():
    run("tests.several_processes")


@pytest.mark.parametrize(
    ("axis", "processes", "devices"),
    [("heads", 2, 1), ("batch", 2, 1), ("context", 2, 4), ("context", 4, 2)],
)
def test_a_mesh_over_several_processes_answers_as_one_device(axis, processes, devices):
    run("tests.mesh_process", str(processes), axis, processes=processes, devices=devices)


@pytest.mark.parametrize(("processes", "devices"), [(2, 1), (2, 4), (4, 2)])
def test_each_process_saves_and_loads_what_its_devices_hold(tmp_path, processes, devices):
    config = jaxkv.KVCacheConfig(2, 16, 8, 4, batch_size=4, codec=jaxkv.Int8())
    one = with_random_bits(jaxkv.create(config), np.array([7, 3, 5, 1], np.int32), None)
    jaxkv.save(one, tmp_path / "one")
    arguments = str(processes), str(tmp_path)
    run("tests.snapshot_process", *arguments, processes=processes, devices=devices)
    os.rename(
        tmp_path / "away", inspect(tmp_path / "first.kv").parts.path(tmp_path / "first.kv", 1)
    )
    for file in ("first.kv", "second.kv"):  # on one device again
        jaxkv.save(jaxkv.load(tmp_path / file), tmp_path / "again")
        assert (tmp_path / "again").read_bytes() == (tmp_path / "one").read_bytes()
