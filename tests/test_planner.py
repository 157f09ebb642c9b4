"""The invariants of every plan: coverage, and causality bit for bit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import qkv, small
from hypothesis import given
from hypothesis import strategies as st

from flexdga import DGAConfig, estimates, make_plan, reference, stretches
from flexdga.config import COARSE
from flexdga.estimates import BOX_SHARE, LANDMARKS, WHOLE_BOX_SHARE, unit_documents
from flexdga.opening import openings
from flexdga.plan import NEVER
from flexdga.planner import documents
from flexdga.stretches import each_head, prepared

pytestmark = pytest.mark.usefixtures("eager")

planners = st.fixed_dictionaries(
    {
        "focal_ratio": st.sampled_from([0.0, 1 / 16, 0.1, 0.37, 1.0]),
        "window": st.sampled_from([0, 1, 7, 16, 40]),
        "sinks": st.sampled_from([0, 4]),
        "grouping": st.sampled_from(["sequence", "similarity"]),
        "importance": st.sampled_from(["sum", "far_mean"]),
        "group_size": st.sampled_from([1, 4, 8]),
        "align": st.booleans(),
    }
)
openers = st.fixed_dictionaries(
    {
        "open_units": st.sampled_from([1, 3, None]),
        "open_mass": st.sampled_from([0.0, 0.02, 0.2]),
        "open_by": st.sampled_from(["landmarks", "exact"]),
        "coarse_beyond": st.sampled_from([None, 0, 64, 8192]),
        "unit_size": st.just(16),
        "window": st.sampled_from([1, 7, 16, 40]),
        "group_size": st.sampled_from([4, 8]),
        "grouping": st.just("sequence"),
        "align": st.just(True),
    }
)
layouts = st.sampled_from(["plain", "lengths", "left", "packed"])
lengths = st.sampled_from([1, 17, 64, 97, 211])


def layout_arguments(layout: str, batch: int, length: int) -> tuple[dict, torch.Tensor]:
    """Keyword arguments for a layout, and the document ids that they mean."""
    index = torch.arange(length).expand(batch, length)
    row = torch.arange(batch)[:, None]
    if layout == "plain":
        return {}, torch.zeros(batch, length, dtype=torch.long)
    if layout == "lengths":
        real = (length - 5 * row[:, 0]).clamp(min=0)
        return {"lengths": real}, torch.where(index < real[:, None], 0, -1)
    if layout == "left":
        ids = torch.where(index < 3 + 10 * row, -1, 0)
    else:  # uneven documents with a gap of padding between two of them
        ids = (index * (5 + row) // length).clamp(max=3)
        ids = torch.where(index == length // 2, -1, ids)
        ids = torch.where((index > length // 2) & (ids >= 0), ids + 1, ids)
    return {"document_ids": ids}, ids


def allowed(ids: torch.Tensor, is_causal: bool) -> torch.Tensor:
    seen = (ids[:, None] == ids[None, :]) & (ids >= 0)
    return seen.tril() if is_causal else seen


def assert_covered(plan, ids: torch.Tensor, is_causal: bool, *, drops: bool = False) -> None:
    """Each past token is seen exactly once; by a method that drops tokens, at most once."""
    length, kv_heads = ids.shape[1], plan.start.shape[1]
    heads = kv_heads if plan.open is None else plan.open.shape[1]
    for b in range(ids.shape[0]):
        want = allowed(ids[b], is_causal).long()
        for h in range(heads):
            got = reference.coverage(plan, b, h, length, heads // kv_heads)
            if drops:
                assert (got <= want).all()
            else:
                torch.testing.assert_close(got, want, rtol=0, atol=0)


@given(
    planner=planners, layout=layouts, length=lengths, scope=st.sampled_from(["prompt", "causal"])
)
def test_every_past_token_is_seen_exactly_once(planner, layout, length, scope):
    config = small(**planner, scope=scope)
    given_layout, ids = layout_arguments(layout, 2, length)
    plan = make_plan(*qkv(batch=2, heads=4, length=length), config=config, **given_layout)
    assert_covered(plan, ids, is_causal=True)


@given(
    planner=planners,
    opener=openers,
    layout=layouts,
    length=lengths,
    scope=st.sampled_from(["prompt", "causal"]),
)
def test_open_units_are_seen_raw_and_nothing_twice(planner, opener, layout, length, scope):
    config = small(**(planner | opener), scope=scope)
    given_layout, ids = layout_arguments(layout, 2, length)
    query, key, value = qkv(batch=2, heads=4, length=length)
    plan = make_plan(3 * query, key, value, config=config, **given_layout)
    assert_covered(plan, ids, is_causal=True)
    if config.open_units is not None:
        assert (plan.open < NEVER).sum(-1).max() <= config.open_units
    every = [[reference.visible(plan, b, h, length, 2) for h in range(4)] for b in range(2)]
    real = (ids >= 0)[:, None, :, None]
    got = plan.visible(torch.arange(length)) & real
    assert torch.equal(got, torch.stack([torch.stack(heads) for heads in every]) & real)


@given(planner=planners, layout=layouts, scope=st.sampled_from(["prompt", "causal"]))
def test_dropped_tokens_are_seen_at_most_once(planner, layout, scope):
    config = small(**(planner | {"window": 16}), rest="drop", scope=scope)
    given_layout, ids = layout_arguments(layout, 2, 211)
    plan = make_plan(*qkv(batch=2, length=211), config=config, **given_layout)
    assert_covered(plan, ids, is_causal=True, drops=True)
    recent = (torch.arange(211)[:, None] - torch.arange(211)).abs() < 16
    for b in range(2):
        count = reference.coverage(plan, b, 0, 211)
        assert (count[recent] == allowed(ids[b], True)[recent]).all()


def test_a_query_opens_the_unit_that_it_needs():
    """In one head query 250 wants unit 4 and in the other nothing; before 250 nobody does."""
    for open_by in ("landmarks", "exact"):
        query, key, value = (0.1 * t for t in qkv(length=300))
        key[..., 0] = 0.0
        key[:, :, 64:80, 0] = 10.0
        query[..., 0] = 0.0
        query[:, 0, 250, 0] = 10.0
        config = small(unit_size=16, open_units=2, open_mass=0.3, open_by=open_by, scope="causal")
        plan = make_plan(query, key, value, config=config)
        row = plan.open[0, :, 250 // 16]
        assert row[0, 4] == 250 and row[1, 4] == NEVER
        seen = plan.visible(torch.arange(300))[0, 0, :, 64:80]
        assert seen[250:256].all() and not seen[240:250].any() and not seen[256:].any()


def by_landmarks(queries: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of a unit: of its landmarks (Q, 4), and by the box around its other keys (Q,)."""
    mean = keys.mean(0)
    order = (keys - mean).norm(dim=1).argsort(descending=True)
    landmarks, others = keys[order[:LANDMARKS]], keys[order[LANDMARKS:]]
    around = torch.cat([others, mean[None]])
    return queries @ landmarks.mT, by_box(queries, others.mean(0), around, BOX_SHARE)


