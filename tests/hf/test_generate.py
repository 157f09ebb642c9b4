"""Every road through `generate` and through caches, on one family."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import models
import pytest
import torch
from helpers import small
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, StaticCache

import flexdga.attention
from flexdga import DGACache, DGAConfig, applied, report
from flexdga.cache import CACHE_NAME, CACHE_NAMES

exact = functools.partial(small, focal_ratio=1.0)
NEW = 40


@pytest.fixture
def llama() -> PreTrainedModel:
    return models.shared("llama")


def both(model: PreTrainedModel, work: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """What the work gives with DGA, and without."""
    torch.manual_seed(5)
    want = work()
    with applied(model, exact()):
        torch.manual_seed(5)
        got = work()
    return got, want


PADDED = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 20},
    "beams": {"do_sample": False, "num_beams": 3},
    "beams, all returned": {"do_sample": False, "num_beams": 3, "num_return_sequences": 3},
    "samples": {"do_sample": True, "num_return_sequences": 3},
    "no cache": {"do_sample": False, "use_cache": False, "max_new_tokens": 4},
    "prompt in chunks": {"do_sample": False, "prefill_chunk_size": 16},
    "dynamic by name": {"do_sample": False, "cache_implementation": "dynamic"},
}


@pytest.mark.parametrize("how", PADDED)
def test_left_padded(llama, how):
    ids, mask = models.padded([50, 33], "left")
    settings = {"max_new_tokens": NEW} | PADDED[how]
    got, want = both(llama, lambda: llama.generate(ids, attention_mask=mask, **settings))
    assert torch.equal(got, want)


def test_other_ways_to_say_it(llama):
    ids, mask = models.padded([50, 33], "left")
    embeds = llama.get_input_embeddings()(ids)
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    for work in (
        lambda: llama.generate(ids[:1], config),
        lambda: llama.generate(ids[:1, :3], generation_config=config),
        lambda: llama.generate(inputs_embeds=embeds, attention_mask=mask, generation_config=config),
    ):
        got, want = both(llama, work)
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    "changes",
    [
        {"scope": "causal", "group_bias": "mass", "grouping": "similarity"},
        {"group_weights": "importance", "window": 0, "sinks": 0, "align": False},
    ],
)
def test_other_configs(llama, changes):
    ids, mask = models.padded([70, 45], "left")
    settings = {"attention_mask": mask, "do_sample": False, "max_new_tokens": NEW}
    want = llama.generate(ids, **settings)
    with applied(llama, exact(**changes)):
        assert torch.equal(llama.generate(ids, **settings), want)


def repeating() -> Tensor:
    return models.tokens(1, 20).repeat(1, 3)


def test_prompt_lookup(llama):
    ids = repeating()
    got, want = both(llama, lambda: llama.generate(
        ids, do_sample=False, max_new_tokens=60, prompt_lookup_num_tokens=4
    ))  # fmt: skip
    assert torch.equal(got, want)


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("wrapped", [True, False])
def test_assistant(llama, wrapped, same):
    """An assistant that is always right, and one that seldom is."""
    assistant = models.make("llama", num_hidden_layers=2 if same else 1)
    if wrapped:
        flexdga.wrap(assistant, exact())
    ids = repeating()
    got, want = both(llama, lambda: llama.generate(
        ids, do_sample=False, max_new_tokens=NEW, assistant_model=assistant
    ))  # fmt: skip
    assert torch.equal(got, want)
    assert not wrapped or any(row.replaced for row in report(assistant).rows)


@pytest.mark.parametrize("lengths", [[70], [50, 33]])
def test_continued_chat(llama, lengths):
    ids, mask = models.padded(lengths, "left")
    more = models.tokens(len(lengths), 37)

    def chat(cache: object) -> Tensor:
        once = functools.partial(
            llama.generate, do_sample=False, max_new_tokens=NEW, **{CACHE_NAME: cache}
        )
        said = once(ids, attention_mask=mask)
        grown = torch.nn.functional.pad(mask, (0, NEW + more.shape[1]), value=1)
        return once(torch.cat([said, more], 1), attention_mask=grown)

    want = chat(None)
    assert torch.equal(chat(DynamicCache(config=llama.config)), want)
    with applied(llama, exact()):
        cache = DGACache(exact(), model_config=llama.config)
        got = chat(cache)
        assert cache.get_seq_length() == got.shape[1] - 1
        assert all(layer.cache.done >= 64 for layer in cache.layers)
    assert torch.equal(got, want)


def test_a_prompt_kept_for_several_questions(llama):
    """transformers' own recipe: fill a cache once, continue from copies of it."""
    prompt, questions = models.tokens(1, 90), models.tokens(2, 1, 7)
    ids = [torch.cat([prompt, question], 1) for question in questions]
    once = {"do_sample": False, "max_new_tokens": NEW}
    want = [llama.generate(asked, **once) for asked in ids]
    with applied(llama, exact()):
        cache = DGACache(exact(), model_config=llama.config)
        llama(prompt, **{CACHE_NAME: cache})
        copies = [copy.deepcopy(cache) for _ in ids]
        got = [llama.generate(asked, **{CACHE_NAME: c}, **once) for asked, c in zip(ids, copies)]
    assert all(torch.equal(g, w) for g, w in zip(got, want))
    assert cache.get_seq_length() == 90


