"""`wrap`, `unwrap`, `applied` and `report` on transformers models; the implementation by name."""

from __future__ import annotations

import copy
import functools
import logging
import pickle

import models
import pytest
import torch
import transformers
from helpers import small
from torch import nn
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask

from flexdga import DGACache, DGAConfig, applied, report, saying, unwrap, wrap
from flexdga.cache import CACHE_NAME, DGALayer

exact = functools.partial(small, focal_ratio=1.0)
lossy = functools.partial(small, focal_ratio=0.0)


@pytest.fixture
def llama():
    return models.make("llama")


@pytest.fixture
def ids():
    return models.tokens(2, 130)


def state(model: nn.Module) -> list[object]:
    """All that wrapping may change."""
    return [
        (name, sorted(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ] + [model.config._attn_implementation, model.config.to_dict()]


# Undoing


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "modernbert", "falcon"])
def test_unwrap_restores_exactly(name, ids):
    model = models.make(name)
    before, want = state(model), model(ids)[0]
    wrap(model, lossy())
    assert state(model) != before
    assert not torch.equal(model(ids)[0], want)
    assert unwrap(model) is model
    assert state(model) == before
    assert torch.equal(model(ids)[0], want)
    assert not [name for m in model.modules() for name in vars(m) if "flexdga" in name]
    with pytest.raises(ValueError, match="expected a wrapped model"):
        unwrap(model)
    with pytest.raises(ValueError, match="expected a wrapped model"):
        report(model)


def test_unwrap_restores_a_generate_of_the_instance(llama):
    llama.generate = mine = functools.partial(type(llama).generate, llama)
    unwrap(wrap(llama, exact()))
    assert llama.generate is mine


def test_applied_undoes_when_the_body_raises(llama, ids):
    before = state(llama)
    with pytest.raises(KeyError), applied(llama, exact()) as same:
        assert same is llama
        llama(ids)
        raise KeyError
    assert state(llama) == before


# Layers


def numbers(model: nn.Module, attribute: str) -> list[int]:
    return [getattr(row, attribute) for row in report(model).rows]


@pytest.mark.parametrize("layers", [{0: None}, lambda i: None if i == 0 else exact()])
def test_a_dense_layer(llama, ids, layers):
    new = {"do_sample": False, "max_new_tokens": 40, "return_dict_in_generate": True}
    want, said = llama(ids).logits, llama.generate(ids, **new).sequences
    wrap(llama, exact(), layers=layers)
    assert (llama(ids).logits - want).abs().max() < 1e-4
    assert numbers(llama, "wrapped") == [False, True]
    assert numbers(llama, "replaced") == [0, 1] and numbers(llama, "passed") == [1, 0]
    out = llama.generate(ids, **new)
    assert torch.equal(out.sequences, said)
    assert [layer.cache.done > 0 for layer in out[CACHE_NAME].layers] == [False, True]


def test_layers_of_their_own(llama, ids):
    """The second layer alone is lossy: it differs from both dense and all-lossy."""
    dense = llama(ids).logits
    got = []
    for layers in (None, {0: exact()}):
        with applied(llama, lossy(), layers=layers):
            got.append(llama(ids).logits)
            out = llama.generate(ids, max_new_tokens=2, return_dict_in_generate=True)
            slots = [layer.cache.num_slots for layer in out[CACHE_NAME].layers]
    assert slots[0] > slots[1] > 0
    for one, other in ((got[0], got[1]), (got[1], dense)):
        assert (one - other).abs().max() > 1e-2


def test_the_cache_has_the_layers_of_the_model():
    """Numbers of layers count attention layers; sliding ones are never DGA's."""
    model = models.make("gemma3")
    wrap(model, lossy(), layers={3: None})
    out = model.generate(models.tokens(1, 130), max_new_tokens=2, return_dict_in_generate=True)
    cache = out[CACHE_NAME]
    assert [isinstance(layer, DGALayer) for layer in cache.layers] == [False, True, False, True]
    assert cache.layers[1].cache.num_slots and not cache.layers[3].cache.num_slots
    sliding = "sliding window of 24, left as it is"
    reasons = [row.why for row in report(model).rows]
    assert reasons == [sliding, "causal", sliding, "left dense by `layers`"]


def test_report(llama, ids):
    wrap(llama, small())
    llama(ids)
    llama(ids)
    rows = report(llama).rows
    assert [row.name for row in rows] == [f"model.layers.{i}.self_attn" for i in (0, 1)]
    for row in rows:
        assert (row.wrapped, row.replaced, row.passed, row.tokens) == (True, 2, 0, 130)
        assert 0 < row.slots < 60
    assert "model.layers.1.self_attn" in str(report(llama))
    out = llama.generate(ids, max_new_tokens=5, return_dict_in_generate=True)
    cache = out[CACHE_NAME].layers[0].cache
    assert rows[0].tokens == 134 and rows[0].slots == cache.num_slots + cache.num_raw


