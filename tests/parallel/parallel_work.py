"""What the ranks of the tests run: importable, for they are other processes."""

from __future__ import annotations

import functools
import itertools
import os
import time
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import small
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import flexdga
from flexdga import DGAConfig, dga_attention
from flexdga.cache import CACHE_NAME
from flexdga.decode import LayerCache
from flexdga.parallel import RankError, ShardedCache, Shards, parallel_attention, traffic
from score_mods import softcap


@functools.cache
def mesh(ranks: int):
    """A mesh of so many ranks; with 2 of 4, two meshes side by side do the same."""
    world = dist.get_world_size()
    if ranks == world:
        return init_device_mesh("cpu", (world,))
    return init_device_mesh("cpu", (world // ranks, ranks), mesh_dim_names=("other", "inner"))[
        "inner"
    ]


def inputs(batch, heads, kv_heads, length, head_dim, dtype) -> list[Tensor]:
    torch.manual_seed(length)
    shapes = [(batch, h, length, head_dim) for h in (heads, kv_heads, kv_heads)]
    # Keys that stand out: without them nothing would be worth opening.
    query, key, value = (torch.randn(shape) for shape in shapes)
    key[:, :, ::37] *= 3
    return [t.to(dtype) for t in (query, key, value)]


def equals_one_process(
    ranks, config, shape, dtype=torch.float32, ids=None, balanced=True, gradient=False, eager=True
):
    """Relative errors of the output (and the gradients) of this rank's shard, and bytes sent."""
    group = mesh(ranks)
    if not eager and dist.get_rank() >= ranks:  # compiling takes minutes: one mesh does
        return [0.0], {}
    whole = inputs(*shape, dtype)
    shards = Shards(shape[3], group, config, balanced=balanced)
    parts = [shards.shard(t, 2) for t in whole]
    for t in (*whole, *parts):
        t.requires_grad_(gradient)
    torch.manual_seed(7)
    weight = torch.randn(whole[0].shape).to(dtype)
    torch.compiler.set_stance("force_eager" if eager else "default")
    with traffic() as sent:
        out = parallel_attention(*parts, shards, config=config, document_ids=ids)
        if gradient:
            out.backward(shards.shard(weight, 2))
    torch.compiler.set_stance("force_eager")  # other tests compile what one process runs
    want = dga_attention(*whole, config=config, document_ids=ids)
    errors = [_error(out, shards.shard(want, 2))]
    if gradient:
        want.backward(weight)
        errors += [_error(p.grad, shards.shard(w.grad, 2)) for p, w in zip(parts, whole)]
    errors.append(_error(shards.unshard(out, 2), want))
    return errors, dict(sent)


def decoded(ranks, config, shape, steps, dtype, ids, int8):
    """Errors of a sharded prefill and of what follows, and how often units were open then.

    Steps: how many new tokens, or minus how many to take back, or which sequences to go on with.
    """
    torch.compiler.set_stance("force_eager")
    length = shape[3]
    counts = [0 if isinstance(step, list) else step for step in steps]
    most = length + max(itertools.accumulate(counts))
    whole = inputs(*shape[:3], most, shape[4], dtype)
    shards = Shards(length, mesh(ranks), config)
    one, cache = LayerCache(config, int8=int8), ShardedCache(config, mesh(ranks), int8=int8)
    prompt = [t[:, :, :length] for t in whole]
    parts = [shards.shard(t, 2) for t in prompt]
    out = parallel_attention(*parts, shards, config=config, document_ids=ids, cache=cache)
    want = one.attend(*prompt, document_ids=ids)
    one.record_past = cache.record_past = min(counts) < 0
    errors = [_error(out, shards.shard(want, 2))]
    at, opened = length, 0
    for step in steps:
        assert (cache.seen, cache.done, cache.num_slots) == (one.seen, one.done, one.num_slots)
        if isinstance(step, list):
            for each in (one, cache):
                each.select(torch.tensor(step))
            continue
        at += step
        if step < 0:
            for each in (one, cache):
                each.crop(-step)
            continue
        new = [t[:, :, at - step : at] for t in whole]
        with traffic() as sent:
            errors.append(_error(cache.attend(*new), one.attend(*new)))
        opened += "parts of the output" in sent
    return errors, opened


def memory(config, shape):
    """Of caches over all ranks, and in one process."""
    torch.compiler.set_stance("force_eager")
    whole = inputs(*shape, torch.float32)
    group = mesh(dist.get_world_size())
    shards = Shards(shape[3], group, config)
    one, cache = LayerCache(config), ShardedCache(config, group)
    parts = [shards.shard(t, 2) for t in whole]
    parallel_attention(*parts, shards, config=config, cache=cache)
    one.attend(*whole)
    return cache.memory(), one.memory()


def misused(config, shape):
    """What was raised for caches that do not fit, and for a score mod."""
    torch.compiler.set_stance("force_eager")
    group = mesh(dist.get_world_size())
    shards = Shards(shape[3], group, config)
    parts = [shards.shard(t, 2) for t in inputs(*shape, torch.float32)]
    full, records = ShardedCache(config, group), ShardedCache(config, group)
    records.record_past = True
    parallel_attention(*parts, shards, config=config, cache=full)
    raised = []
    for cache in (full, records, ShardedCache(DGAConfig.paper(), group), LayerCache(config)):
        try:
            parallel_attention(*parts, shards, config=config, cache=cache)
        except (TypeError, ValueError) as error:
            raised.append(str(error))
    try:
        full.attend(*inputs(*shape[:3], 1, shape[4], torch.float32), score_mod=softcap(3.0))
    except ValueError as error:
        raised.append(str(error))
    return raised


def decode_apart(config, shape, rank: int):
    """A step in which one rank has another query, and so opens other units."""
    torch.compiler.set_stance("force_eager")
    group = mesh(dist.get_world_size())
    shards = Shards(shape[3], group, config)
    cache = ShardedCache(config, group)
    parts = [shards.shard(t, 2) for t in inputs(*shape, torch.float32)]
    parallel_attention(*parts, shards, config=config, cache=cache)
    query, key, value = inputs(*shape[:3], 1, shape[4], torch.float32)
    query = 4 * query  # opens something, either way
    cache.attend(-query if dist.get_rank() == rank else query, key, value)


def call_strangely(config, others: dict, shape):
    """A call in which some ranks have other configs."""
    torch.compiler.set_stance("force_eager")
    config = others.get(dist.get_rank(), config)
    shards = Shards(shape[3], mesh(dist.get_world_size()), config)
    parts = [shards.shard(t, 2) for t in inputs(*shape, torch.float32)]
    parallel_attention(*parts, shards, config=config)


def refused(config, shape):
    """A call with shards that were made for another config."""
    shards = Shards(shape[3], mesh(dist.get_world_size()), small(unit_size=128))
    parts = [shards.shard(t, 2) for t in inputs(*shape, torch.float32)]
    parallel_attention(*parts, shards, config=config)


def round_trip(length: int, config, balanced: bool):
    """Which tokens this rank holds, and whether unshard gives back what shard cut."""
    shards = Shards(length, mesh(dist.get_world_size()), config, balanced=balanced)
    whole = torch.arange(3 * length).view(3, length)
    part = shards.shard(whole, 1, fill=-1)
    at = shards.positions()
    real = at < length
    right = torch.equal(part[:, real], whole[:, at[real]]) and bool((part[:, ~real] == -1).all())
    return at.tolist(), right and torch.equal(shards.unshard(part, 1), whole), shards.size


def stall(config, shape, rank: int, timeout: float, die: bool, decode: bool):
    """A call that one rank comes to too late, or dies before; others say what they were told."""
    torch.compiler.set_stance("force_eager")
    group = dist.new_group(timeout=timedelta(seconds=timeout))
    shards = Shards(shape[3], group, config)
    parts = [shards.shard(t, 2) for t in inputs(*shape, torch.float32)]
    cache = ShardedCache(config, group) if decode else None
    parallel_attention(*parts, shards, config=config, cache=cache)  # everybody is well
    if dist.get_rank() == rank:
        if die:
            os._exit(1)
        time.sleep(2 * timeout)
    begin = time.monotonic()
    try:
        if cache is None:
            parallel_attention(*parts, shards, config=config)
        else:
            cache.attend(*inputs(*shape[:3], 1, shape[4], torch.float32))
    except RankError as error:
        return error.ranks, str(error), time.monotonic() - begin
    return None


def _error(got: Tensor, want: Tensor) -> float:
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm().clamp(min=1e-12))


