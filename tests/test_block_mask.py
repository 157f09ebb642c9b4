"""Blocks are computed from intervals; here they are held against the full mask."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import qkv, small
from hypothesis import given
from hypothesis import strategies as st
from test_planner import layout_arguments, layouts, openers, planners

from flexdga import block_mask as block_masks
from flexdga import make_plan
from flexdga.block_mask import block_mask, kinds_of_blocks, listed, visible_blocks

pytestmark = pytest.mark.usefixtures("eager")


@given(
    planner=planners,
    opener=st.one_of(st.just({}), openers),
    layout=layouts,
    causal=st.booleans(),
    blocks=st.sampled_from([16, 32]),
)
def test_blocks_agree_with_the_mask(planner, opener, layout, causal, blocks):
    config = small(**(planner | opener), block_size=(blocks, 16))
    arguments, _ = layout_arguments(layout, 2, 150)
    inputs = qkv(batch=2, heads=4, length=150)
    plan = make_plan(*inputs, config=config, is_causal=causal, **arguments)
    part, whole = visible_blocks(plan, config.block_size)
    mask = plan.visible(torch.arange(plan.length))
    pad = -plan.num_slots % 16
    mask = torch.nn.functional.pad(mask, (0, pad))
    tiles = mask.unflatten(-1, (-1, 16)).unflatten(-3, (-1, blocks))
    touched = tiles.any(-1).any(-2)
    full = tiles.all(-1).all(-2)
    assert not (part & whole).any()
    assert not (touched & ~(part | whole)).any()  # nothing visible is left out
    assert not (whole & ~full).any()  # nothing hidden is taken for visible


@pytest.mark.parametrize("narrow", [None, "one pass", "PyTorch"])
def test_tables_list_the_blocks_of_every_query_head(narrow, monkeypatch):
    if narrow == "PyTorch":
        monkeypatch.setattr("flexdga.cpp.library", lambda name: None)
    config = small()
    inputs = qkv(heads=6, length=150)
    plan = make_plan(*inputs, config=config)
    kinds = kinds_of_blocks(F.pad(inputs[0], (0, 0, 0, 10)), plan, block_size=config.block_size)
    tables = listed(kinds) if narrow else None
    mask = block_mask(plan, 6, config.block_size, tables=tables)
    part, whole = visible_blocks(plan, config.block_size)
    for blocks, count, index in (
        (part, mask.kv_num_blocks, mask.kv_indices),
        (whole, mask.full_kv_num_blocks, mask.full_kv_indices),
    ):
        assert count.shape[1] == 6
        for h in range(6):
            for row in range(count.shape[2]):
                blocks_of_row = index[0, h, row, : count[0, h, row]].tolist()
                assert blocks_of_row == blocks[0, h // 3, row].nonzero()[:, 0].tolist()


@given(planner=planners, opener=st.one_of(st.just({}), openers), layout=layouts)
def test_larger_blocks_of_tables_hold_what_the_plan_shows(planner, opener, layout):
    """As CUDA's backward wants them: 150 tokens are no multiple of 64."""
    config = small(**(planner | opener))
    arguments, _ = layout_arguments(layout, 2, 150)
    plan = make_plan(*qkv(batch=2, heads=4, length=150), config=config, **arguments)
    made = block_mask(plan, 4, config.block_size, backward=True, table_size=(64, 32))
    part, whole = (
        (index[..., None, :] == torch.arange(index.shape[-1])[:, None])
        .logical_and((torch.arange(index.shape[-1]) < count[..., None])[..., None, :])
        .any(-1)
        for count, index in (
            (made.kv_num_blocks, made.kv_indices),
            (made.full_kv_num_blocks, made.full_kv_indices),
        )
    )
    seen = plan.visible(torch.arange(plan.length))
    seen = seen.repeat_interleave(4 // seen.shape[1], 1)
    fill = (0, -plan.num_slots % 32, 0, -plan.length % 64)
    tiles = torch.nn.functional.pad(seen, fill).unflatten(-1, (-1, 32)).unflatten(-3, (-1, 64))
    assert made.BLOCK_SIZE == (64, 32)
    assert not (part & whole).any()
    assert not (tiles.any(-1).any(-2) & ~(part | whole)).any()
    assert not (whole & ~tiles.all(-1).all(-2)).any()
    small_ones = visible_blocks(plan, config.block_size)[1]
    small_ones = small_ones.repeat_interleave(4 // small_ones.shape[1], 1)
    rows, columns = (n // s for n, s in zip((64, 32), config.block_size))
    for b, h, i, j in whole.nonzero().tolist():
        block = small_ones[b, h, i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
        assert block.shape == (rows, columns) and block.all()
    assert (
        whole.sum()
        == sum(  # and none is missed
            small_ones[..., i : i + rows, j : j + columns].all(-1).all(-1).sum()
            for i in range(0, small_ones.shape[-2] // rows * rows, rows)
            for j in range(0, small_ones.shape[-1] // columns * columns, columns)
        )
    )


def test_tables_of_very_many_blocks_are_the_same(monkeypatch):
    """Past some number of blocks both counts of a row no longer fit an int32."""
    plan = make_plan(
        *qkv(heads=4, length=150), config=small(unit_size=16, open_units=None, open_mass=0.02)
    )
    tables = []
    for narrow in (1 << 15, 4):
        monkeypatch.setattr(block_masks, "NARROW", narrow)
        mask = block_mask(plan, 4, (16, 16))
        tables.append([mask.kv_num_blocks, mask.kv_indices, mask.full_kv_indices])
    for narrow, wide in zip(*tables):
        assert narrow.dtype == wide.dtype == torch.int32 and torch.equal(narrow, wide)
