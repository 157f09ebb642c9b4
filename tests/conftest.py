from __future__ import annotations

import pytest
import torch
from hypothesis import settings

settings.register_profile("flexdga", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("flexdga")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that count compilations reset the compiler: first, so that the others share theirs."""
    items.sort(key=lambda item: item.path.name != "test_compile.py")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def eager():
    """Run flexdga's own compiled parts uncompiled: same code, any shape at once."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")
