"""What is replaced in the engines: one folder an engine, one file a topic.

Nothing here imports torch or an engine before that engine has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from weightlift.compat.engines import Engine


@dataclass(frozen=True)
class Integration:
    """What weightlift does to one engine.

    Attributes:
        engine: Its import name.
        versions: PEP 440 range of the versions that the tests load models with.
        newest: The newest of them, which later versions are taken for on request.
        patch_files: By module of the engine, the module of ours with its ``PATCHES``.
    """

    engine: str
    versions: str
    newest: str
    patch_files: Mapping[str, str]

    def selected_version(self, engine: Engine, *, untested: bool) -> Version | None:
        """The version whose patches this engine gets, or None if it gets none."""
        version = engine.parsed
        if version and SpecifierSet(self.versions).contains(version, prereleases=True):
            return version
        return Version(self.newest) if untested else None


SGLANG = Integration(
    engine="sglang",
    versions=">=0.4.9.post2,<0.5.24",
    newest="0.5.23",
    patch_files={
        "sglang.srt.model_loader.loader": "weightlift.patches.sglang.loader",
        "sglang.srt.server_args": "weightlift.patches.sglang.flags",
        "sglang.srt.entrypoints.engine": "weightlift.patches.sglang.keywords",
    },
)

INTEGRATIONS: tuple[Integration, ...] = (SGLANG,)
