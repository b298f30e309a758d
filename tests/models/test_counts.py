"""The kept counts are those of the networks."""

import pytest

from anybatch.models import list_models
from anybatch.models.counts import count, counts


def test_every_network_is_counted():
    assert set(counts()) == set(list_models())


@pytest.mark.parametrize("name", ["resnet18", "preact_resnet20", "vgg11", "densenet121", "convnext_tiny", "nfnet_f0"])
def test_kept_counts(name):
    assert counts()[name] == count(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", list_models())
def test_all_kept_counts(name):
    assert counts()[name] == count(name)