def llama(spread: float = 0.02):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=64, hidden_size=96, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=6, num_key_value_heads=2, head_dim=16,
        initializer_range=spread,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def wrapped(config, packed: bool, gradient: bool):
    """Errors of a sharded model's logits or gradients, and which of its layers were replaced."""
    torch.compiler.set_stance("force_eager")
    length = 500
    tokens = torch.randint(64, (2, length), generator=torch.Generator().manual_seed(5))
    extra = {}
    if packed:
        places = torch.cat([torch.arange(170), torch.arange(length - 170)])
        extra["position_ids"] = places.expand(2, -1)
    one, model = llama(), llama()
    # A dense layer sees what the layers before made of padding, unless they are told of it.
    layers = {2: None}
    flexdga.wrap(one, config, layers=layers)
    flexdga.wrap(model, config, layers=layers, mesh=mesh(2), gather=not gradient)
    replaced = [row.wrapped for row in flexdga.report(model).rows]
    with torch.set_grad_enabled(gradient):
        want = one(tokens, use_cache=False, **extra).logits
        got = model(tokens, **extra).logits
        if not gradient:
            return [_error(got, want)], replaced
        shards = Shards(length, mesh(2), [config, DGAConfig.dense()])
        errors = [_error(got[:, real], want[:, at[real]])
                  for at in [shards.positions()] for real in [at < length]]  # fmt: skip
        torch.manual_seed(9)
        weight = torch.randn(want.shape)
        (want * weight).sum().backward()
        (got * shards.shard(weight, 1)).sum().backward()
    for mine, theirs in zip(model.parameters(), one.parameters()):
        total = mine.grad.clone()
        dist.all_reduce(total, group=mesh(2).get_group())
        errors.append(_error(total, theirs.grad))
    return errors, replaced


