"""A step compiled for GPUs that are not there; see `compile.py` for what that takes."""

import importlib.util
import json
import pathlib
import re
import subprocess
import sys

import jax
import pytest

ROOT = pathlib.Path(__file__).parents[2]

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("jax_plugins") is None
        or importlib.util.find_spec("jax_plugins.xla_cuda13") is None,
        reason="the wheels jax-cuda13-pjrt and jax-cuda13-plugin are not installed",
    ),
    pytest.mark.skipif(
        jax.__version_info__ < (0, 11), reason="jax 0.11 compiles for a GPU without one"
    ),
]


def compiled_for(device):
    """A line of facts a program, and what the assembler said of each kernel."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.gpu.compile", device],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    programs = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert len(programs) == 20
    by_cudnn = [program for program in programs if program["by"] == "cudnn"]
    for program in by_cudnn:
        assert program["problem"] is None, program
        # Queries and outputs of eight chunks; and of codes one layer in 16 bits.
        assert program["temp of a layer"] < (0.7 if "bfloat16" in program["program"] else 3)
    assert len(by_cudnn) == 6
    decoding = [program for program in programs if program["by"] != "cudnn"]
    return decoding, run.stdout + run.stderr


def test_on_a_hopper_gpu_nothing_is_copied_and_no_register_spills():
    programs, output = compiled_for("NVIDIA H200")
    for program in programs:
        assert program["problem"] is None, program
        # What parts of a context leave, whatever its length; of a layer of codes that is more.
        of_numbers = "bfloat16" in program["program"] and "ring" not in program["program"]
        assert program["temp of a layer"] < (0.02 if of_numbers else 0.15)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", output)
    assert len(spills) >= len(programs)
    assert set(spills) == {("0", "0")}
    # More than 128, and fewer than four blocks fit on a multiprocessor: codes in small pages, and
    # those with centres, of which three do.
    registers = sorted(map(int, re.findall(r"Used (\d+) registers", output)))
    assert len(registers) == len(programs)
    assert registers[-5] <= 128
    assert registers[-1] <= 168


def test_on_an_ampere_gpu_the_cache_is_not_copied():
    for program in compiled_for("NVIDIA A100")[0]:
        if "rotated" in program["program"]:  # XLA decodes the layer first
            continue
        assert program["problem"] is None, program
        # Pages are gathered into keys and values in float32; runs are summed where they are.
        most = 4.5 if "pages" in program["program"] else 1.1
        assert program["temp of a layer"] < most, program
