"""transformers is optional, and imported only for those who use it."""

from __future__ import annotations

import subprocess
import sys

ALONE = """
import sys

class Absent:  # as if it were not installed
    asked = []

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] == "transformers":
            cls.asked.append(name)
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent)
import torch
import flexdga
assert not Absent.asked, "flexdga imports transformers for everybody"
from flexdga import DGACache, DGAConfig, dga_attention, dga_decode
assert Absent.asked

torch.compiler.set_stance("force_eager")
torch.set_num_threads(1)
torch.manual_seed(0)
config = DGAConfig(block_size=(16, 16), unit_size=16, group_size=8, window=16, dense_below=0,
                   scope="causal")
query, key, value = (torch.randn(2, heads, 140, 32) for heads in (4, 2, 2))
want = dga_attention(query, key, value, config=config)
cache = DGACache(config)
at = 0
for count in [100] + 40 * [1]:
    new = slice(at, at + count)
    cache.update(key[:, :, new], value[:, :, new], 0)
    got = dga_decode(query[:, :, new], cache, 0)
    assert (got - want[:, :, new]).abs().max() < 1e-5, at
    at += count
assert cache.layers[0].get_seq_length() == 140 and cache.layers[0].cache.done == 112
assert cache.memory().bytes > 0

from torch import nn
try:
    flexdga.wrap(nn.Linear(2, 2))(torch.randn(1, 2))
except RuntimeError as error:
    assert "scaled_dot_product_attention" in str(error)
"""


def test_transformers_is_optional():
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
