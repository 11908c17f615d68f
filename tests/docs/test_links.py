"""Links between the pages, the files and names that they mention, and the list of modules."""

import re

import pytest

from tests.conftest import ROOT
from tests.docs import modules
from tests.docs.pages import PAGES

PAGES = [*PAGES, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "launch").rglob("*.md"))]
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()


def anchors(text: str) -> set[str]:
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return {re.sub(r"[^\w\s-]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)]+)\)", page.read_text()):
        name, _, anchor = target.partition("#")
        linked = page.parent / name if name else page
        assert linked.is_file(), target
        assert not anchor or anchor in anchors(linked.read_text()), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_are_named_exist(page):
    folders = "benchmarks|configs|docs|launch|mdt_jax|notebooks|tests"
    for path in re.findall(rf"`((?:{folders})/[\w./-]*\w)[/`]", page.read_text()):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_lines_are_short(page):
    for line in page.read_text().splitlines():
        assert len(line) <= 100 or line.startswith("|"), line


def test_every_page_is_in_the_readme_and_in_the_site():
    readme, site = (ROOT / "README.md").read_text(), (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "index.md" or f"](docs/{page.name})" in readme, page.name
        assert f": {page.name}\n" in site, page.name


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def test_every_module_is_on_the_map():
    """Write the list anew by `python -m tests.docs.modules`."""
    listed = modules.LIST.search(ARCHITECTURE)[0]
    assert listed == modules.markdown()
    for path in (ROOT / "mdt_jax").rglob("*.py"):
        if path.read_text().strip():
            assert f"(../{path.relative_to(ROOT).as_posix()})" in listed, path


def test_names_on_the_map_exist():
    rows = re.findall(r"^\| .* \| \[.*\]\((\S+)\): (.*) \|$", ARCHITECTURE, re.M)
    assert len(rows) > 5
    for path, names in rows:
        code = (ROOT / "docs" / path).read_text()
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"\b{name}\b", code), f"{path}: {name}"
    for path in re.findall(r"^\| an? [\w ]+ \| `([\w/]+\.py)`", ARCHITECTURE, re.M):
        assert (ROOT / "mdt_jax" / path).exists(), path
