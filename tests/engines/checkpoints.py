"""Tiny random checkpoints in the Hugging Face layout: two shards, an index, a byte tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD, INNER, VOCABULARY = 64, 2, 4, 2, 16, 128, 512
# The CPU path pads what one rank holds of an expert to 32 rows: two ranks need 64.
EXPERTS, EXPERT_INNER = 4, 64
Q_RANK, KV_RANK, NOPE, ROPE, VALUE = 48, 32, 16, 16, 16
SHARDS = 2
BLOCK = 16
QUANTIZATION = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
}

COMMON: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 256,
    "eos_token_id": 257,
}
QWEN3 = {"head_dim": HEAD, "use_sliding_window": False, "max_window_layers": LAYERS}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **QWEN3},
    "qwen3moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": EXPERT_INNER,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        **QWEN3,
    },
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "head_dim": HEAD},
    "deepseek": {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "num_key_value_heads": HEADS,
        "q_lora_rank": Q_RANK,
        "kv_lora_rank": KV_RANK,
        "qk_nope_head_dim": NOPE,
        "qk_rope_head_dim": ROPE,
        "v_head_dim": VALUE,
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": EXPERT_INNER,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "n_group": 2,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 0,
        "rope_scaling": {
            "type": "yarn",
            "rope_type": "yarn",
            "factor": 2.0,
            "original_max_position_embeddings": 256,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
        "attention_dropout": 0.0,
        "ep_size": 1,
        "initializer_range": 0.02,
    },
}

MORE_CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **QWEN3},
    "mixtral": {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "intermediate_size": EXPERT_INNER,
        "sliding_window": None,
    },
    "glm4moe": {
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        "head_dim": HEAD,
        "partial_rotary_factor": 0.5,
        "use_qk_norm": False,
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": EXPERT_INNER,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "num_nextn_predict_layers": 0,
    },
}
"""Architectures that fast load knows, beside those of the matrix."""


def _norm(size: int) -> torch.Tensor:
    return (1 + torch.randn(size) * 0.05).bfloat16()


def _matrix(*shape: int) -> torch.Tensor:
    return (torch.randn(*shape) * 0.05).bfloat16()


def _mlp(prefix: str, inner: int) -> Iterator[tuple[str, torch.Tensor]]:
    yield f"{prefix}gate_proj.weight", _matrix(inner, HIDDEN)
    yield f"{prefix}up_proj.weight", _matrix(inner, HIDDEN)
    yield f"{prefix}down_proj.weight", _matrix(HIDDEN, inner)


def _attention(kind: str, prefix: str, head: int) -> Iterator[tuple[str, torch.Tensor]]:
    if kind == "deepseek":
        yield f"{prefix}q_a_proj.weight", _matrix(Q_RANK, HIDDEN)
        yield f"{prefix}q_a_layernorm.weight", _norm(Q_RANK)
        yield f"{prefix}q_b_proj.weight", _matrix(HEADS * (NOPE + ROPE), Q_RANK)
        yield f"{prefix}kv_a_proj_with_mqa.weight", _matrix(KV_RANK + ROPE, HIDDEN)
        yield f"{prefix}kv_a_layernorm.weight", _norm(KV_RANK)
        yield f"{prefix}kv_b_proj.weight", _matrix(HEADS * (NOPE + VALUE), KV_RANK)
        yield f"{prefix}o_proj.weight", _matrix(HIDDEN, HEADS * VALUE)
        return
    yield f"{prefix}q_proj.weight", _matrix(HEADS * head, HIDDEN)
    yield f"{prefix}k_proj.weight", _matrix(KV_HEADS * head, HIDDEN)
    yield f"{prefix}v_proj.weight", _matrix(KV_HEADS * head, HIDDEN)
    yield f"{prefix}o_proj.weight", _matrix(HIDDEN, HEADS * head)
    if kind == "qwen2":
        yield f"{prefix}q_proj.bias", _norm(HEADS * head)
        yield f"{prefix}k_proj.bias", _norm(KV_HEADS * head)
        yield f"{prefix}v_proj.bias", _norm(KV_HEADS * head)
    if kind in ("qwen3", "qwen3moe"):
        yield f"{prefix}q_norm.weight", _norm(head)
        yield f"{prefix}k_norm.weight", _norm(head)


def _feed_forward(
    kind: str, layer: int, experts: int, prefix: str
) -> Iterator[tuple[str, torch.Tensor]]:
    has_shared = kind in ("deepseek", "glm4moe")
    if kind in ("qwen2", "qwen3", "llama") or (has_shared and layer == 0):
        yield from _mlp(f"{prefix}mlp.", INNER)
        return
    if kind == "mixtral":
        yield f"{prefix}block_sparse_moe.gate.weight", _matrix(experts, HIDDEN)
        for expert in range(experts):
            for name, shape in {"w1": (64, 64), "w2": (64, 64), "w3": (64, 64)}.items():
                yield f"{prefix}block_sparse_moe.experts.{expert}.{name}.weight", _matrix(*shape)
        return
    yield f"{prefix}mlp.gate.weight", _matrix(experts, HIDDEN)
    if has_shared:
        yield f"{prefix}mlp.gate.e_score_correction_bias", torch.randn(experts)
        yield from _mlp(f"{prefix}mlp.shared_experts.", EXPERT_INNER)
    for expert in range(experts):
        yield from _mlp(f"{prefix}mlp.experts.{expert}.", EXPERT_INNER)


def tensors(
    kind: str, layers: int = LAYERS, experts: int = EXPERTS, head: int = HEAD
) -> Iterator[tuple[str, torch.Tensor]]:
    """The named tensors of a model of this kind, random."""
    yield "model.embed_tokens.weight", _matrix(VOCABULARY, HIDDEN)
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        yield f"{prefix}input_layernorm.weight", _norm(HIDDEN)
        yield f"{prefix}post_attention_layernorm.weight", _norm(HIDDEN)
        yield from _attention(kind, f"{prefix}self_attn.", head)
        yield from _feed_forward(kind, layer, experts, prefix)
    yield "model.norm.weight", _norm(HIDDEN)
    yield "lm_head.weight", _matrix(VOCABULARY, HIDDEN)


def in_blocks_of_fp8(named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The projections as FP8 with a scale for each block, as DeepSeek-V3 is stored."""
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in named.items():
        if name.endswith("proj.weight"):
            rows, columns = (size // BLOCK for size in tensor.shape)
            stored[name] = tensor.to(torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = torch.rand(rows, columns) + 0.5
        else:
            stored[name] = tensor
    return dict(sorted(stored.items()))


def make_checkpoint(
    folder: Path,
    kind: str,
    seed: int,
    *,
    block_fp8: bool = False,
    layers: int = LAYERS,
    experts: int = EXPERTS,
    shards: int = SHARDS,
    head: int = HEAD,
) -> Path:
    """Write a model of this kind; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    named = dict(sorted(tensors(kind, layers, experts, head)))
    config = {**COMMON, **{**CONFIGS, **MORE_CONFIGS}[kind], "num_hidden_layers": layers}
    counts = config.keys() & {"num_experts", "n_routed_experts", "num_local_experts"}
    config.update(dict.fromkeys(counts, experts))
    if "head_dim" in config:
        config["head_dim"] = head
    if block_fp8:
        named = in_blocks_of_fp8(named)
        config["quantization_config"] = QUANTIZATION
    names = list(named)
    weight_map = {}
    size = -(-len(names) // shards)
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = names[number * size : (number + 1) * size]
        save_file({name: named[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    tokens = {"bos_token_id": 256, "eos_token_id": 257, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(tokens))
    _write_tokenizer(folder)
    return folder


def _write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer of 258 tokens, as plain JSON: no library has to write it."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = [byte for byte in range(256) if byte not in printable]
    alphabet = sorted([chr(b) for b in printable] + [chr(256 + n) for n in range(len(other))])
    vocabulary = {character: number for number, character in enumerate(alphabet)}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    special = [
        {"id": 256 + number, "content": content, "special": True, **flags}
        for number, content in enumerate(("<s>", "</s>"))
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {**byte_level, "use_regex": True},
        "post_processor": None,
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocabulary,
            "merges": [],
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "</s>",
        "model_max_length": 512,
        "chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
