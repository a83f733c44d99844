"""The parameters and buffers of a model: what a load writes to, by name and by address."""

from __future__ import annotations

import bisect
from collections.abc import Mapping

import torch

from weightlift.loading.transfer import extent

Geometry = tuple[tuple[object, ...], ...]


class Parameters:
    """Tensors by name, and whose an address is.

    Args:
        named: Parameters and buffers; those without memory of their own are left out.
        buffers: Names of those that are buffers, which modules often share.
    """

    def __init__(
        self, named: Mapping[str, torch.Tensor], buffers: frozenset[str] = frozenset()
    ) -> None:
        self.buffers = buffers
        self.tensors = {
            name: tensor.detach() for name, tensor in named.items() if _has_memory(tensor)
        }
        spans = sorted((tensor.data_ptr(), name) for name, tensor in self.tensors.items())
        self._starts = [start for start, _ in spans]
        self._names = [name for _, name in spans]
        self._memory: dict[str, torch.Tensor] = {}

    @classmethod
    def of(cls, model: torch.nn.Module) -> Parameters:
        """Those of a model, each under its first name."""
        buffers = dict(model.named_buffers())
        return cls({**dict(model.named_parameters()), **buffers}, frozenset(buffers))

    def locate(self, target: torch.Tensor) -> tuple[str, int] | None:
        """Whose memory ``target`` starts in, and at which byte of it."""
        address = target.data_ptr()
        position = bisect.bisect_right(self._starts, address) - 1
        if position < 0:
            return None
        name = self._names[position]
        place = address - self._starts[position]
        end = place + extent(tuple(target.shape), target.stride()) * target.element_size()
        return (name, place) if end <= span(self.tensors[name]) else None

    def memory(self, name: str) -> torch.Tensor:
        """The bytes of a parameter from its first element to its last: flat uint8."""
        found = self._memory.get(name)
        if found is None:
            tensor = self.tensors[name]
            start = tensor.storage_offset() * tensor.element_size()
            found = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(
                tensor.untyped_storage(), start, (span(tensor),), (1,)
            )
            self._memory[name] = found
        return found

    def storages(self) -> dict[int, torch.Tensor]:
        """A tensor of each storage that they are in, by its address."""
        return {tensor.untyped_storage().data_ptr(): tensor for tensor in self.tensors.values()}

    def are_alike(self, name: str, other: str) -> bool:
        """Whether what fits one of two fits the other."""
        if other not in self.tensors:
            return False
        return name == other or form(self.tensors[name]) == form(self.tensors[other])

    def geometry(self) -> Geometry:
        """Name, address, shape, strides, dtype and device of each, in the model's order."""
        return tuple(
            (name, tensor.data_ptr(), *form(tensor)) for name, tensor in self.tensors.items()
        )


def form(tensor: torch.Tensor) -> tuple[object, ...]:
    """What two tensors must have in common for a move into one to fit the other."""
    return (tuple(tensor.shape), tensor.stride(), str(tensor.dtype), str(tensor.device))


def span(tensor: torch.Tensor) -> int:
    """Bytes from a tensor's first element to its last."""
    if tensor.is_contiguous():
        return tensor.nbytes
    return extent(tuple(tensor.shape), tensor.stride()) * tensor.element_size()


def _has_memory(tensor: torch.Tensor) -> bool:
    return (
        tensor.layout is torch.strided
        and tensor.device.type in ("cpu", "cuda")
        and tensor.numel() > 0
        and type(tensor.data) is torch.Tensor
    )
