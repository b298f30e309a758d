"""What every test starts from: one thread, a fixed random state, no compiled code left from the test before."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from anybatch import cli
from anybatch.kernels.triton_common import INTERPRETED
from watch import watched

os.environ["OMP_NUM_THREADS"] = "1"  # of commands that tests start


@pytest.fixture(autouse=True)
def _same_start_for_every_test() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _kernels_are_watched() -> Iterator[None]:
    """In Triton's interpreter all launches are, where asked for: it takes half as long again."""
    with watched() if INTERPRETED and os.environ.get("ANYBATCH_WATCH") == "1" else nullcontext():
        yield


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Graphs compiled by earlier tests count towards dynamo's limit of recompilations."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def call(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., tuple[object, str, str]]:
    """Runs a command in this process and a folder of its own: exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["anybatch", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        told = capsys.readouterr()
        return ended.value.code, told.out, told.err

    return run
