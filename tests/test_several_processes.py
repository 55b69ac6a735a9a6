import os
import pathlib
import socket
import subprocess
import sys

import pytest

ONE_DEVICE = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}


@pytest.mark.slow
def test_a_cache_over_several_processes_is_written_and_read_outside_jit():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.several_processes", str(port), str(number)],
            cwd=pathlib.Path(__file__).parents[1],
            env=os.environ | ONE_DEVICE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(2)
    ]
    outputs = [process.communicate()[0] for process in processes]
    for number, output in enumerate(outputs):
        assert f"right {number}" in output, output[-2000:]
