from __future__ import annotations

import pytest
from ranks import Ranks


@pytest.fixture(scope="session")
def ranks():
    """Four processes for all tests that leave them alive: starting them takes seconds."""
    pool = Ranks(4)
    yield pool
    pool.stop()
