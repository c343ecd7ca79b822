"""The guides are true: their links lead somewhere, the symbols they name exist, and code cites sections that are there."""

import ast
import itertools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
GUIDES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
DESIGN = ROOT / "docs" / "design.md"
CODE_SUFFIXES = {".py", ".h", ".cpp", ".cu", ".cuh"}
LINK = re.compile(r"!?\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")

each_guide = pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.relative_to(ROOT).as_posix())


def prose(path):
    """The text of a guide without its blocks of code and its hints where a long name may break, line for line."""
    fences = re.compile(r"^```.*?^```", re.M | re.S)
    text = path.read_text(encoding="utf-8").replace("<wbr>", "")
    return fences.sub(lambda block: "\n" * block[0].count("\n"), text)


def headings(path):
    return re.findall(r"^#+ (.+?)\s*$", prose(path), re.M)


def anchor(heading):
    """What GitHub calls the anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def links(path):
    """(line number, text, file, anchor) of every link of a guide that leads to a file of this project."""
    for number, line in enumerate(prose(path).splitlines(), 1):
        for text, target in LINK.findall(line):
            if not target.startswith(("https://", "http://", "mailto:")):
                file, _, section = target.partition("#")
                yield number, text, (path.parent / file).resolve() if file else path, section


def defines(path, symbol):
    """Whether a file of Python, C++ or CUDA defines a symbol, dotted or with colons for a member of a class."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return symbol in python_symbols(ast.parse(text))
    *classes, name = symbol.split("::")
    return all(re.search(rf"\b(?:struct|class) {one}\b", text) for one in classes) and (
        re.search(rf"\b(?:struct|class) {name}\b", text) is not None or defines_function(text, name)
    )


def python_symbols(node, prefix=""):
    """Functions, classes, their members, and the names that are assigned to at the top or in a class."""
    found = set()
    for child in node.body:
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            found.add(prefix + child.name)
        if isinstance(child, ast.ClassDef):
            found |= python_symbols(child, f"{prefix}{child.name}.")
        targets = child.targets if isinstance(child, ast.Assign) else [getattr(child, "target", None)]
        found |= {prefix + target.id for target in targets if isinstance(target, ast.Name)}
    return found


def defines_function(text, name):
    """Whether a body follows the arguments of `name` somewhere, as it does in a definition and not in a call."""
    for start in re.finditer(rf"\b{name}\(", text):
        depth, at = 1, start.end()
        while depth and at < len(text):
            depth += {"(": 1, ")": -1}.get(text[at], 0)
            at += 1
        if re.match(r"\s*(const\s*)?\{", text[at:]):
            return True
    return False


@each_guide
def test_links_lead_somewhere(guide):
    wrong = []
    for number, text, file, section in links(guide):
        where = f"{guide.relative_to(ROOT)}, line {number}, link {text!r}:"
        if not file.exists():
            wrong.append(f"{where} there is no file {file.relative_to(ROOT)}")
        elif section and section not in map(anchor, headings(file)):
            wrong.append(f"{where} {file.relative_to(ROOT)} has no section with the anchor #{section}")
    assert not wrong, "\n".join(wrong)


@each_guide
def test_linked_symbols_exist(guide):
    """A link to a source file from a table, or with code for its text, names a symbol that the file defines."""
    wrong, lines = [], prose(guide).splitlines()
    for number, text, file, _ in links(guide):
        in_table = lines[number - 1].startswith("|")
        if file.suffix in CODE_SUFFIXES and file.exists() and file.name not in text and (in_table or "`" in text):
            symbol = text.strip("`")
            if not defines(file, symbol):
                row, column = cell(lines, number, text, file) if in_table else ("", "")
                wrong.append(
                    f"{guide.relative_to(ROOT)}, line {number}, row {row!r}, column {column!r}: "
                    f"{file.relative_to(ROOT)} does not define {symbol}"
                )
    assert not wrong, "\n".join(wrong)


@each_guide
def test_named_files_exist(guide):
    """What stands in a guide as code and begins with a folder of the project is a file or a folder there."""
    named = re.findall(r"`((?:\.ci|\.github|bench|csrc|docs|fastsal|tests)/[\w./-]*)`", prose(guide))
    assert not [name for name in named if not (ROOT / name).exists()]


