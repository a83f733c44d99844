"""What repeats in SGLang's models, where that was tested against the engine's own loads.

Names of layers and experts are the same in all of them. What differs is what a loader does besides
copying: DeepSeek's computes ``w_kc`` and ``w_vc`` after the last tensor, for the layers whose
``kv_b_proj`` it saw.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping

import torch

from weightlift.loading.families import Families

PLAIN = Families()

FAMILIES: Mapping[str, Families] = {
    "Qwen2ForCausalLM": PLAIN,
    "Qwen2MoeForCausalLM": PLAIN,
    "Qwen3ForCausalLM": PLAIN,
    "Qwen3MoeForCausalLM": PLAIN,
    "LlamaForCausalLM": PLAIN,
    "MixtralForCausalLM": PLAIN,
    "Glm4MoeForCausalLM": PLAIN,
    "DeepseekV2ForCausalLM": Families(seen=("kv_b_proj",)),
    "DeepseekV3ForCausalLM": Families(seen=("kv_b_proj",)),
}
"""By class of the model. A subclass counts for itself alone: its loader may do more."""


def families_of(model: torch.nn.Module) -> Families | None:
    """What repeats in this model, if that is declared and its experts are where they belong."""
    arrangement = _expert_arrangement()
    if arrangement is not None:
        experts = int(arrangement.max()) + 1
        natural = torch.arange(arrangement.shape[-1]) % experts
        if not bool((arrangement == natural).all()):
            return None
    return FAMILIES.get(type(model).__name__)


def unknown_to_fast_load(model: torch.nn.Module) -> str:
    """Why fast load knows nothing of this model, or ''."""
    name = type(model).__name__
    if name in FAMILIES:
        return ""
    return f"it was not tested with {name}; it knows {', '.join(sorted(FAMILIES))}"


def configuration(model: torch.nn.Module) -> str:
    """What the model's loader depends on besides its parameters: ranks, and where experts are."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    ranks = (
        (torch.distributed.get_rank(), torch.distributed.get_world_size())
        if distributed
        else (0, 1)
    )
    arrangement = _expert_arrangement()
    experts = ""
    if arrangement is not None:
        experts = hashlib.sha256(arrangement.contiguous().numpy().tobytes()).hexdigest()
    return f"{type(model).__qualname__} rank {ranks[0]} of {ranks[1]} experts {experts}"


def _expert_arrangement() -> torch.Tensor | None:
    """Which expert is where, by layer and place; load balancing changes it as the server runs."""
    module = sys.modules.get("sglang.srt.eplb.expert_location")
    metadata = module.get_global_expert_location_metadata() if module else None
    if metadata is None:
        return None
    found: torch.Tensor = metadata.physical_to_logical_map.cpu()
    return found
