"""The small backbone on disk and loaded, for the tests of heads' formats."""

import pytest

from backbone.model import load_backbone
from tests.heads.formats.format_files import random_checkpoint, write_backbone


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The small backbone on disk, in float16."""
    return write_backbone(tmp_path_factory.mktemp("backbone") / "small")


@pytest.fixture(scope="session")
def small(folder):
    return load_backbone(folder)


@pytest.fixture
def checkpoint(tmp_path, small):
    """checkpoint(name, **options): the checkpoint of a head with random parameters."""
    return lambda name="mlp", **options: random_checkpoint(tmp_path / "checkpoint", name, small, **options)