def by_keys(queries: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of its keys (Q, U), and by the box around all of them (Q,), in eight bits."""
    queries = torch.stack([eight_bits(row) for row in queries])
    box = by_box(queries, keys.mean(0), keys, WHOLE_BOX_SHARE, eight_bits)
    return queries @ eight_bits(keys).mT, box


def eight_bits(x: torch.Tensor) -> torch.Tensor:
    """bfloat16 numbers to integers up to 127 times a power of two."""
    x = x.bfloat16().float()
    step = 2.0 ** (math.floor(math.log2(x.abs().max().item())) - 6)
    return (x / step).round().clamp(-127, 127) * step


def by_box(
    queries: torch.Tensor,
    middle: torch.Tensor,
    keys: torch.Tensor,
    share: float,
    rounded: Callable[[torch.Tensor], torch.Tensor] = lambda x: x,
) -> torch.Tensor:
    high, low = rounded(torch.stack([middle.lerp(x, share) for x in (keys.amax(0), keys.amin(0))]))
    return queries.clamp(min=0) @ high + queries.clamp(max=0) @ low


@pytest.mark.parametrize(
    ("open_by", "coarse_beyond"), [("landmarks", 256), ("landmarks", None), ("exact", None)]
)
@pytest.mark.parametrize("layout", ["plain", "lengths", "left", "packed"])
def test_units_open_by_their_keys_and_far_ones_by_boxes(
    layout, open_by, coarse_beyond, monkeypatch
):
    """Units more than 256 tokens away by their boxes alone, or together by the mean of these."""
    monkeypatch.setitem(estimates.NEAR, open_by, 256)
    for module in (estimates, stretches):
        monkeypatch.setattr(module, "SEGMENT", 128)
    config = small(unit_size=16, open_units=None, open_mass=0.02, scope="causal")
    config = dataclasses.replace(config, coarse_beyond=coarse_beyond, open_by=open_by)
    estimate = by_landmarks if open_by == "landmarks" else by_keys
    length = 1300
    query, key, value = qkv(batch=2, heads=4, length=length)
    query = 2 * query
    given_layout, ids = layout_arguments(layout, 2, length)
    plan = make_plan(query, key, value, config=config, **given_layout)
    alone = make_plan(
        query, key, value, config=dataclasses.replace(config, coarse_beyond=None), **given_layout
    )
    early = (256 + config.window) // 16  # blocks that have no more than 256 tokens to open from
    assert torch.equal(plan.open[:, :, :early], alone.open[:, :, :early])

    docs = documents(ids, None, ids.shape, ids.device)
    first = unit_documents(F.pad(docs.first, (0, -length % 16), value=NEVER), config)
    wrong = total = 0
    for block in range(early, length // 16):
        before = (block * 16 - config.window + 1) // 16
        coarse = (before - 4) // COARSE * COARSE if coarse_beyond and before * 16 > 256 else 0
        boxed = 0 if coarse_beyond else max(before // 8 * 8 - 16, 0)
        for b in range(2):
            here = ids[b, block * 16]
            if (ids[b, block * 16 : block * 16 + 16] != here).any() or here < 0:
                continue  # a block of one document alone
            document = docs.first[b, block * 16]
            tokens = slice(max(before * 16, int(document)), block * 16 + 16)
            groups = [
                [u for u in range(c, c + COARSE) if first[b, u] == document]
                for c in range(0, coarse, COARSE)
            ] + [[u] for u in range(coarse, before) if first[b, u] == document]
            groups = [units for units in groups if units]
            for h in range(4):
                queries = query[b, h, block * 16 : block * 16 + 16] / 32**0.5
                near = queries @ key[b, h // 2, tokens].mT
                unseen = torch.arange(tokens.start, tokens.stop) > torch.arange(
                    block * 16, block * 16 + 16
                ).unsqueeze(1)
                columns = [near.masked_fill(unseen, -math.inf)]
                for units in groups:
                    found = [estimate(queries, key[b, h // 2, u * 16 : u * 16 + 16]) for u in units]
                    score = torch.stack([box for _, box in found]).mean(0)
                    if units[0] >= max(coarse, boxed):
                        best = found[0][0].amax(1)
                        score = best if open_by == "exact" else torch.maximum(score, best)
                    columns.append(score[:, None])
                asks = torch.cat(columns, 1).softmax(1)[:, near.shape[1] :] > config.open_mass
                want = torch.zeros(before, dtype=torch.bool)
                for units, open_ in zip(groups, asks.any(0)):
                    want[units] = open_
                got = plan.open[b, h, block, :before] < NEVER
                wrong += (got != want).sum()
                total += want.numel()
    assert wrong < 0.003 * total  # rounding to bfloat16 moves what is close to the threshold
    opened = (plan.open < NEVER).float().mean()
    assert 0.02 < opened < 0.5
    if coarse_beyond:
        assert (plan.open != alone.open).float().mean() > 0.01


@pytest.mark.parametrize("opener", [{}, {"open_by": "exact"}, {"open_units": 2}], ids=str)
def test_a_kv_head_opens_the_same_alone(opener):
    """As a compiler for a GPU has it."""
    query, key, _ = qkv(2, 6, 2, 256)
    config = small(**{"open_units": None, "unit_size": 16, "open_mass": 0.05} | opener)
    docs = documents(None, torch.tensor([256, 150]), (2, 256), query.device)
    around, units = prepared(key, docs.first, config=config, is_causal=True)
    choices = {"config": config, "is_causal": True, "scale": 0.6}
    together = openings(query, around, units, **choices)
    assert 0 < (together < NEVER).sum() < together.numel() / 2
    alone = [openings(*head, **choices) for head in each_head(query, around, units)]
    assert torch.equal(torch.cat(alone, 1), together)


@given(planner=planners, opener=st.one_of(st.just({}), openers), layout=layouts, length=lengths)
def test_bidirectional_plans_show_every_token_exactly_once(planner, opener, layout, length):
    given_layout, ids = layout_arguments(layout, 2, length)
    plan = make_plan(
        *qkv(batch=2, length=length), config=small(**(planner | opener)), is_causal=False,
        **given_layout,
    )  # fmt: skip
    assert_covered(plan, ids, is_causal=False)


@pytest.mark.parametrize(
    "config",
    [
        DGAConfig.paper(block_size=(16, 16)),
        DGAConfig.cca(block_size=(16, 16), window=64),
        small(focal_budget=20),
        small(focal_budget=1000),
        small(probe_placement="tail"),
        small(group_weights="importance", focal_ratio=0.0),
        small(group_size=12, unit_size=48, grouping="similarity"),
        small(unit_size=40, scope="causal", align=False, window=3),
    ],
    ids=str,
)
def test_coverage_of_named_settings(config):
    plan = make_plan(*qkv(length=300), config=config)
    assert_covered(plan, torch.zeros(1, 300, dtype=torch.long), is_causal=True)


def test_the_coverage_check_notices_one_wrong_interval():
    plan = make_plan(*qkv(length=200), config=small())
    plan.end[0, 0, plan.length // 2] += 1
    with pytest.raises(AssertionError):
        assert_covered(plan, torch.zeros(1, 200, dtype=torch.long), is_causal=True)


@given(
    planner=planners,
    opener=st.one_of(st.just({}), openers),
    layout=st.sampled_from(["plain", "packed"]),
    token=st.integers(0, 210),
)
def test_causal_plans_do_not_look_ahead(planner, opener, layout, token):
    """What a query sees is the same whatever comes after it: intervals, tokens and members."""
    config = small(**(planner | opener), scope="causal")
    arguments, _ = layout_arguments(layout, 1, 211)
    inputs = qkv(length=211)
    before = make_plan(*inputs, config=config, **arguments)
    for x in inputs:
        x[:, :, token] += 10 * torch.randn_like(x[:, :, token])
    after = make_plan(*inputs, config=config, **arguments)
    past = torch.arange(token)
    seen = [plan.visible(past) for plan in (before, after)]
    assert torch.equal(*seen)
    slots = seen[0].any(-2)
    for g in range(2):
        tokens = [
            [reference._members(plan, 0, g, s) for s in slots[0, g].nonzero()[:, 0].tolist()]
            for plan in (before, after)
        ]
        assert tokens[0] == tokens[1]


def test_focal_tokens_are_those_that_probes_attend_to():
    query, key, value = qkv(length=256)
    for needle in (70, 131):
        key[:, :, needle] = 4 * query.mean((0, 1, 2)).sign() + 2
    query += 1.0
    for importance in ("sum", "far_mean"):
        config = small(importance=importance, focal_ratio=0.05)
        plan = make_plan(query, key, value, config=config)
        for g in range(2):
            assert {70, 131} <= set(plan.focal[0, g].tolist())


def test_sinks_are_focal_in_every_document():
    arguments, ids = layout_arguments("packed", 1, 211)
    plan = make_plan(*qkv(length=211), config=small(focal_ratio=0.2, sinks=2), **arguments)
    focal = set(plan.focal[0, 0].tolist())
    for document in ids.unique():
        first = int((ids[0] == document).nonzero()[0, 0])
        long_enough = int((ids[0] == document).sum()) > 48
        if document >= 0 and long_enough:
            assert {first, first + 1} <= focal


def test_similar_tokens_share_groups():
    """Two kinds of tokens, interleaved: groups by likeness are pure, groups in order are not."""
    query, key, value = qkv(length=128)
    kind = torch.arange(128) % 2
    key, value = (0.1 * t + 3 * (2 * kind - 1)[:, None] for t in (key, value))
    pure = {}
    for grouping in ("similarity", "sequence"):
        config = small(grouping=grouping, focal_ratio=0.0, sinks=0)
        members = make_plan(query, key, value, config=config).members
        kinds = torch.where(members >= 0, kind[members.clamp(min=0)], -1)
        alive = members[..., 0] >= 0
        first = kinds[..., :1]
        pure[grouping] = ((kinds == first) | (kinds < 0)).all(-1)[alive].float().mean().item()
    assert pure["similarity"] == 1.0
    assert pure["sequence"] < 0.1


@pytest.mark.parametrize("ratio", [0.1, 1 / 3, 0.07, 0.999])
def test_focal_ratio_is_rounded_down_as_written(ratio):
    config = DGAConfig.paper(focal_ratio=ratio, block_size=(16, 16))
    for length in (50, 100, 130, 300):
        plan = make_plan(*qkv(length=length), config=config)
        want = int(length * ratio + 1e-9)
        assert (plan.focal >= 0).sum(-1).tolist() == [[want, want]]


def test_later_keys_may_be_anything():
    query, key, value = qkv(length=512)
    config = small(scope="causal", unit_size=16, open_units=None, open_mass=0.02)
    want = make_plan(query, key, value, config=config).open
    key[:, :, 400:] = math.nan
    got = make_plan(query, key, value, config=config).open
    rows = 400 // config.block_size[0]
    assert (want < NEVER)[:, :, :rows].any()
    assert torch.equal(got[:, :, :rows], want[:, :, :rows])
