"""What type checkers say about a user's file: no right line is flagged, and every wrong one is."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FILE = ROOT / "tests" / "typed" / "users_file.py"
WRONG = {
    number
    for number, line in enumerate(FILE.read_text().splitlines(), 1)
    if line.endswith("# wrong")
}


def mypy(folder):
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent"]
    path = {"MYPYPATH": str(ROOT)}
    run = subprocess.run(
        [*command, "users_file.py"],
        cwd=folder,
        env=os.environ | path,
        capture_output=True,
        text=True,
    )
    return re.findall(r"^users_file\.py:(\d+): error: (.*)", run.stdout, re.MULTILINE)


def pyright(folder):
    pytest.importorskip("basedpyright")
    settings = {"extraPaths": [str(ROOT)], "typeCheckingMode": "standard"}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "basedpyright", "--outputjson"]
    run = subprocess.run(
        [*command, f"--pythonpath={sys.executable}", "users_file.py"],
        cwd=folder, capture_output=True, text=True,
    )  # fmt: skip
    found = json.loads(run.stdout)["generalDiagnostics"]
    return [(each["range"]["start"]["line"] + 1, each["message"]) for each in found]


@pytest.mark.slow
@pytest.mark.parametrize("checker", [mypy, pyright])
def test_exactly_the_wrong_lines_of_a_users_file_are_flagged(checker, tmp_path):
    shutil.copy(FILE, tmp_path)
    flagged = {}
    for line, message in checker(tmp_path):
        flagged.setdefault(int(line), message)
    assert flagged.keys() == WRONG, {line: flagged.get(line) for line in flagged.keys() ^ WRONG}
