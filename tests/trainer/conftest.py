"""The small random backbone, made once."""

import pytest

from tests.small import small_backbone


@pytest.fixture(scope="session")
def backbone():
    return small_backbone()
