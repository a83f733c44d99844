"""Random checkpoints of real shapes, in bfloat16 and shards of up to 4 GB.

The kinds are:

    qwen3-8b        16.4 GB, 399 tensors
    qwen3-30b-a3b   61 GB, 18,867 tensors
    single-file     7.1 GB: 12 layers of qwen3-8b in one file
    float32         9.6 GB: 6 layers of qwen3-8b, stored as float32
    small-tensors   1.3 GB: 20,000 tensors of 64 KiB
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

VOCABULARY, HEAD = 151936, 128
SHARD_BYTES = 3_600_000_000
WRITERS = 4
COMMON: dict[str, Any] = {
    "head_dim": HEAD,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
    "attention_bias": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-8b": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "qwen3-30b-a3b": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
}


SHAPES["single-file"] = {**SHAPES["qwen3-8b"], "num_hidden_layers": 12}
SHAPES["float32"] = {**SHAPES["qwen3-8b"], "num_hidden_layers": 6, "torch_dtype": "float32"}
SMALL = [(f"tensor.{number}", (32, 1024)) for number in range(20_000)]


def shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes, in the order of the layers."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    key_values, experts = config["num_key_value_heads"], config.get("num_experts", 0)
    inner = config.get("moe_intermediate_size", config["intermediate_size"])
    mlp = {"down_proj": (hidden, inner), "gate_proj": (inner, hidden), "up_proj": (inner, hidden)}
    yield "model.embed_tokens.weight", (VOCABULARY, hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        yield f"{prefix}input_layernorm.weight", (hidden,)
        if experts:
            yield f"{prefix}mlp.gate.weight", (experts, hidden)
        for expert in range(experts or 1):
            before = f"{prefix}mlp.experts.{expert}." if experts else f"{prefix}mlp."
            yield from ((f"{before}{name}.weight", shape) for name, shape in mlp.items())
        yield f"{prefix}post_attention_layernorm.weight", (hidden,)
        for name, shape in {
            "k_norm": (HEAD,),
            "k_proj": (key_values * HEAD, hidden),
            "o_proj": (hidden, heads * HEAD),
            "q_norm": (HEAD,),
            "q_proj": (heads * HEAD, hidden),
            "v_proj": (key_values * HEAD, hidden),
        }.items():
            yield f"{prefix}self_attn.{name}.weight", shape
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (VOCABULARY, hidden)


def write(
    folder: Path,
    shapes: Iterable[tuple[str, tuple[int, ...]]],
    dtype: torch.dtype,
    stem: str = "model",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write shards of random tensors and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shard: dict[str, torch.Tensor] = {}
    weight_map: dict[str, str] = {}
    writing: list[Future[None]] = []
    size = 0

    def finish_shard(pool: ThreadPoolExecutor) -> None:
        file = f"{stem}-{len(set(weight_map.values())) + 1:05d}.safetensors"
        weight_map.update(dict.fromkeys(shard, file))
        writing.append(pool.submit(save_file, dict(shard), folder / file, {"format": "pt"}))
        shard.clear()
        while sum(not job.done() for job in writing) >= WRITERS:  # each holds a shard in memory
            time.sleep(0.05)

    with ThreadPoolExecutor(WRITERS) as pool:
        for name, shape in shapes:
            shard[name] = (torch.randn(shape, device=device) * 0.02).to(dtype).cpu()
            size += shard[name].nbytes
            if size > shard_bytes:
                size = 0
                finish_shard(pool)
        finish_shard(pool)
    for job in writing:
        job.result()
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


def main() -> None:
    """Write config, shards and index."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="gets config, shards and index")
    parser.add_argument("kind", nargs="?", choices=[*SHAPES, "small-tensors"], default="qwen3-8b")
    parser.add_argument("seed", nargs="?", type=int, default=0, help="another one, other weights")
    given = parser.parse_args()
    folder, kind = given.folder, given.kind
    torch.manual_seed(given.seed)
    started = time.perf_counter()
    config = {**COMMON, **SHAPES.get(kind, {})}
    dtype = getattr(torch, config["torch_dtype"])
    shard_bytes = 1 << 40 if kind == "single-file" else SHARD_BYTES
    named = SMALL if kind == "small-tensors" else shapes(config)
    write(folder, named, dtype, shard_bytes=shard_bytes)
    (folder / "config.json").write_text(json.dumps(config))
    print(f"{kind} written in {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
