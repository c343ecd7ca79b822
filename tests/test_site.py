"""The site has what it promises: every public name in the reference, notebooks that the build executes, links that lead on.

`mkdocs build --strict` (.ci/run) executes the notebooks, whose cells assert what they show, and fails for dead links.
"""

import importlib
import importlib.util
import inspect
import json
import re
import types
from pathlib import Path

import pytest

import fastsal

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
CONFIG = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


def public_names():
    """What the package and its public modules offer."""
    for name in fastsal.__all__:
        thing = getattr(fastsal, name)
        if isinstance(thing, types.ModuleType):
            own = (one for one in vars(thing).values() if inspect.isfunction(one) and one.__module__ == thing.__name__)
            yield from (f"fastsal.{name}.{one.__name__}" for one in own if not one.__name__.startswith("_"))
        else:
            yield f"fastsal.{name}"


def test_every_public_name_is_in_the_reference():
    pages = (ROOT / "docs" / "reference").glob("*.md")
    listed = [name for page in pages for name in re.findall(r"^::: (\S+)$", page.read_text("utf-8"), re.M)]
    assert len(set(listed)) == len(listed)
    assert set(public_names()) <= set(listed)
    for file in (ROOT / "fastsal" / "integrations").glob("*.py"):
        for names in re.findall(r"^__all__ = \[(.*)\]$", file.read_text(encoding="utf-8"), re.M):
            for name in re.findall(r"\"(\w+)\"", names):
                assert f"fastsal.integrations.{file.stem}.{name}" in listed


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_hold_no_outputs(notebook):
    """They are made when the site is built: here they would go stale, and hide a change of the text."""
    found = json.loads(notebook.read_text(encoding="utf-8"))
    assert "".join(found["cells"][0]["source"]).startswith("# ")
    code = [cell for cell in found["cells"] if cell["cell_type"] == "code"]
    assert code
    assert not [cell for cell in code if cell["outputs"] or cell["execution_count"]]
    assert f"notebooks/{notebook.name}" in CONFIG


def test_links_between_files_become_links_between_pages():
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("fastsal_site", ROOT / "docs" / "site.py")
    site = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(site)

    def shown(uri, text):
        page = types.SimpleNamespace(file=types.SimpleNamespace(src_uri=uri))
        return site.on_page_markdown(text, page, None, None)

    assert shown("index.md", "[a](docs/gpu.md#tests)") == "[a](gpu.md#tests)"
    assert shown("index.md", "![a](docs/demo.jpg) [b](#here) [c](https://x.org/docs/gpu.md)") == (
        "![a](demo.jpg) [b](#here) [c](https://x.org/docs/gpu.md)"
    )
    assert shown("gpu.md", "[a](../README.md) [b](../CONTRIBUTING.md)") == "[a](index.md) [b](CONTRIBUTING.md)"
    assert shown("gpu.md", "[a](../fastsal/losses.py)") == "[a](source/fastsal/losses.py.md)"
    assert shown("install.md", "[a](../.ci/run)") == "[a](source/ci/run.md)"
    assert shown("benchmarks/kernel.md", "![a](../../bench/results/tensor.png)") == "![a](../bench/results/tensor.png)"
    assert shown("gpu.md", "f[x](nowhere.md) <details>") == 'f[x](nowhere.md) <details markdown="1">'
