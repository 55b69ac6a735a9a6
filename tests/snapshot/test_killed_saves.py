import subprocess
import sys

import hypothesis

import jaxkv
from tests.snapshot.test_snapshot import filled, small_config


def test_a_killed_save_leaves_the_old_file_or_the_new_one(tmp_path):
    nightly = hypothesis.settings.default.max_examples > 1000
    for name, length in (("old", 3), ("new", 9)):
        jaxkv.save(filled(small_config("int8"), length), tmp_path / name, model=name)
    files = [str(tmp_path / name) for name in ("old", "new", "target")]
    command = [sys.executable, "-m", "tests.snapshot.killed_saves", *files]
    run = subprocess.run(
        [*command, "100" if nightly else "12"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "0 wrong" in run.stdout
    assert " 0 old" not in run.stdout
    assert " 0 new" not in run.stdout