@pytest.mark.parametrize("lengths", [[120], [120, 93, 61]])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_chunks(name, lengths):
    model = models.shared(name)
    ids, mask = models.padded(lengths, "left")
    inputs = {}
    if len(lengths) > 1:
        places = (mask.cumsum(-1) - 1).clamp(min=0)
        inputs = {"position_ids": places}
    want = model(ids, attention_mask=mask, **inputs).logits
    with applied(model, exact()):
        cache = DGACache(exact(), model_config=model.config)
        parts = []
        for begin, end in ((0, 60), (60, 119), (119, 120)):
            now = {key: value[:, begin:end] for key, value in inputs.items()}
            part = model(
                ids[:, begin:end], attention_mask=mask[:, :end], **{CACHE_NAME: cache}, **now
            )
            parts.append(part.logits)
    real = mask.bool()
    assert (torch.cat(parts, 1)[real] - want[real]).abs().max() < 1e-4


@pytest.mark.parametrize(
    "name, kind, lengths",
    [
        ("llama", "dynamic", [50, 33]),
        ("llama", "static", [50]),
        ("llama", "static", [50, 33]),
        ("gpt_oss", "dynamic", [50, 33]),
        ("gemma2", "static", [50]),
        ("gpt_oss", "static", [50]),
    ],
)
def test_caches_of_transformers(name, kind, lengths):
    """A prompt goes through DGA where it can; decoding is dense."""
    model = models.shared(name)
    ids, mask = models.padded(lengths, "left")

    def work() -> Tensor:
        cache = DynamicCache(config=model.config)
        if kind == "static":
            cache = StaticCache(config=model.config, max_cache_len=ids.shape[1] + NEW)
        return model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=15, **{CACHE_NAME: cache}
        )

    want = work()
    with applied(model, exact()):
        if kind == "static" and len(lengths) > 1:
            # Its masks are over all the room it has: nothing goes through DGA,
            with pytest.raises(RuntimeError, match="not a DGACache"):
                work()
            model(ids)  # unless something did before
        assert torch.equal(work(), want)
        assert all(row.replaced for row in report(model).rows if row.wrapped)


def test_compiled_model(monkeypatch):
    """The user's own torch.compile around a wrapped model, also as a unit is pooled."""
    torch.compiler.set_stance("default")
    functions = {f: f for f in flexdga.attention._compiled}  # what stays outside runs uncompiled
    monkeypatch.setattr(flexdga.attention, "_compiled", functions)
    model = models.make("llama", num_hidden_layers=1)
    ids, mask = models.padded([78, 60], "left")
    settings = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 4}
    want = model.generate(ids, **settings)
    flexdga.wrap(model, exact())
    model.forward = torch.compile(model.forward, backend="eager")
    got = model.generate(ids, return_dict_in_generate=True, **settings)
    assert torch.equal(got.sequences, want)
    assert got[CACHE_NAME].layers[0].cache.done == 64
    torch._dynamo.reset()


def test_the_cache_grows_by_less(llama):
    ids = models.tokens(1, 400)
    ratios = []
    for config in (exact(), small(), DGAConfig(dense_below=10_000)):
        with applied(llama, config):
            out = llama.generate(
                ids, do_sample=False, max_new_tokens=100, return_dict_in_generate=True
            )
        ratios.append(out[CACHE_NAME].memory().ratio)
    assert ratios[1] < 0.5 < 0.9 < min(ratios[0], ratios[2])


def test_a_cache_by_each_of_its_names(llama):
    ids = models.tokens(1, 60)
    with applied(llama, exact()):
        for name in CACHE_NAMES:
            cache = DGACache(exact(), model_config=llama.config)
            llama.generate(ids, **{name: cache}, do_sample=False, max_new_tokens=5)
            assert cache.get_seq_length() == 64
        with pytest.raises(ValueError, match="cache: expected one, got two"):
            llama.generate(ids, **dict.fromkeys(CACHE_NAMES, cache))


def test_a_cache_without_flexdga_is_not_silently_wrong(llama):
    cache = DGACache(exact(), model_config=llama.config)
    ids = models.tokens(1, 60)
    with pytest.raises(RuntimeError, match="never attended to"):
        llama.generate(ids, **{CACHE_NAME: cache}, max_new_tokens=5)
