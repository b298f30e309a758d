"""The README's Python runs, and the files it names are there."""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.S)
    assert all(len(block.splitlines()) <= 12 for block in blocks)
    names: dict[str, Any] = {}
    for block in blocks:  # one after another, as they are read
        exec(block, names)
    assert names["loss"].isfinite()
    assert names["report"].replaced
    assert not names["told"].unused
    assert names["x"].shape == (3, 224, 224)
    assert names["kn"].num_classes == 10


def test_links_lead_somewhere():
    for file in (ROOT / "README.md", ROOT / "docs" / "studies" / "README.md"):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", file.read_text(encoding="utf-8")):
            assert (file.parent / target).exists(), f"{file.name} links {target}"