@functools.cache
def two_dimensions():
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))


def trained(config, length: int):
    """Errors of gradients, and of parameters after a step, with FSDP2 over all ranks."""
    torch.compiler.set_stance("force_eager")
    whole = two_dimensions()
    tokens = torch.randint(64, (2, length), generator=torch.Generator().manual_seed(5))
    following = F.pad(tokens[:, 1:], (0, 1), value=-100)
    one, model = flexdga.wrap(llama(0.2), config), llama(0.2)
    both = whole["dp", "cp"]._flatten("dp_cp")
    for layer in model.model.layers:
        fully_shard(layer, mesh=both)
    fully_shard(model, mesh=both)
    flexdga.wrap(model, config, mesh=whole["cp"], gather=False)

    def loss(logits, labels):
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")

    row = slice(whole.get_local_rank("dp"), whole.get_local_rank("dp") + 1)
    shards = Shards(length, whole["cp"], config)
    labels = shards.shard(following[row], 1, fill=-100)
    # FSDP takes the mean over its ranks, of a sum of parts of the loss.
    share = dist.get_world_size() / (following != -100).sum()
    (loss(model(tokens[row]).logits, labels) * share).backward()
    (loss(one(tokens, use_cache=False).logits, following) / (following != -100).sum()).backward()
    pairs = list(zip(model.parameters(), one.parameters()))
    errors = [_error(mine.grad.full_tensor(), theirs.grad) for mine, theirs in pairs]
    for trained in (model, one):
        torch.optim.SGD(trained.parameters(), lr=0.1).step()
    errors += [_error(mine.full_tensor(), theirs) for mine, theirs in pairs]
    sizes = [mine.to_local().numel() / theirs.numel() for mine, theirs in pairs]
    return errors, sizes


def sample_alone(model, tokens):
    torch.manual_seed(dist.get_rank())
    model.generate(tokens, do_sample=True, max_new_tokens=20)


def refusals(config):
    """What each of some calls of a sharded model raised."""
    from transformers import DynamicCache

    torch.compiler.set_stance("force_eager")
    model = flexdga.wrap(llama(), config, mesh=mesh(2))
    tokens = torch.zeros(1, 100, dtype=torch.long)
    calls = {
        "labels": lambda: model(tokens, labels=tokens),
        CACHE_NAME: lambda: model(tokens, **{CACHE_NAME: DynamicCache()}),
        "logits_to_keep": lambda: model(tokens, logits_to_keep=torch.tensor([3])),
        "input_ids": lambda: sample_alone(model, tokens),
        "attention_mask": lambda: model(tokens, attention_mask=torch.ones(1, 1, 100, 100)),
        "gather": lambda: model(tokens),
        f"{CACHE_NAME}: assisted": lambda: model.generate(tokens, prompt_lookup_num_tokens=3),
    }
    raised = {}
    for name, call in calls.items():
        try:
            call()
            raised[name] = "nothing"
        except ValueError as error:
            raised[name] = str(error)
    flexdga.unwrap(model)
    model.generate(tokens, max_new_tokens=2)
    return raised


def generated(config, length: int, steps: int):
    """What a sharded model generates, and one process; the error of logits; and what was sent."""
    torch.compiler.set_stance("force_eager")
    tokens = torch.randint(64, (2, length), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(tokens)
    mask[1, :37] = 0
    arguments = {"attention_mask": mask, "max_new_tokens": steps, "output_logits": True,
                 "return_dict_in_generate": True}  # fmt: skip
    layers = {2: None}
    one, model = (flexdga.wrap(llama(0.2), config, layers=layers, **more)
                  for more in ({}, {"mesh": mesh(2)}))  # fmt: skip
    want = one.generate(tokens, **arguments)
    with traffic() as sent:
        got = model.generate(tokens, **arguments)
    error = _error(torch.stack(got.logits), torch.stack(want.logits))
    return got.sequences, want.sequences, error, dict(sent)


def searched(config, length: int, steps: int):
    """What beam search, and what guesses of new tokens, find in a sharded model and in one."""
    torch.compiler.set_stance("force_eager")
    tokens = torch.randint(64, (1, length), generator=torch.Generator().manual_seed(5))
    tokens = torch.cat([tokens, tokens[:, :40]], 1)  # something to guess by
    one, model = (flexdga.wrap(llama(0.2), config, **more) for more in ({}, {"mesh": mesh(2)}))
    found = []
    for each in (one, model):
        beams = each.generate(
            tokens, num_beams=3, num_return_sequences=3, do_sample=False, max_new_tokens=steps,
            eos_token_id=-1,
        )  # fmt: skip
        cache = flexdga.DGACache(config)
        with torch.no_grad():
            each(tokens[:, :-1], **{CACHE_NAME: cache})
        guessed = each.generate(
            tokens, **{CACHE_NAME: cache}, do_sample=False, max_new_tokens=steps,
            eos_token_id=-1, prompt_lookup_num_tokens=3,
        )  # fmt: skip
        found.append((beams, guessed))
    return found
