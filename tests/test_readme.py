"""The README's Python runs, and the files it names are there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_python_of_the_readme_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.S)
    assert len(blocks) == 1
    assert len(blocks[0].splitlines()) <= 12
    names: dict[str, object] = {}
    exec(blocks[0], names)
    assert names["loss"].isfinite()


def test_links_lead_somewhere():
    for file in (ROOT / "README.md", ROOT / "docs" / "studies" / "README.md"):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", file.read_text(encoding="utf-8")):
            assert (file.parent / target).exists(), f"{file.name} links {target}"
