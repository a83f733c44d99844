"""The whole vLLM engine of this process's path: launch, generate, reload, generate.

vllm_engine.py RANKS MODEL SECOND [DAMAGED]    prints ``RESULT [[tokens, hash a rank], ...]``: of MODEL, then of
SECOND after ``reload_weights``, then of MODEL again, and after that failed with DAMAGED, with the error.
WEIGHTLIFT=0 for the stock engine. Several ranks are processes of the engine's own.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import json
import os
import sys

from vllm import LLM, SamplingParams

from engines.forked import state_hash

PROMPT = {"prompt_token_ids": [10, 20, 30, 40]}


def main(ranks: str, model: str, second: str, *damaged: str) -> None:
    """Run and tell."""
    engine = LLM(
        model=model,
        tensor_parallel_size=int(ranks),
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=2,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    told = []
    for path in (None, second, model, *damaged):
        error = []
        try:
            if path:
                engine.collective_rpc("reload_weights", kwargs={"weights_path": path})
        except RuntimeError as raised:
            error = [str(raised)]
        (answer,) = engine.generate(PROMPT, sampling, use_tqdm=False)
        states = engine.apply_model(state_hash)
        told.append([list(answer.outputs[0].token_ids), states, *error])
    os.write(1, f"\nRESULT {json.dumps(told)}\n".encode())
    if ranks == "1":
        os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
