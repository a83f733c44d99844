"""What is replaced in the engines: one folder an engine, one file a topic.

Nothing here imports torch or an engine before that engine has.
"""

from __future__ import annotations

from dataclasses import dataclass

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from weightlift.compat.engines import Engine


@dataclass(frozen=True)
class PatchFile:
    """The patches of one module of an engine.

    Attributes:
        target: The engine's module.
        source: The module of ours with its ``PATCHES``; those of other targets do not count.
        versions: PEP 440 range of the releases that have the target.
        topic: Tells two files for one target apart.
        extra: What has to be installed for this part of the engine, if that is more than the engine.
        switch: The option that asks for what these patches do.
    """

    target: str
    source: str
    versions: str = ">=0"
    topic: str = ""
    extra: str = ""
    switch: str = "multithread_load"

    @property
    def label(self) -> str:
        """What its outcome is listed under."""
        return f"{self.target} {self.topic}".rstrip()


@dataclass(frozen=True)
class Integration:
    """What weightlift does to one engine.

    Attributes:
        engine: Its import name.
        versions: PEP 440 range of the versions that the tests load models with.
        newest: The newest of them, which later versions are taken for on request.
        patch_files: What is patched, module by module.
        logger: The engine's logger, if that is the only one that it sets up.
    """

    engine: str
    versions: str
    newest: str
    patch_files: tuple[PatchFile, ...]
    logger: str = ""

    def selected_version(self, engine: Engine, *, untested: bool) -> Version | None:
        """The version whose patches this engine gets, or None if it gets none."""
        version = engine.parsed
        if version and SpecifierSet(self.versions).contains(version, prereleases=True):
            return version
        return Version(self.newest) if untested else None

    def files(self, engine: Engine) -> list[PatchFile]:
        """The modules that are patched in this engine, which may be of an untested version."""
        version = self.selected_version(engine, untested=True)
        assert version, "the newest version stands in for those that are not known"
        return [
            file
            for file in self.patch_files
            if SpecifierSet(file.versions).contains(version, prereleases=True)
        ]


DIFFUSION = "sglang.multimodal_gen"
"""SGLang Diffusion, a package of SGLang with flags and loaders of its own."""

SGLANG_DIFFUSION = ">=0.5.7,<0.5.24"
"""Its releases whose components the tests load; those before are of another make."""

_DIFFUSION = f"{DIFFUSION}.runtime"
_MEMORY = "managers.memory_managers"

SGLANG = Integration(
    engine="sglang",
    versions=">=0.4.9.post2,<0.5.24",
    newest="0.5.23",
    patch_files=(
        PatchFile("sglang.srt.model_loader.loader", "weightlift.patches.sglang.loader"),
        PatchFile("sglang.srt.server_args", "weightlift.patches.sglang.flags"),
        PatchFile("sglang.srt.entrypoints.engine", "weightlift.patches.sglang.keywords"),
        PatchFile(
            "sglang.srt.entrypoints.engine", "weightlift.patches.sglang.server", topic="processes"
        ),
        PatchFile("sglang.srt.entrypoints.http_server", "weightlift.patches.sglang.server"),
        PatchFile(
            "sglang.srt.model_executor.model_runner",
            "weightlift.patches.sglang.updates",
            "<0.5.16",
        ),
        PatchFile(
            "sglang.srt.model_executor.model_runner_components.weight_updater",
            "weightlift.patches.sglang.updates",
            ">=0.5.16",
        ),
        *(
            PatchFile(
                f"{_DIFFUSION}.{module}",
                f"weightlift.patches.sglang_diffusion.{source}",
                versions,
                topic=source if source in ("weights", "agreement", "offload") else "",
                extra="sglang[diffusion]",
                switch="parallel_module_load",
            )
            for module, source, versions in (
                ("pipelines.composed_pipeline_base", "pipelines", ">=0.5.5,<0.5.6"),
                ("pipelines_core.composed_pipeline_base", "pipelines", ">=0.5.6,<0.5.24"),
                ("loader.component_loader", "components", ">=0.5.7,<0.5.9"),
                ("loader.component_loader", "weights", ">=0.5.7,<0.5.9"),
                ("loader.component_loaders.component_loader", "components", ">=0.5.9,<0.5.24"),
                ("loader.component_loaders.vae_loader", "weights", ">=0.5.9,<0.5.19"),
                ("loader.weight_utils", "weights", SGLANG_DIFFUSION),
                ("loader.fsdp_load", "weights", SGLANG_DIFFUSION),
                ("loader.fsdp_load", "offload", ">=0.5.8,<0.5.18"),
                ("loader.component_loader", "offload", ">=0.5.8,<0.5.9"),
                ("loader.component_loaders.text_encoder_loader", "offload", ">=0.5.9,<0.5.18"),
                ("loader.weights_updater", "updates", ">=0.5.9,<0.5.14"),
                ("loader.weights_updater", "agreement", ">=0.5.9,<0.5.14"),
                ("post_training.weights_updater", "updates", ">=0.5.14,<0.5.24"),
                ("post_training.weights_updater", "agreement", ">=0.5.14,<0.5.24"),
                ("utils.layerwise_offload", "layerwise", ">=0.5.7,<0.5.11"),
                ("managers.layerwise_offload", "layerwise", ">=0.5.11,<0.5.13"),
                (f"{_MEMORY}.layerwise_offload", "layerwise", ">=0.5.13,<0.5.20"),
                (f"{_MEMORY}.memory_occupation_controller", "sleep", ">=0.5.15,<0.5.24"),
                ("server_args", "flags", ">=0.5.7,<0.5.16"),
                ("server_args.server_args", "flags", ">=0.5.16,<0.5.24"),
                ("entrypoints.diffusion_generator", "flags", SGLANG_DIFFUSION),
            )
        ),
    ),
)

VLLM = Integration(
    engine="vllm",
    versions=">=0.14,<0.34",
    newest="0.33.0",
    patch_files=(
        PatchFile(
            "vllm.model_executor.model_loader.default_loader", "weightlift.patches.vllm.loader"
        ),
        PatchFile("vllm.v1.worker.gpu_model_runner", "weightlift.patches.vllm.reload", ">=0.18"),
        PatchFile("vllm.v1.worker.gpu.model_runner", "weightlift.patches.vllm.reload", ">=0.32"),
        PatchFile("vllm.entrypoints.cli.serve", "weightlift.patches.vllm.flags"),
        PatchFile("vllm.entrypoints.llm", "weightlift.patches.vllm.flags"),
    ),
    logger="vllm",
)

VLLM_OMNI = Integration(
    engine="vllm_omni",
    versions=">=0.14,<0.33",
    newest="0.32.0rc1",
    patch_files=(
        PatchFile(
            "vllm_omni.diffusion.model_loader.diffusers_loader",
            "weightlift.patches.vllm_omni.loader",
        ),
        PatchFile("vllm_omni.entrypoints.cli.serve", "weightlift.patches.vllm_omni.flags"),
        PatchFile("vllm_omni.entrypoints.omni", "weightlift.patches.vllm_omni.flags", "<0.18"),
        PatchFile(
            "vllm_omni.entrypoints.omni_stage", "weightlift.patches.vllm_omni.flags", "<0.18"
        ),
        PatchFile(
            "vllm_omni.entrypoints.omni_base", "weightlift.patches.vllm_omni.flags", ">=0.18"
        ),
    ),
    logger="vllm",
)

INTEGRATIONS: tuple[Integration, ...] = (SGLANG, VLLM, VLLM_OMNI)
