"""What is kept between loads, and how to be rid of it."""

from __future__ import annotations

import torch

from weightlift.loading.crews import crews
from weightlift.loading.shared_files import shared_files
from weightlift.loading.sleep import sleepers
from weightlift.loading.stage import active_stage


def release() -> int:
    """Free what is kept, and return its host bytes.

    That is reader processes and their memory, what is staged, files that stay page-locked, host copies of
    models that are awake, and torch's unused device memory.
    """
    freed = crews.release() + sum(sleeper.release() for sleeper in list(sleepers))
    stage = active_stage()
    if stage is not None:
        freed += stage.close()
    freed += shared_files().release()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return freed
