"""Importing the package is light, in any order."""

from __future__ import annotations

import subprocess
import sys


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


LOADED = """
import sys
{before}
known = set(sys.modules)
{after}
new = {{name.partition(".")[0] for name in set(sys.modules) - known}}
print(*sorted(new - {{"anybatch"}} - set(sys.stdlib_module_names)))
"""


def test_importing_the_package_loads_nothing_but_itself() -> None:
    assert run(LOADED.format(before="", after="import anybatch")).split() == []


def test_using_the_library_loads_torch_and_nothing_heavier() -> None:
    # Torch itself loads more on first use, so it is used first.
    before = "import torch; torch.export; import torch.nn.functional; torch.nn.Conv2d(1, 1, 1)(torch.zeros(1, 1, 1, 1))"
    after = """
import anybatch, anybatch.functional, anybatch.layers
model = anybatch.create_model("resnet8", anybatch.scheme("ws+gn:auto"), num_classes=2)
anybatch.list_models()
anybatch.functional.group_norm(torch.zeros(1, 2, 3), 1)
model(torch.zeros(1, 3, 8, 8))
"""
    assert run(LOADED.format(before=before, after=after)).split() == []


ORDERS = [
    "import anybatch",
    "import anybatch.scheme",
    "from anybatch.scheme import Scheme",
    "import anybatch.schemes",
    "import anybatch.models",
    "from anybatch import scheme, Scheme",
    "import importlib; importlib.import_module('anybatch.scheme'); importlib.import_module('anybatch.schemes')",
    "import anybatch.layers; from anybatch.scheme import SLOTS; import anybatch.scheme",
]


def test_scheme_is_the_function_after_imports_in_any_order() -> None:
    code = f"""
import sys
for order in {ORDERS!r}:
    for name in [name for name in sys.modules if name.partition(".")[0] == "anybatch"]:
        del sys.modules[name]
    exec(order, {{}})
    import anybatch
    from anybatch.scheme import Scheme
    import anybatch.scheme
    made = anybatch.scheme("gn+ws")
    assert isinstance(made, Scheme) and isinstance(made, anybatch.Scheme), order
    print(made)
"""
    assert run(code).split() == ["ws+gn"] * len(ORDERS)


def test_public_names() -> None:
    out = run(
        "import anybatch\n"
        "for name in ('Recipe', 'Scheme', 'backend', 'create_model', 'list_models', 'layers', 'functional'):\n"
        "    assert getattr(anybatch, name) is not None, name\n"
        "    assert name in dir(anybatch) or name in ('layers', 'functional'), name\n"
        "try:\n    anybatch.nothing\nexcept AttributeError as error:\n    print(error)"
    )
    assert out.strip() == "module 'anybatch' has no attribute 'nothing'"
