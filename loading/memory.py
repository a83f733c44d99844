"""What is kept between loads, and how to be rid of it."""

from __future__ import annotations

import torch

from weightlift.loading.crews import crews
from weightlift.loading.sleep import sleepers
from weightlift.loading.stage import active_stage


def release() -> int:
    """End reader processes, free their memory, what is staged, host copies of models that are awake, and torch's unused device memory; returns host bytes."""
    freed = crews.release() + sum(sleeper.release() for sleeper in list(sleepers))
    stage = active_stage()
    if stage is not None:
        freed += stage.close()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return freed
