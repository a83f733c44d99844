"""The ranks that load together: SGLang's tensor-parallel group, as the core wants it."""

from __future__ import annotations

import sys
from typing import Any

import torch

from weightlift.loading.exchange import Exchange
from weightlift.loading.group import TorchGroup
from weightlift.loading.report import LoadReport
from weightlift.loading.settings import Settings


def parallel_state() -> Any:
    """The engine's module that knows the groups; it is imported before any model is loaded."""
    return sys.modules["sglang.srt.distributed.parallel_state"]


def exchange_for(report: LoadReport, device: torch.device, settings: Settings) -> Exchange | None:
    """How the ranks share the reading of this load; None if that is off, or there is one rank.

    All ranks of a group answer alike. Whether they are on one host, they find out together.
    """
    is_wanted = settings.exchange == "on" or (settings.exchange == "auto" and device.type == "cuda")
    if not (is_wanted and settings.multithread_load and torch.distributed.is_initialized()):
        return None
    group = parallel_state().get_tp_group()
    if group.world_size == 1:
        return None
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    ranks = TorchGroup(group.rank_in_group, group.world_size, group.cpu_group, group.device_group)
    return Exchange(ranks, device, report, is_forced=settings.exchange == "on")