# Refusals


def test_wrapping_twice(llama):
    wrap(llama)
    with pytest.raises(ValueError, match=r"wrapped already; unwrap\(model\) first"):
        wrap(llama)


@pytest.mark.parametrize("name", ["T5", "Bart"])
def test_encoder_decoders(name):
    config = getattr(transformers, f"{name}Config")(
        vocab_size=97, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, num_decoder_layers=1,
        encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32, decoder_ffn_dim=32,
        encoder_attention_heads=2, decoder_attention_heads=2,
    )  # fmt: skip
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    before = state(model)
    with pytest.raises(ValueError, match="encoder-decoder, whose cross-attention"):
        wrap(model)
    assert state(model) == before


def test_nothing_but_sliding_windows():
    model = models.make("mistral", sliding_window=24)
    before = state(model)
    with pytest.raises(ValueError, match="nothing to wrap in MistralForCausalLM: sliding window"):
        wrap(model)
    with pytest.raises(ValueError, match="left dense by `layers`"):
        wrap(models.make("llama"), layers=lambda index: None)
    assert state(model) == before


def test_latent_attention():
    """DeepSeek caches latents: a prompt goes through DGA, decoding stays the model's own."""
    torch.manual_seed(1)
    settings = models.COMMON | {
        "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16, "v_head_dim": 16, "first_k_dense_replace": 2,
    }  # fmt: skip
    model = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**settings)).eval()
    model.generation_config.eos_token_id = None
    ids, mask = models.padded([70, 50], "left")
    settings = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 20}
    want = model.generate(ids, **settings)
    with applied(model, exact()):
        assert torch.equal(model.generate(ids, **settings), want)
        assert numbers(model, "replaced") == [1, 1] and numbers(model, "passed") == [19, 19]
        assert all("latents" in row.why for row in report(model).rows)
    with pytest.raises(ValueError, match="DeepseekV3Config has latent attention"):
        DGACache(model_config=model.config)


def test_cross_attention_stays():
    model = models.make("gpt2", add_cross_attention=True)
    ids, states = models.tokens(1, 100), torch.randn(1, 100, models.HIDDEN)
    want = model(ids, encoder_hidden_states=states).logits
    wrap(model, exact())
    assert (model(ids, encoder_hidden_states=states).logits - want).abs().max() < 1e-4
    assert numbers(model, "wrapped") == [True, False] * 2
    assert numbers(model, "passed") == [0, 1] * 2
    assert "cross-attention" in report(model).rows[1].why


def test_layers_of_a_wrong_type(llama):
    with pytest.raises(TypeError, match="layers: expected DGAConfig or None for layer 0, got 16"):
        wrap(llama, layers=lambda index: 16)
    assert llama.config._attn_implementation == "sdpa"


def test_dropout(ids):
    model = models.make("llama", attention_dropout=0.1)
    wrap(model, exact())
    model(ids)
    model.train()
    with pytest.raises(NotImplementedError, match=r"attention_dropout: .* got 0\.1"):
        model(ids)


def test_causal_scope_of_an_encoder():
    with pytest.raises(ValueError, match="BertModel: both directions, and scope='causal'"):
        wrap(models.make("bert"), small(scope="causal"))


def test_a_decoder_as_an_encoder(llama, ids):
    want = llama(ids, is_causal=False, use_cache=False).logits
    with applied(llama, exact()):
        got = llama(ids, is_causal=False, use_cache=False).logits
        assert numbers(llama, "replaced") == [1, 1]
    assert (got - want).abs().max() < 1e-4


# Masks


def test_masks_over_pairs_of_tokens_run_dense(llama, ids, caplog, monkeypatch):
    """With one warning; where nothing ever went through DGA, that is an error."""
    monkeypatch.setattr(saying, "_said", set())
    near = torch.ones(130, 130, dtype=torch.bool).tril().triu(-30).expand(2, 1, -1, -1)
    want = llama(ids, attention_mask=near).logits
    wrap(llama, lossy())
    with caplog.at_level(logging.WARNING, "flexdga"):
        with pytest.raises(RuntimeError, match="went through DGA: its layers got masks over pairs"):
            llama(ids, attention_mask=near)
        llama(ids)
        for _ in range(2):
            got = llama(ids, attention_mask=near).logits
    assert torch.equal(got, want)
    assert len(caplog.records) == 1 and "exact dense" in caplog.text
    assert numbers(llama, "replaced") == [1, 1] and numbers(llama, "passed") == [3, 3]
    cache = DGACache(lossy(), model_config=llama.config)
    with pytest.raises(NotImplementedError, match="cannot be applied to a DGACache"):
        llama(ids, attention_mask=near, **{CACHE_NAME: cache})


