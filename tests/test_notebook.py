"""The notebook runs from top to bottom, and what it shows was made by running it."""

import json
from pathlib import Path

import matplotlib
import pytest

NOTEBOOK = Path(__file__).resolve().parent.parent / "docs" / "first-steps.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]


@pytest.mark.usefixtures("one_thread")
def test_runs():
    for name in ("pandas", "sklearn"):
        pytest.importorskip(name)
    matplotlib.use("agg")
    names = {}
    for cell in CODE:
        lines = [line for line in "".join(cell["source"]).splitlines() if not line.startswith("%")]
        exec("\n".join(lines), names)
    assert names["same"] is True


def test_was_run():
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    outputs = [output for cell in CODE for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
