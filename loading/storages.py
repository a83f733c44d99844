"""The memory that the weights of models lie in, whatever lies how in it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

Placed = tuple[torch.Tensor, int]


@dataclass(slots=True)
class Storage:
    """Memory of tensors: one, or several that are tied or views of it.

    Attributes:
        name: Of the first of them.
        memory: All of it: flat uint8.
        tensors: Weights and buffers, and the element of the memory at which each starts.
    """

    name: str
    memory: torch.Tensor
    tensors: list[Placed] = field(default_factory=list)


def storages_of(models: Mapping[str, torch.nn.Module], device_type: str) -> list[Storage]:
    """The distinct memories on such devices that weights and buffers of the models lie in."""
    found: dict[tuple[torch.device, int], Storage] = {}
    seen: set[int] = set()
    for name, tensor in _tensors(models):
        if id(tensor) in seen or tensor.device.type != device_type or not _is_plain(tensor):
            continue
        seen.add(id(tensor))
        storage = tensor.untyped_storage()
        if not storage.nbytes():
            continue
        key = (tensor.device, storage.data_ptr())
        if key not in found:
            memory = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            found[key] = Storage(name, memory)
        found[key].tensors.append((tensor, int(tensor.storage_offset())))
    return list(found.values())


def lay(tensors: Iterable[Placed], memory: torch.Tensor) -> None:
    """Let tensors lie in another memory, flat uint8, as they did in their own."""
    for tensor, start in tensors:
        start += int(memory.storage_offset()) // tensor.element_size()
        with torch.inference_mode(mode=tensor.is_inference()):  # it must stay what it is
            place = torch.empty(0, dtype=tensor.dtype, device=memory.device)
            place.set_(memory.untyped_storage(), start, tensor.size(), tensor.stride())
            tensor.data = place


def _tensors(models: Mapping[str, torch.nn.Module]) -> Iterator[tuple[str, torch.Tensor]]:
    for model_name, model in models.items():
        yield from model.named_parameters(model_name, remove_duplicate=False)
        yield from model.named_buffers(model_name, remove_duplicate=False)


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor's own memory holds its values.

    Distributed and quantised tensors may wrap others; those of conjugated or negated views are changed
    when they are read.
    """
    is_changed = tensor.is_conj() or tensor.is_neg()
    is_wrapper = is_traceable_wrapper_subclass(tensor)
    return tensor.layout is torch.strided and not (is_changed or is_wrapper)
