"""Loads the stages of Qwen3-Omni with the real vLLM-Omni and vLLM of this process's path.

omni_stages.py make FOLDER    a random checkpoint of all stages, as transformers writes it
omni_stages.py CASES.json     see ``engines.forked``

A case has besides: model, and stage, which is thinker, talker or code2wav. Each stage is a process of
its own in the engine, with the whole checkpoint before it, of which it collects all tensors in lists
before it loads its own. The talker and code2wav compute from what they have loaded while they load.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import sys
from typing import Any

import torch

from engines.forked import run_cases
from engines.omni_harness import platform_for_loading
from engines.vllm_harness import load

ARCHITECTURE = "Qwen3OmniMoeForConditionalGeneration"
_WIDTH = {"hidden_size": 64, "intermediate_size": 64}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
_LAYERS = {"num_hidden_layers": 2, "max_position_embeddings": 512}
_MOE = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
_TEXT = {**_WIDTH, **_HEADS, **_LAYERS, **_MOE, "decoder_sparse_step": 1}
_MEDIA = {"audio_token_id": 500, "image_token_id": 501, "video_token_id": 502}
THINKER = {
    "text_config": {**_TEXT, "vocab_size": 100_000},
    "audio_config": {
        "num_mel_bins": 16,
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "d_model": 64,
        "encoder_ffn_dim": 64,
        "output_dim": 64,
        "n_window": 50,
        "downsample_hidden_size": 16,
        "max_source_positions": 100,
        "num_hidden_layers": 1,
        "conv_chunksize": 10,
    },
    "vision_config": {
        **_WIDTH,
        "depth": 1,
        "num_heads": 2,
        "out_hidden_size": 64,
        "patch_size": 16,
        "image_size": 64,
        "deepstack_visual_indexes": [0],
        "num_position_embeddings": 16,
        "apply_vit_abs_pos_embed": True,
    },
    **_MEDIA,
    "audio_start_token_id": 503,
}
TALKER = {
    "text_config": {**_TEXT, "vocab_size": 2048, "shared_expert_intermediate_size": 32},
    "code_predictor_config": {
        **_WIDTH,
        **_HEADS,
        **_LAYERS,
        "vocab_size": 64,
        "num_code_groups": 4,
    },
    "thinker_hidden_size": 64,
    "num_code_groups": 4,
    "accept_hidden_layer": 1,
    "spatial_merge_size": 2,
    "speaker_id": {},
    "codec_nothink_id": 1,
    "codec_think_bos_id": 2,
    "codec_think_eos_id": 3,
    "codec_pad_id": 4,
    "codec_bos_id": 5,
    "codec_eos_token_id": 6,
    **_MEDIA,
}
CODE2WAV = {
    **_WIDTH,
    **_LAYERS,
    "codebook_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_quantizers": 4,
    "decoder_dim": 32,
    "upsample_rates": [2, 2],
    "upsampling_ratios": [2],
}


def make(folder: str) -> None:
    """Write a checkpoint in several shards, whose names tell the stages."""
    from transformers import Qwen3OmniMoeConfig, Qwen3OmniMoeForConditionalGeneration

    config = Qwen3OmniMoeConfig(
        thinker_config=THINKER,
        talker_config=TALKER,
        code2wav_config=CODE2WAV,
        tts_bos_token_id=504,
        tts_eos_token_id=505,
        tts_pad_token_id=506,
    )
    torch.manual_seed(1)
    model = Qwen3OmniMoeForConditionalGeneration(config).to(torch.bfloat16)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder, max_shard_size="600KB")


def run(case: dict[str, Any], rank: int, port: int) -> dict[str, Any]:
    """Load one rank of a stage."""
    from vllm_omni.engine.arg_utils import OmniEngineArgs

    # 0.20's talker has parameters that nobody fills; in this mode they are the same each time.
    torch.use_deterministic_algorithms(True, warn_only=True)
    stage = case["stage"]
    config = OmniEngineArgs(
        model=case["model"],
        model_arch=ARCHITECTURE,
        model_stage=stage,
        hf_config_name=None if stage == "code2wav" else f"{stage}_config",
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=128,
        skip_tokenizer_init=True,
        worker_cls="auto",
    ).create_engine_config()
    return load(case, config, rank, port)


def main(path: str) -> None:
    """Import the engines, then run the cases."""
    platform_for_loading()
    import vllm.model_executor.model_loader  # noqa: F401
    import vllm_omni.engine.arg_utils  # noqa: F401

    run_cases(path, run)


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(sys.argv[2])
    else:
        main(sys.argv[1])
