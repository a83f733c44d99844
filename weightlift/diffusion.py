"""Updates of SGLang Diffusion from Python, in the process that has the pipeline."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_RUNTIME = "sglang.multimodal_gen.runtime"
_UPDATERS = (f"{_RUNTIME}.post_training.weights_updater", f"{_RUNTIME}.loader.weights_updater")


def update_weights_from_disk(
    pipeline: Any, path: str | os.PathLike[str], modules: Iterable[str] | None = None
) -> tuple[bool, str]:
    """Update a pipeline in place from another checkpoint of its kind: all of its modules, or none.

    Releases from 0.5.9 on have this themselves, and are asked to do it; in those before weightlift does.
    Every rank of the pipeline has to call it; with parallel module load they agree to update or not to.

    Args:
        pipeline: The engine's, with its components loaded.
        path: A folder with a folder for each module.
        modules: Names of those to update, such as ``transformer``; all if left out.

    Returns:
        Whether it was done, and what to say of it. If it was not, the weights before are in place.

    Raises:
        WeightliftError: Reading failed half way and the weights before cannot be read again; or this
            is a release before 0.5.7, or weightlift is off.
    """
    for name in _UPDATERS:
        if _exists(name):
            updater = importlib.import_module(name).WeightsUpdater(pipeline)
            chosen = None if modules is None else list(modules)
            done: tuple[bool, str] = updater.update_weights_from_disk(
                os.fspath(path), target_modules=chosen
            )
            return done
    from weightlift.patches.sglang_diffusion.refit import update

    return update(pipeline, Path(path), modules)


def _exists(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
