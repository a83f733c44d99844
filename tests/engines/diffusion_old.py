"""Has a release of SGLang Diffusion before 0.5.7 load the components of no pipeline.

diffusion_old.py MODULE    of its runtime, with ComposedPipelineBase

Prints the error where parallel module load is asked for, then the one where it is not.
"""

from __future__ import annotations

import importlib
import os
import sys


def main(module: str) -> None:
    """Import the engine's module, then call the method that loads components, twice."""
    runtime = importlib.import_module(f"sglang.multimodal_gen.runtime.{module}")
    for asked in ("1", "0"):
        os.environ["WEIGHTLIFT_PARALLEL_MODULE_LOAD"] = asked
        try:
            runtime.ComposedPipelineBase.load_modules(object(), None)
        except Exception as error:  # noqa: BLE001 - told, for it is the result
            sys.stdout.write(f"RESULT {type(error).__name__}: {error}\n")


if __name__ == "__main__":
    main(sys.argv[1])
