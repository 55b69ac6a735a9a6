"""Each notebook and its text pair hold the same cells, and print what is committed."""

import contextlib
import io
import json
import pathlib
import re
import socket

import jax
import numpy as np
import pytest

NOTEBOOKS = sorted((pathlib.Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
# Lines that say something of the machine, the moment, or jax's draws, which versions change.
VARIES = re.compile(r"^(device|process|speed|random)\b")

DECIMAL = re.compile(r"\d+\.\d+")

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells_of(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def source_of(cell):
    """A cell as the percent format writes it: markdown and magics are comments."""
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return re.sub(r"^", "# ", source, flags=re.MULTILINE).replace("# \n", "#\n")
    return re.sub(r"^( *)%", r"\1# %", source, flags=re.MULTILINE)


def pair_of(path):
    """The cells of the text pair, as ``(type, source)``."""
    text = path.with_suffix(".py").read_text(encoding="utf-8")
    parts = re.split(r"^# %%( \[markdown\])?\n", text, flags=re.MULTILINE)[1:]
    for marker, source in zip(parts[::2], parts[1::2], strict=True):
        yield "markdown" if marker else "code", source.strip()


def steady_lines(text):
    return [line for line in text.splitlines() if not VARIES.match(line)]


def same_but_for_rounding(actual, expected):
    """The same words and whole numbers; decimals may differ in what the order of sums decides."""
    actual, expected = "\n".join(actual), "\n".join(expected)
    one, other = (np.array(DECIMAL.findall(text), float) for text in (actual, expected))
    words = DECIMAL.sub("#", actual) == DECIMAL.sub("#", expected)
    return words and np.allclose(one, other, rtol=0.02, atol=0.011)


def committed_output(cell):
    return "".join("".join(output["text"]) for output in cell["outputs"] if "text" in output)


@each_notebook
def test_the_text_pair_holds_the_same_cells(path):
    cells = [(cell["cell_type"], source_of(cell)) for cell in cells_of(path)]
    assert list(pair_of(path)) == cells, f"run: jupytext --sync {path.name}"


@each_notebook
def test_it_was_run_from_top_to_bottom(path):
    code = [cell for cell in cells_of(path) if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert outputs
    assert not [each for each in outputs if each["output_type"] == "error"]
    assert not [each for each in outputs if each.get("name") == "stderr"]


@each_notebook
def test_it_says_nothing_of_the_machine_it_was_run_on(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert not [cell["metadata"] for cell in notebook["cells"] if cell["metadata"]]
    assert not re.search(r"/(home|Users|root|tmp|opt|usr|work|content)/", json.dumps(notebook))


@pytest.mark.slow_cases(r"^[1-8]_")
@each_notebook
def test_it_prints_what_is_committed_without_a_network(path, monkeypatch, tmp_path):
    def refuse(*_):
        raise OSError("a notebook wanted the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.chdir(tmp_path)
    names = {}
    with jax.numpy_dtype_promotion("standard"):
        for number, cell in enumerate(cells_of(path)):
            if cell["cell_type"] == "code":
                with contextlib.redirect_stdout(io.StringIO()) as printed:
                    exec(compile(source_of(cell), f"{path.name}, cell {number}", "exec"), names)
                expected = steady_lines(committed_output(cell))
                actual = steady_lines(printed.getvalue())
                assert same_but_for_rounding(actual, expected), f"cell {number}: run it again"
