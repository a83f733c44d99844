"""A random checkpoint of Qwen3-8B's shape: 16.4 GB of bfloat16 in five shards.

make_checkpoint.py FOLDER
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

LAYERS, HIDDEN, INNER, VOCABULARY, HEADS, KV_HEADS, HEAD = 36, 4096, 12288, 151936, 32, 8, 128
SHARD_BYTES = 3_600_000_000
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
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


def shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes, in the order of the layers."""
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        for name, shape in {
            "input_layernorm": (HIDDEN,),
            "mlp.down_proj": (HIDDEN, INNER),
            "mlp.gate_proj": (INNER, HIDDEN),
            "mlp.up_proj": (INNER, HIDDEN),
            "post_attention_layernorm": (HIDDEN,),
            "self_attn.k_norm": (HEAD,),
            "self_attn.k_proj": (KV_HEADS * HEAD, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HEADS * HEAD),
            "self_attn.q_norm": (HEAD,),
            "self_attn.q_proj": (HEADS * HEAD, HIDDEN),
            "self_attn.v_proj": (KV_HEADS * HEAD, HIDDEN),
        }.items():
            yield f"{prefix}{name}.weight", shape
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCABULARY, HIDDEN)


def main(folder: Path) -> None:
    """Write config, shards and index."""
    folder.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    started = time.perf_counter()
    shard: dict[str, torch.Tensor] = {}
    weight_map: dict[str, str] = {}

    def write() -> None:
        file = f"model-{len(set(weight_map.values())) + 1:05d}-of-00005.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
        shard.clear()

    for name, shape in shapes():
        shard[name] = (torch.randn(shape, device=device) * 0.02).bfloat16().cpu()
        if sum(tensor.nbytes for tensor in shard.values()) > SHARD_BYTES:
            write()
    write()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    print(f"checkpoint written in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
