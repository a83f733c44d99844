"""Starts the real SGLang Diffusion by its Python API, whose worker is a process of its own.

diffusion_api.py MODEL KEYWORDS    JSON of weightlift's keywords; prints what of them is left behind
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import json
import os
import sys


def main(model: str, keywords: str) -> None:
    """Start, tell, end."""
    from sglang.multimodal_gen import DiffGenerator

    generator = DiffGenerator.from_pretrained(
        model_path=model,
        num_gpus=1,
        tp_size=1,
        attention_backend="torch_sdpa",
        local_mode=True,
        **json.loads(keywords),
    )
    kept = ("WEIGHTLIFT_PARALLEL_MODULE_LOAD", "WEIGHTLIFT_NUM_LOAD_THREADS")
    left = [name for name in kept if name in os.environ]
    sys.stdout.write(f"RESULT {json.dumps(left)}\n")
    sys.stdout.flush()
    generator.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
