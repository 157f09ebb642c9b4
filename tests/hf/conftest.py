from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _small_and_eager(eager):
    """Without compilation, gradients, or threads, which tiny matrices only wait for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)
