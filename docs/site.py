"""A hook of MkDocs: the guides become a site as they lie in the repository, with all that they link to.

The README is the first page. A guide may link to any file of the project: Markdown becomes a page, a picture or a table is
copied, and a source file becomes a page that shows it. So every link leads somewhere on the site, and does on a code host too.
"""

import os
import re
import resource
import shutil
import tempfile
from pathlib import Path
from posixpath import normpath, relpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(
    r"(?<=\]\()([^()\s#]+)"
)  # from the root of the repository or the page's own folder, without the anchor
COPIED = {".csv", ".jpg", ".json", ".png", ".svg"}
LIMIT = 120.0  # seconds of a processor that a notebook may take: how busy the machine is does not count
# Every notebook begins with it: a torchvision for CUDA beside a torch for CPUs would keep transformers from being imported.
STARTUP = """import importlib.util, sys
if importlib.util.find_spec("torchvision"):
    sys.path.append({root!r})
    from bench.baselines.zoo import mend_torchvision
    mend_torchvision()
"""
HOME = {"README.md": "index.md", "index.md": "README.md"}

ROOT_PAGES: set[str] = set()  # Markdown outside docs/, the README excepted
_before: dict[str, float] = {}


def on_startup(command: str, dirty: bool) -> None:
    """Tells the notebooks' kernels how to begin."""
    home = Path(tempfile.mkdtemp(prefix="fastsal-site-"))
    startup = home / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "begin.py").write_text(STARTUP.format(root=str(ROOT)), encoding="utf-8")
    os.environ["IPYTHONDIR"] = str(home)
    os.environ.setdefault(
        "OMP_NUM_THREADS", "1"
    )  # most networks there are so small that a second thread would only wait


def on_shutdown() -> None:
    """Removes what `on_startup` made."""
    shutil.rmtree(os.environ["IPYTHONDIR"])


def _origin(uri: str) -> str:
    """Where the text of a page of the site lies in the repository."""
    return uri if uri in ROOT_PAGES else HOME.get(uri) or f"docs/{uri}"


def _place(path: str) -> str:
    """Where a file of the repository lies on the site."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    kept = path.endswith(".md") or Path(path).suffix in COPIED
    shown = path.lstrip(".")  # MkDocs leaves out what begins with a dot
    return HOME.get(path) or (path if kept else f"source/{shown}.md")


def _targets(origin: str, text: str) -> set[str]:
    """The files of the project that a page links to."""
    found = {normpath(f"{Path(origin).parent.as_posix()}/{one}") for one in LINK.findall(text) if ":" not in one}
    return {one for one in found if (ROOT / one).is_file()}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds what lies outside docs/ and is linked to, beginning with the README."""
    todo = {"README.md"} | {f"docs/{file.src_uri}" for file in files if file.src_uri.endswith(".md")}
    done: set[str] = set()
    while todo:
        path = todo.pop()
        done.add(path)
        uri, file = _place(path), ROOT / path
        if path.startswith("docs/"):
            pass
        elif file.suffix in COPIED:
            files.append(File.generated(config, uri, abs_src_path=str(file)))
        elif file.suffix == ".md":
            ROOT_PAGES.update({path} - {"README.md"})
            files.append(File.generated(config, uri, content=file.read_text(encoding="utf-8")))
        else:
            language = {".cu": "cpp", ".cuh": "cpp", ".h": "cpp", ".cff": "yaml"}.get(file.suffix, file.suffix[1:])
            text = f"# {path}\n\n``````{language}\n{file.read_text(encoding='utf-8')}\n``````\n"
            files.append(File.generated(config, uri, content=text))
        if path.endswith(".md"):
            todo |= _targets(path, file.read_text(encoding="utf-8")) - done
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links between files of the repository into links between pages, and reads Markdown inside <details>."""
    uri = page.file.src_uri
    if uri.startswith("source/"):
        return markdown
    origin = _origin(uri)
    known = _targets(origin, markdown)

    def link(found: re.Match[str]) -> str:
        path = normpath(f"{Path(origin).parent.as_posix()}/{found[0]}")
        return relpath(_place(path), Path(uri).parent.as_posix()) if path in known else found[0]

    return LINK.sub(link, markdown).replace("<details>", '<details markdown="1">')


def _taken() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def on_pre_page(page: Page, config: MkDocsConfig, files: Files) -> Page:
    """Notes what the kernels before have taken."""
    _before[page.file.src_uri] = _taken()
    return page


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fails where a notebook took too long."""
    if page.file.src_uri.endswith(".ipynb"):
        taken = _taken() - _before[page.file.src_uri]
        print(f"{page.file.src_uri}: {taken:.0f} s of a processor", flush=True)
        if taken > LIMIT:
            raise PluginError(f"{page.file.src_uri} took {taken:.0f} s of a processor, may take {LIMIT:.0f}")
    return html
