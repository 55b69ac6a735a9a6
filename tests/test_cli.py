import json
import os
import subprocess
import sys

import jax
import pytest

from jaxkv.cli.compiled import keep_compiled
from jaxkv.cli.main import COMMANDS, main


@pytest.fixture
def run(capsys):
    def run_line(line):
        try:
            status = main(line.split())
        except SystemExit as stop:  # argparse
            status = stop.code
        output = capsys.readouterr()
        return status, output.out, output.err

    return run_line


def test_does_not_fit(run):
    status, out, err = run("plan Llama-3-8B --context 32k --batch 8 --device 24GB --weights 0B")
    assert (status, err) == (1, "")
    assert "34.4 GB (34,359,738,400 bytes)" in out
    assert "no, 10.4 GB too large" in out
    assert "22,888 tokens a sequence, or 5 sequences" in out


def test_over_devices_beside_the_weights(run):
    line = "plan llama-3-70b --context 32k --batch 64 --devices 8 --device 80GB --tensor 8"
    status, out, _ = run(line)
    facts = dict(line.split("  ", 1) for line in out.splitlines() if "  " in line)
    assert status == 1
    assert facts["spread over"].strip() == "8 devices; bytes are those of each"
    assert "64 sequences x 32768 tokens x 80 layers x 8 KV heads x 128" in facts["KV cache"]
    assert "85.9 GB (85,899,346,176 bytes)" in facts["needs"]
    assert "17.6 GB (17,638,426,624 bytes)" in facts["weights"]  # 70,553,706,496 x 2 over 8
    assert facts["fits"].strip() == "no, 23.5 GB too large; the weights leave 62.4 GB"
    left = 80 * 10**9 - 17_638_426_624
    assert f"{(left // 64 - 4) // (2 * 80 * 128 * 2):,} tokens a sequence" in facts["at most"]
    assert f"or {left // (2 * 80 * 128 * 2 * 32_768 + 4)} sequences" in facts["at most"]
    assert json.loads(run(f"{line} --json")[1])["weights_bytes"] == 17_638_426_624


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ("--devices 8", "8 KV heads x 128, bfloat16"),
        ("--devices 8 --sequence 4", "8 devices"),
        ("--data 2 --tensor 4", "8 devices"),
        ("--devices 8 --tensor 2 --sequence 2", "8 devices"),
    ],
)
def test_devices_that_are_not_named_share_heads_and_then_sequences(run, options, sizes):
    status, out, _ = run(f"plan Llama-3-8B --context 8k --batch 4 --device H100 {options}")
    assert status == 0
    assert sizes in out
    assert "copies" not in out


def test_fits_as_json(run):
    status, out, _ = run("plan qwen/qwen2.5-0.5b --device 24GiB --codec float32 --json")
    answer = json.loads(out)
    assert status == 0
    assert answer["needed_bytes"] == 4 * 2 * 24 * 4096 * 2 * 64 + 4
    assert answer["memory"]["limit_bytes"] == 24 * 2**30
    assert answer["config"]["codec"] == "float32"
    assert answer["config"]["batch_size"] is None


