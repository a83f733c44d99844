"""What releases of SGLang Diffusion lack to load and run on a CPU.

Those before 0.5.13 get what later ones have for a CPU themselves; from 0.5.21 on two operators are
compiled ones, which are written out here.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# mypy: disable-error-code="attr-defined, no-untyped-call, assignment"

from __future__ import annotations

import types
from typing import Any

import torch

_SDPA = "sglang.multimodal_gen.runtime.layers.attention.backends.sdpa.SDPABackend"


def platform_for_cpu() -> None:
    """Give older releases what later ones have for a CPU themselves."""
    from sglang.multimodal_gen.runtime.platforms import current_platform

    answers = {
        "get_torch_distributed_backend_str": "gloo",
        "get_local_torch_device": torch.device("cpu"),
        "get_attn_backend_cls_str": _SDPA,
        "get_available_gpu_memory": 16.0,
    }
    properties = types.SimpleNamespace(warp_size=32, multi_processor_count=1)
    torch.cpu.get_device_properties = lambda *_: properties  # kernels up to 0.5.10 ask at import
    torch.cuda.get_device_properties = torch.cpu.get_device_properties
    torch.cuda.current_device = lambda: 0
    for name, answer in answers.items():
        if name not in vars(type(current_platform)):
            setattr(type(current_platform), name, classmethod(lambda *_, _is=answer, **__: _is))

    from sglang.multimodal_gen import envs
    from sglang.multimodal_gen.runtime.distributed import group_coordinator

    envs.get_torch_distributed_backend = lambda: "gloo"  # up to 0.5.7

    find_device = group_coordinator.get_local_torch_device
    if find_device().type != "cpu":  # up to 0.5.8 it knows of no CPU; others hold this function too
        find_device.__code__ = (lambda: torch.device("cpu")).__code__


def operators_for_cpu() -> None:
    """Write out the two compiled operators that pipelines of newer releases run on a CPU."""
    if hasattr(torch.ops.sgl_kernel, "fused_norm_scale_shift_cpu"):
        return
    library = torch.library.Library("sgl_kernel", "FRAGMENT")
    library.define(
        "fused_norm_scale_shift_cpu(Tensor x, Tensor? weight, Tensor? bias, Tensor scale, "
        "Tensor shift, str kind, float eps) -> Tensor"
    )
    library.define(
        "fused_scale_residual_norm_scale_shift_cpu(Tensor residual, Tensor x, Tensor? gate, "
        "Tensor? weight, Tensor? bias, Tensor scale, Tensor shift, str kind, float eps) "
        "-> (Tensor, Tensor)"
    )
    kind = "CompositeExplicitAutograd"
    library.impl("fused_norm_scale_shift_cpu", _norm_scale_shift, kind)
    library.impl("fused_scale_residual_norm_scale_shift_cpu", _residual_norm, kind)
    _kept.append(library)


_kept: list[Any] = []


def _norm_scale_shift(
    x: Any, weight: Any, bias: Any, scale: Any, shift: Any, kind: str, eps: float
) -> torch.Tensor:
    shape, weight = (x.shape[-1],), None if weight is None else weight.float()
    if kind == "layer":
        bias = None if bias is None else bias.float()
        normed = torch.nn.functional.layer_norm(x.float(), shape, weight, bias, eps)
    else:
        normed = torch.nn.functional.rms_norm(x.float(), shape, weight, eps)
    found: torch.Tensor = (normed * (1 + scale.float()) + shift.float()).to(x.dtype)
    return found


def _residual_norm(
    residual: Any,
    x: Any,
    gate: Any,
    weight: Any,
    bias: Any,
    scale: Any,
    shift: Any,
    kind: str,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    added = residual.float() + (x.float() if gate is None else x.float() * gate.float())
    added = added.to(residual.dtype)
    return _norm_scale_shift(added, weight, bias, scale, shift, kind, eps), added
