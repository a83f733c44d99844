"""Tiny random diffusion pipelines in diffusers' layout, which SGLang Diffusion loads and runs.

diffusion_checkpoints.py (wan|flux|qwen FOLDER SEED WIDTH)...

To import what makes them takes longer than to make them. The folder must have the name of the hub's model: SGLang Diffusion knows pipelines by it.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import diffusers
import safetensors.torch
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = [*"abcdefghijklmnopqrstuvwxyz", "cat", "dog", "runs", "the"]


def save(model: torch.nn.Module, folder: Path, dtype: torch.dtype, shard: str = "60KB") -> None:
    """Write a component with random weights of this dtype."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    saved: Any = model.to(dtype)
    saved.save_pretrained(folder, max_shard_size=shard)


def make_wan(folder: Path, width: int) -> None:
    """Wan 2.1: the transformer in float32, which is cast to bfloat16; three dtypes in all."""
    transformer = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=16,
        out_channels=16,
        text_dim=64,
        freq_dim=32,
        ffn_dim=width,
        num_layers=3,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=64,
    )
    save(transformer, folder / "transformer", torch.float32)
    encoder = transformers.UMT5EncoderModel(
        transformers.UMT5Config(
            vocab_size=128,
            d_model=64,
            d_kv=16,
            d_ff=width,
            num_layers=3,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
            use_cache=False,
        )
    )
    save(encoder, folder / "text_encoder", torch.bfloat16)
    vae = diffusers.AutoencoderKLWan(
        base_dim=8,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )
    save(vae, folder / "vae", torch.float32, "10GB")
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        num_train_timesteps=1000,
        flow_shift=3.0,
    )
    scheduler.save_pretrained(folder / "scheduler")
    written = folder / "scheduler/scheduler_config.json"
    known = json.loads(written.read_text())
    for name in ("shift_terminal", "sigma_min", "sigma_max"):  # which releases to 0.5.12 refuse
        known.pop(name, None)
    written.write_text(json.dumps(known))
    _word_tokenizer(folder / "tokenizer")
    components = {
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    _index(folder, "WanPipeline", components)


def make_flux(folder: Path, width: int) -> None:
    """FLUX.1: two text encoders, fused projections, bfloat16 throughout."""
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    save(transformer, folder / "transformer", torch.bfloat16, "100KB")
    block = {"block_out_channels": (16, 16), "layers_per_block": 1, "norm_num_groups": 4}
    vae = diffusers.AutoencoderKL(
        latent_channels=16,
        sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        scaling_factor=0.36,
        shift_factor=0.11,
        use_quant_conv=False,
        use_post_quant_conv=False,
        **block,
    )
    save(vae, folder / "vae", torch.bfloat16, "10GB")
    _flux_encoders(folder, width)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    scheduler.save_pretrained(folder / "scheduler")
    components = {
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    _index(folder, "FluxPipeline", components)


def _flux_encoders(folder: Path, width: int) -> None:
    """FLUX.1's two text encoders and their tokenizers."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters += [f"{letter}</w>" for letter in letters]
    vocabulary = {
        token: number for number, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])
    }
    clip = transformers.CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=32,
        max_position_embeddings=77,
        bos_token_id=vocabulary["<|startoftext|>"],
        eos_token_id=vocabulary["<|endoftext|>"],
        pad_token_id=1,
    )
    _save_clip(transformers.CLIPTextModel(clip), folder / "text_encoder")
    t5 = transformers.T5Config(
        vocab_size=320,
        d_model=32,
        d_kv=16,
        d_ff=width,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
    )
    save(transformers.T5EncoderModel(t5), folder / "text_encoder_2", torch.bfloat16)
    _clip_tokenizer(folder / "tokenizer", vocabulary)
    _word_tokenizer(folder / "tokenizer_2")


def make_qwen(folder: Path, width: int) -> None:
    """Qwen-Image: bfloat16, a language model for an encoder."""
    qwen_image_around(folder)
    transformer = diffusers.QwenImageTransformer2DModel(
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=64,
        out_channels=16,
        joint_attention_dim=64,
        axes_dims_rope=(8, 12, 12),
    )
    save(transformer, folder / "transformer", torch.bfloat16, "150KB")
    encoder = transformers.Qwen2_5_VLForConditionalGeneration(qwen_encoder(2, 64, width, 512))
    save(encoder, folder / "text_encoder", torch.bfloat16)
    weights = {
        published_name(name): value.contiguous() for name, value in encoder.state_dict().items()
    }
    for file in (folder / "text_encoder").glob("*.safetensors*"):
        file.unlink()
    file = folder / "text_encoder/model.safetensors"
    safetensors.torch.save_file(weights, file, {"format": "pt"})


def qwen_encoder(layers: int, hidden: int, width: int, vocabulary: int) -> Any:
    """The configuration of Qwen-Image's text encoder with these sizes."""
    heads = max(2, hidden // 128)
    text = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(2, heads // 7),
        "intermediate_size": width,
        "vocab_size": vocabulary,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24], "rope_type": "default"},
        "tie_word_embeddings": False,
        "max_position_embeddings": 4096,
    }
    vision = {"depth": 1, "hidden_size": 64, "num_heads": 2, "intermediate_size": 64}
    vision["out_hidden_size"] = hidden
    return transformers.Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        architectures=["Qwen2_5_VLForConditionalGeneration"],
        tie_word_embeddings=False,
        **{name: text[name] for name in ("hidden_size", "vocab_size", "num_hidden_layers")},
    )


def published_name(name: str) -> str:
    """As the files of Qwen-Image have what transformers calls this now."""
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


def qwen_image_around(folder: Path) -> None:
    """What a pipeline of Qwen-Image has besides a transformer and a text encoder."""
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1
    )
    save(vae, folder / "vae", torch.bfloat16, "10GB")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=True)
    scheduler.save_pretrained(folder / "scheduler")
    _word_tokenizer(folder / "tokenizer")
    components = {
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
        "tokenizer": ["transformers", "Qwen2Tokenizer"],
        "transformer": ["diffusers", "QwenImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLQwenImage"],
    }
    _index(folder, "QwenImagePipeline", components)


def _save_clip(model: Any, folder: Path) -> None:
    """Write CLIP with the names that published files have, which newer transformers leave out."""
    save(model, folder, torch.bfloat16)
    weights = {
        name if name.startswith("text_model.") else f"text_model.{name}": value
        for name, value in model.state_dict().items()
        if not name.endswith("position_ids")
    }
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})


def _word_tokenizer(folder: Path) -> None:
    words = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 512,
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _clip_tokenizer(folder: Path, vocabulary: dict[str, int]) -> None:
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": "<|startoftext|>",
        **dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>"),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _index(folder: Path, pipeline: str, components: dict[str, list[str]]) -> None:
    index = {"_class_name": pipeline, "_diffusers_version": "0.37.0", **components}
    (folder / "model_index.json").write_text(json.dumps(index))


def main(*arguments: str) -> None:
    """Write the pipelines."""
    makers = {"wan": make_wan, "flux": make_flux, "qwen": make_qwen}
    for kind, folder, seed, width in zip(*[iter(arguments)] * 4, strict=True):
        torch.manual_seed(int(seed))
        makers[kind](Path(folder), int(width))


if __name__ == "__main__":
    main(*sys.argv[1:])