@pytest.mark.parametrize("name", [".", "config.json"])
def test_a_folder_or_its_config(run, tmp_path, name):
    config = {"num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 64}
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_key_value_heads": 2}))
    status, out, _ = run(f"plan {tmp_path / name} --context 100 --device 1MB")
    assert status == 0
    assert "100 tokens x 3 layers x 2 KV heads x 16, bfloat16" in out
    assert "The weights are not counted: jaxkv does not know them." in out


def test_without_a_size_this_machines_device_is_asked(run, monkeypatch):
    import jax

    stats = {"bytes_limit": 2 * 10**9, "bytes_in_use": 10**9}
    monkeypatch.setattr(type(jax.devices()[0]), "memory_stats", lambda device: stats)
    status, out, _ = run("plan gpt2 --context 1k")
    assert status == 0
    assert "cpu:0: 1.0 GB free of 2.0 GB (source: memory_stats)" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("plan lama-3-8b", "Did you mean Llama-3-8B"),
        ("plan {folder}", "config.json: No such file or directory"),
        ("plan {folder}/text", "is not JSON"),
        ("plan {folder}/empty", "Not the config of a decoder"),
        ("plan gpt2 --batch 0", "batch_size must be an int of at least 1"),
        ("plan gpt2 --context 0", "max_context_length must be an int of at least 1"),
        ("plan gpt2 --context lots", "argument --context: Not a number of tokens: 'lots'"),
        ("plan gpt2 --device big", "argument --device: Not a device: 'big'. Expected its memory"),
        ("plan gpt2 --device 24", "needs a unit, got '24'. Write 24GB."),
        ("plan gpt2 --device A100", "or a card: T4, L4, L40S, A100-40, A100-80"),
        ("plan gpt2 --weights 2", "argument --weights: A size needs a unit, got '2'. Write 2GB."),
        ("plan gpt2 --devices 8 --tensor 3", "--devices 8 must be a multiple of --tensor 3."),
        (
            "plan gpt2 --devices 8 --tensor 2 --data 2",
            "--devices 8 must be the product of --tensor 2 x --data 2.",
        ),
        ("plan gpt2 --devices 0", "--devices must be at least 1, got 0"),
        ("plan gpt2 --devices 5", "num_kv_heads must be a multiple of 5"),
        ("plan gpt2 --batch two", "argument --batch: invalid int value: 'two'"),
        ("plan gpt2 --codec int3", "argument --codec: invalid choice: 'int3'"),
        ("plan", "the following arguments are required: model"),
        ("", "the following arguments are required: COMMAND"),
        ("fly", "invalid choice: 'fly'"),
    ],
)
def test_what_is_not_understood_is_said_in_one_line(run, tmp_path, arguments, message):
    (tmp_path / "text").write_text("hello")
    (tmp_path / "empty").write_text("{}")
    status, out, err = run(arguments.format(folder=tmp_path))
    assert (status, out) == (2, "")
    assert message in err
    assert err.startswith("jaxkv")
    assert err.count("\n") == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_by_example(run, command):
    status, out, _ = run(f"{command} --help")
    assert status == 0
    assert f"\n  jaxkv {command}" in out
    assert command in run("--help")[1]


def test_help_of_all_of_it(run):
    status, out, _ = run("--help")
    assert status == 0
    assert "\n  jaxkv plan Llama-3-8B" in out
    assert "130 interrupted" in out


def test_an_interruption_is_no_traceback(run, monkeypatch):
    def interrupt(options):
        raise KeyboardInterrupt

    monkeypatch.setitem(COMMANDS, "plan", COMMANDS["plan"]._replace(run=interrupt))
    assert run("plan gpt2") == (130, "", "")


def test_a_pipe_that_nobody_reads_is_no_traceback():
    read, write = os.pipe()
    os.close(read)
    line = [sys.executable, "-m", "jaxkv", "plan", "gpt2", "--context", "1", "--device", "1MB"]
    done = subprocess.run(line, stdout=write, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_what_is_compiled_is_kept_where_the_user_has_not_said(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    try:
        jax.config.update(names[0], "/mine")
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/mine")
        keep_compiled()
        assert jax.config.jax_compilation_cache_dir == "/mine"
        monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
        keep_compiled()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "jaxkv" / "xla")
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


@pytest.mark.parametrize("command", sorted(COMMANDS.keys() - {"chat"}))  # which is for people
def test_every_command_answers_as_json_if_asked(run, command):
    assert "--json" in run(f"{command} --help")[1]


def test_version(run):
    import jaxkv

    assert run("--version") == (0, f"jaxkv {jaxkv.__version__}\n", "")


def test_planning_by_size_loads_no_framework_and_starts_no_backend():
    program = (
        "import sys; from jaxkv.cli.main import main; status = main(sys.argv[1:]); "
        "print(sorted({'flax', 'torch', 'transformers', 'rich', 'psutil'} & set(sys.modules))); "
        "sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "plan", "Llama-3-8B", "--context=8k", "--device=24GB"],
        env={**os.environ, "JAX_PLATFORMS": "absent"},  # starting a backend fails
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("\n[]\n")
    assert "1.1 GB (1,073,741,828 bytes)" in done.stdout


def test_the_package_runs_as_a_module():
    line = [sys.executable, "-m", "jaxkv", "plan", "gpt2", "--context", "1", "--device", "1kB"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    assert "36.9 kB (36,868 bytes)" in done.stdout