def test_map_of_the_tree():
    """The map in CONTRIBUTING.md, indented by two spaces a level: it lists what is there, and all of the package's modules."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    lines = re.search(r"^## A map of the tree\n+```\n(.*?)^```", text, re.M | re.S)[1].splitlines()
    width = lines[0].index("the package")
    listed, folders = set(), [ROOT]
    for line in lines:
        level = (len(line) - len(line.lstrip())) // 2
        paths = [folders[level] / name for name in line[:width].split()]
        folders[level + 1 :] = paths[-1:]
        listed.update(paths)
    assert not [str(path.relative_to(ROOT)) for path in listed if not path.exists()]
    modules = {path for path in (ROOT / "fastsal").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert {path.name for path in modules - listed} == {"__init__.py", "__main__.py"}


def cells(line):
    return [one.strip() for one in line.strip().strip("|").split("|")]


def cell(lines, number, text, file):
    """The first cell of a table's row, and the head of the column in which the row has a link."""
    row, top = cells(lines[number - 1]), number - 1
    while lines[top - 1].startswith("|"):
        top -= 1
    column = next(k for k, one in enumerate(row) if f"[{text}]" in one and file.name in one)
    return row[0], cells(lines[top])[column]


def test_every_row_of_the_tables_of_quantities_names_every_backend():
    head = ["quantity", "reference", "CPU", "CUDA", "Triton"]
    lines = prose(ROOT / "docs" / "quantities.md").splitlines()
    tops = [k for k, line in enumerate(lines) if cells(line) == head]
    wrong = [
        f"docs/quantities.md, line {number}, row {row[0]!r}, column {column!r}: wants a link, got {one!r}"
        for top in tops
        for number, row in enumerate(map(cells, itertools.takewhile(lambda line: line, lines[top + 2 :])), top + 3)
        for column, one in zip(head[1:], row[1:], strict=True)
        if not LINK.search(one)
    ]
    assert len(tops) == 2
    assert not wrong, "\n".join(wrong)


def sources():
    """Every source file of the project, the tests and the benchmarks but this one."""
    folders = [ROOT / name for name in ("bench", "csrc", "fastsal", "tests")]
    files = {path for folder in folders for path in folder.rglob("*") if path.suffix in CODE_SUFFIXES}
    return sorted(files - {Path(__file__).resolve()})


def test_cited_sections_exist():
    """Code cites the contract as `docs/design.md, "Section"`, and nothing cites it in any other way."""
    known, wrong = headings(DESIGN), []
    for path in [*sources(), *GUIDES, ROOT / "setup.py", ROOT / "pyproject.toml", ROOT / ".ci" / "run"]:
        text = path.read_text(encoding="utf-8")
        for citation in re.finditer(r"\bDESIGN\b|\bdesign\.md(?:,\s+\"([^\"]+)\")?", text):
            where = f"{path.relative_to(ROOT)}, line {text.count(chr(10), 0, citation.start()) + 1}:"
            if citation[1] is None and (path not in GUIDES or citation[0] == "DESIGN"):
                wrong.append(f"{where} got {citation[0]!r}, wants docs/design.md, a comma and a section in quotes")
            elif citation[1] is not None and citation[1] not in known:
                wrong.append(f"{where} docs/design.md has no section {citation[1]!r}")
    assert not wrong, "\n".join(wrong)


def test_readme_is_short_and_fits_a_narrow_window():
    """140 lines, five columns, and lines of code that need no scrolling at 900 pixels."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = text.splitlines()
    assert len(lines) <= 140
    for number, line in enumerate(lines, 1):
        assert not line.startswith("|") or len(cells(line)) <= 5, f"README.md, line {number}: more than five columns"
    for block in re.findall(r"^```.*?\n(.*?)^```", text, re.M | re.S):
        for line in block.splitlines():
            assert len(line) <= 96, f"README.md: {line!r} has {len(line)} characters and scrolls at 900 pixels"
