"""The documentation: its links and the files that it names exist, and its form is that of CONTRIBUTING.md."""

import re
from pathlib import Path

import pytest
from conftest import ROOT

PAGES = sorted(path.relative_to(ROOT) for pattern in ("*.md", "docs/**/*.md", "benchmarks/**/*.md", "kernels/**/*.md")
               for path in ROOT.glob(pattern))  # fmt: skip
LOG = Path("docs/log.md")
CODE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
FOLDERS = ("grpo", "kernels", "rollout", "recipes", "benchmarks", "tests", "docs", ".github", ".ci")
HEADINGS = (
    "Install", "Quick start", "The loop", "Recipes", "How it works", "Results", "Several GPUs", "Citation", "License",
)  # fmt: skip


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    titles = re.findall(r"^#+ (.+)$", CODE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page):
    path = ROOT / page
    for target in re.findall(r"\]\(([^)\s]+)\)", CODE.sub("", path.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        linked = (path.parent / name).resolve() if name else path
        assert linked.exists(), f"{page}: {target}"
        assert not anchor or anchor in anchors(linked), f"{page}: {target}"


@pytest.mark.parametrize("page", [page for page in PAGES if page != LOG], ids=str)
def test_files_that_are_named_exist(page):
    """What looks like a file of the repository, in backticks or as a script of a command. NAME stands for any name."""
    text = (ROOT / page).read_text()
    names = re.findall(r"`([\w./-]+\.(?:py|md|toml|yml|txt|sh))(?:::\w+)?`", text)
    names += re.findall(r"(?:python|torchrun .*?) ((?:recipes|benchmarks|tests)/[\w/]+\.py)", text)
    for name in names:
        if name.split("/")[0] in FOLDERS and "NAME" not in name:
            assert (ROOT / name).exists(), f"{page}: {name}"


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_lines_of_prose_are_short(page):
    prose = CODE.sub("", (ROOT / page).read_text()).splitlines()
    assert not [line for line in prose if len(line) > 120 and not line.lstrip().startswith("|")]


def test_readme_has_the_headings_that_people_look_for():
    assert re.findall(r"^## (.+)$", CODE.sub("", (ROOT / "README.md").read_text()), re.MULTILINE) == list(HEADINGS)


def test_readmes_loop_is_the_quickstarts():
    """Line for line and in its order, without the lines between."""
    [block] = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    recipe = (ROOT / "recipes" / "quickstart_grpo.py").read_text()
    loop = [line.strip() for line in recipe[recipe.index("    for step in run.steps") :].splitlines()]
    places = [loop.index(line.strip()) for line in block.splitlines() if line.strip()]
    assert places == sorted(places)


def test_every_entry_of_the_lab_book_has_a_date_and_a_title():
    entries = re.findall(r"^- .*(?:\n  .*)?", (ROOT / LOG).read_text(), re.MULTILINE)
    assert entries
    assert not [entry for entry in entries if not re.match(r"- \*\*\d{4}-\d\d-\d\d, [^*]+\.\*\*", entry)]