def test_softcaps_with_masks_over_pairs_of_tokens(ids):
    """Bool, and numbers to be added."""
    model = models.make("gemma2")
    near = torch.ones(130, 130, dtype=torch.bool).tril().triu(-30).expand(2, 1, -1, -1)
    added = torch.zeros(near.shape).masked_fill(~near, torch.finfo(torch.float32).min)
    want = model(ids, attention_mask=added).logits
    with applied(model, exact()):
        model(ids)
        for mask in (near, added):
            got = model(ids, attention_mask=mask).logits
            assert (got - want).abs().max() < 1e-4


def test_a_mask_that_must_not_be_skipped(llama, ids):
    """Models ask for it that add to it what flexdga does not know of."""
    llama.set_attn_implementation("flexdga")
    arguments = (llama.config, llama.get_input_embeddings()(ids), None, None)
    assert create_causal_mask(*arguments) is None
    made = create_causal_mask(*arguments, allow_is_causal_skip=False)
    assert torch.equal(made[0, 0], torch.ones(130, 130, dtype=torch.bool).tril())
    made = create_bidirectional_mask(*arguments[:3], allow_is_bidirectional_skip=False)
    assert made.shape == (2, 1, 130, 130) and made.all()


# By name


def test_by_name(llama, ids, tmp_path):
    want = llama(ids).logits
    llama.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="flexdga"
    )
    llama.set_attn_implementation("flexdga")
    for model in (llama, loaded):
        assert model.config._attn_implementation == "flexdga"
        assert (model(ids).logits - want).abs().max() < 1e-4  # dense: shorter than dense_below
        said = model.generate(ids, do_sample=False, max_new_tokens=5)
        cache = DGACache(exact(), model_config=model.config)
        again = model.generate(ids, do_sample=False, max_new_tokens=5, **{CACHE_NAME: cache})
        assert torch.equal(said, again) and cache.layers[0].cache.num_slots


@pytest.mark.parametrize("config", [None, small(scope="causal")])
def test_a_padded_batch_is_causal(llama, config):
    ids, mask = models.padded([130, 97], "left")
    if config is None:
        llama.set_attn_implementation("flexdga")
    else:
        wrap(llama, config)
    before = llama(ids, attention_mask=mask).logits
    ids[:, 100:] = 5
    after = llama(ids, attention_mask=mask).logits
    assert torch.equal(before[:, :100], after[:, :100])
    assert not torch.equal(before[:, 100:], after[:, 100:])


def test_wrapping_a_model_set_by_name(llama, ids):
    llama.set_attn_implementation("flexdga")
    llama(ids)
    with applied(llama, lossy()):
        llama(ids)
        assert numbers(llama, "replaced") == [1, 1]
    assert llama.config._attn_implementation == "flexdga"
    assert not [name for m in llama.modules() for name in vars(m) if "flexdga" in name]


# Copies


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_copies_work_by_themselves(name, how):
    model, ids = models.make(name), models.tokens(1, 100)
    dense = model(ids)[0]
    wrap(model, small())
    want = model(ids)[0]
    other = how(model)
    assert torch.equal(other(ids)[0], want)
    first, second = ([r.replaced for r in report(m).rows if r.wrapped] for m in (model, other))
    assert set(first) == {1} and set(second) == {2}
    new = {"do_sample": False, "max_new_tokens": 4, "return_dict_in_generate": True}
    new["output_logits"] = True
    out, said = other.generate(ids, **new), model.generate(ids, **new)
    assert isinstance(out[CACHE_NAME], DGACache)
    assert torch.equal(out.logits[-1], said.logits[-1])
    other.get_output_embeddings().weight.mul_(2)  # its generate runs the copy, not the original
    assert not torch.equal(other.generate(ids, **new).logits[0], said.logits[0])
    unwrap(other)
    assert other.config._attn_implementation != "flexdga"
    assert torch.equal(model(ids)[0], want) and not torch.equal(want, dense)


def test_default_config_is_dense_below(llama, ids):
    want = llama(ids).logits
    with applied(llama, DGAConfig()):
        assert (llama(ids).logits - want).abs().max() < 1e-5
