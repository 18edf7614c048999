"""docs/algorithm.md quotes the code: every line that it shows stands where the page says."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "algorithm.md").read_text()


def lines(path: str) -> list[str]:
    return [line.strip() for line in (ROOT / path).read_text().splitlines()]


def test_quoted_blocks_are_the_quickstarts_lines_in_its_order():
    recipe = lines("recipes/quickstart_grpo.py")
    loop = recipe[recipe.index("if run.start_step == 0:") :]
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 8
    for block in blocks:
        places = [loop.index(line.strip()) for line in block.splitlines()]
        assert places == sorted(places)


def test_each_formula_has_its_line():
    rows = re.findall(r"^\| (.+?) \| `(.+)` \| `(.+?)` \|$", PAGE, re.MULTILINE)
    assert len(rows) == 17
    for formula, line, path in rows:
        assert lines(path).count(line) >= 1, f"{formula}: {path} has no line {line}"
