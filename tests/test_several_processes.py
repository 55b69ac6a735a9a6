import os
import pathlib
import socket
import subprocess
import sys

import pytest

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
