"""The engine's weights, as something that can be asked for again.

``load_weights_and_postprocess`` gets an iterator that can be run once. A load that turns out
not to be plannable after half of it was seen has to start over, so the iterator's maker is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

NamedWeights = Iterator[tuple[str, torch.Tensor]]


@dataclass
class RestartableWeights:
    """An iterator over named weights that knows how it was made.

    Attributes:
        make: Makes the stock iterator.
        loader: The engine's loader that made it.
        model_path: Where the weights come from.
        phase: ``launch`` or ``update``.
    """

    make: Callable[[], NamedWeights]
    loader: Any
    model_path: str
    phase: str
    _iterator: NamedWeights | None = field(default=None, repr=False)

    def __iter__(self) -> RestartableWeights:
        return self

    def __next__(self) -> tuple[str, torch.Tensor]:
        if self._iterator is None:
            self._iterator = iter(self.make())
        return next(self._iterator)

    def restart(self) -> NamedWeights:
        """The weights from the first on, whatever was taken from this iterator."""
        return iter(self.make())

    @property
    def extra_config(self) -> Mapping[str, Any]:
        """What the user gave as ``--model-loader-extra-config``."""
        given = self.loader.load_config.model_loader_extra_config
        return given if isinstance(given, Mapping) else {}
