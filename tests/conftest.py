"""What holds for all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from unittest import mock

import pytest


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Data decoded earlier, by other code, would hide that this code cannot decode them."""
    with mock.patch.dict(os.environ, FL_SIM_CACHE=str(tmp_path_factory.mktemp("cache"))):
        yield
