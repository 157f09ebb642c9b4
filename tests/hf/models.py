"""Tiny random models of many families, each as its own code in transformers makes it."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

VOCABULARY = 97
HIDDEN = 48
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,  # so that attention prefers some tokens to others
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
GROUPED = {"num_key_value_heads": 2}
MIXED = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4}
SLIDING = MIXED | {"sliding_window": 24}
NO_POSITIONS = "its code in transformers makes masks without position_ids: no packed documents"


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        config: the name of its configuration class.
        model: of its model class.
        settings: changes to `COMMON`; None removes one.
        wrapped: layers that go through DGA.
        layers: attention layers in all.
        unpacked: why packed documents cannot be given to the model itself, if so.
    """

    config: str
    model: str
    settings: dict[str, Any]
    wrapped: int = 2
    layers: int = 2
    unpacked: str = ""


DECODERS = {
    "llama": Family("LlamaConfig", "LlamaForCausalLM", GROUPED),
    "mistral": Family("MistralConfig", "MistralForCausalLM", GROUPED | {"sliding_window": None}),
    "qwen2": Family("Qwen2Config", "Qwen2ForCausalLM", GROUPED),
    "qwen2 mixed": Family(
        "Qwen2Config", "Qwen2ForCausalLM", GROUPED | SLIDING | {"use_sliding_window": True}, 2, 4
    ),
    "qwen3": Family("Qwen3Config", "Qwen3ForCausalLM", GROUPED | {"head_dim": 16}),
    "gemma2": Family(
        "Gemma2Config",
        "Gemma2ForCausalLM",
        GROUPED
        | SLIDING
        | {"head_dim": 16, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0},
        2,
        4,
    ),
    "gemma3": Family(
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        GROUPED | SLIDING | {"head_dim": 16, "query_pre_attn_scalar": 16},
        2,
        4,
    ),
    "phi3": Family("Phi3Config", "Phi3ForCausalLM", GROUPED | {"sliding_window": None}),
    "gpt2": Family("GPT2Config", "GPT2LMHeadModel", {}),
    "gpt_neox": Family("GPTNeoXConfig", "GPTNeoXForCausalLM", {}),
    "opt": Family(
        "OPTConfig", "OPTForCausalLM", {"ffn_dim": 64, "word_embed_proj_dim": HIDDEN},
        unpacked=NO_POSITIONS,
    ),
    "falcon": Family("FalconConfig", "FalconForCausalLM", {
        "new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False,
    }, unpacked=NO_POSITIONS),
    "olmo2": Family("Olmo2Config", "Olmo2ForCausalLM", GROUPED),
    "smollm3": Family(
        "SmolLM3Config", "SmolLM3ForCausalLM", GROUPED | {"no_rope_layers": [1, 0]}
    ),
    "gpt_oss": Family(
        "GptOssConfig",
        "GptOssForCausalLM",
        GROUPED | SLIDING | {"head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1},
        2,
        4,
        NO_POSITIONS,
    ),
}  # fmt: skip
ENCODERS = {
    "bert": Family("BertConfig", "BertModel", {}),
    "modernbert": Family(
        "ModernBertConfig",
        "ModernBertModel",
        SLIDING | {"sliding_window": None, "local_attention": 24, "attention_dropout": 0.0},
        2,
        4,
    ),
    "vit": Family("ViTConfig", "ViTModel", {"image_size": 40, "patch_size": 4}),
}
FAMILIES = DECODERS | ENCODERS


def make(name: str, **changes: Any) -> PreTrainedModel:
    """A new model, always with the same weights."""
    family = FAMILIES[name]
    settings = COMMON | family.settings | changes
    if name == "modernbert":
        del settings["sliding_window"]
    torch.manual_seed(1)
    config = getattr(transformers, family.config)(**settings)
    model = getattr(transformers, family.model)(config)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id = None  # random models would stop early
    return model.eval()


@functools.cache
def shared(name: str) -> PreTrainedModel:
    """The model of a family, for all tests that leave it as it was."""
    return make(name)


def tokens(*shape: int) -> torch.Tensor:
    """Random token ids, none of them padding."""
    return torch.randint(2, VOCABULARY, shape)


def padded(lengths: list[int], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Random token ids (B, L) of these lengths, and their attention mask."""
    total = max(lengths)
    mask = torch.arange(total) < torch.tensor(lengths)[:, None]
    if side == "left":
        mask = mask.flip(1)
    return tokens(len(lengths), total) * mask, mask.long()
