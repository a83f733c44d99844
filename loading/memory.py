"""What is kept between loads, and how to be rid of it."""

from __future__ import annotations

import torch

from weightlift.loading.stage import active_stage
from weightlift.loading.staging import pinned_ring


def release() -> int:
    """Free the pinned ring, what is staged, and torch's unused device memory; returns host bytes."""
    freed = pinned_ring().release()
    stage = active_stage()
    if stage is not None:
        freed += stage.close()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return freed
