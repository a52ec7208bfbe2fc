"""Documents: every link has a target, and no file names a folder of a developer's machine."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"\]\(\s*<?([^)\s>]+)>?[^)]*\)")
FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
PATH = re.compile(r"`((?:\.ci|agent|deploy|docs|models|scripts|tests)/[\w./-]+)")
TEST = re.compile(r"^def (test_\w+)\(", re.MULTILINE)
NAMED_TEST = re.compile(r"`(test_\w+)`")
PLACED_NAME = re.compile(r"`([A-Za-z_][\w.]*)(?:\(\))?` (?:in|of) `((?:agent|scripts|tests)/[\w/.]+\.py)`")
HEADING = re.compile(r"^#{1,6}\s+(.+?)\s*$", re.MULTILINE)


def files_of_the_project() -> list[Path]:
    """Return files that are or could be committed; outside a git checkout, every file of the folder."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False)
    names = listed.stdout.split("\0") if listed.returncode == 0 else [str(p) for p in ROOT.rglob("*")]
    return [path for name in names if name and (path := ROOT / name).is_file()]


DOCUMENTS = sorted(path for path in files_of_the_project() if path.suffix == ".md")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_relative_link_of_a_document_leads_to_a_file_and_a_heading(document: Path) -> None:
    broken = [link for link in links(document.read_text(encoding="utf-8")) if not leads_somewhere(document, link)]
    assert not broken, f"{document.relative_to(ROOT)}: no such file or heading: {', '.join(broken)}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_path_that_a_document_names_is_there(document: Path) -> None:
    named = PATH.findall(document.read_text(encoding="utf-8"))
    # A name that ends in `_` or `-` continues with a wildcard or a date.
    assert [path for path in named if not path.endswith(("_", "-")) and not (ROOT / path).exists()] == []


def test_every_test_that_a_document_names_is_there() -> None:
    known = {name for path in (ROOT / "tests").rglob("test_*.py") for name in TEST.findall(path.read_text("utf-8"))}
    named = {name for document in DOCUMENTS for name in NAMED_TEST.findall(document.read_text(encoding="utf-8"))}
    assert named - known == set()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_name_that_a_document_places_in_a_module_is_there(document: Path) -> None:
    """Check references such as: `DETECTORS` in `agent/outstation/ml/drift/detectors/registry.py`."""
    placed = PLACED_NAME.findall(document.read_text(encoding="utf-8"))
    missing = [
        f"{name} in {module}"
        for name, module in placed
        if not re.search(rf"\b{name.rpartition('.')[2]}\b", (ROOT / module).read_text(encoding="utf-8"))
    ]
    assert missing == []


def test_no_file_names_a_folder_of_a_developers_machine() -> None:
    home = r"/(home|Users)/(?!outstation\b)[A-Za-z][\w.-]*/"
    own = "" if len(ROOT.parent.parts) < 2 or str(ROOT.parent) in ("/opt", "/srv", "/tmp") else f"|{ROOT.parent}/"
    pattern = re.compile(rf"(?<![\w.]){home}|(?<![\w.])/root/{own}")
    lines = []
    for path in files_of_the_project():
        if path == Path(__file__):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        lines += [f"{path.relative_to(ROOT)}: {match[0]}" for match in pattern.finditer(text)]
    assert not lines


def test_a_dead_link_is_noticed(tmp_path: Path) -> None:
    document = tmp_path / "a.md"
    document.write_text("# One\n[x](b.md) [y](#one) [z](#two) [w](https://example.org/b.md)\n```\n[v](c.md)\n```\n")
    text = document.read_text()
    assert [link for link in links(text) if not leads_somewhere(document, link)] == ["b.md", "#two"]


def test_a_name_is_read_with_its_module() -> None:
    assert PLACED_NAME.findall("a line in `DETECTORS` of `agent/a.py`, and `run()` in `scripts/b.py`") == [
        ("DETECTORS", "agent/a.py"),
        ("run", "scripts/b.py"),
    ]


def links(text: str) -> list[str]:
    """Return the targets of the inline links of a Markdown text, without those that have a scheme."""
    targets = [str(target) for target in LINK.findall(FENCE.sub("", text))]
    return [target for target in targets if not re.match(r"[a-z][a-z0-9+.-]*:", target)]


def leads_somewhere(document: Path, link: str) -> bool:
    name, _, heading = link.partition("#")
    target = document.parent / name if name else document
    if not target.exists():
        return False
    return not heading or target.suffix != ".md" or heading in anchors(target.read_text(encoding="utf-8"))


def anchors(text: str) -> set[str]:
    """Return the anchors that Git hosts assign to the headings of a Markdown text."""
    titles = (re.sub(r"[^\w\- ]", "", title.lower()) for title in HEADING.findall(FENCE.sub("", text)))
    return {title.replace(" ", "-") for title in titles}
