"""What every test starts from: one thread, a fixed random state, no compiled code left from the test before."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _same_start_for_every_test() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Graphs compiled by earlier tests count towards dynamo's limit of recompilations."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()
