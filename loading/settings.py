"""What a load may be told, with the defaults that hold where nothing is said."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from weightlift.loading.errors import WeightliftError

MIB = 1 << 20


@dataclass(frozen=True)
class Settings:
    """Settings of a load.

    Attributes:
        multithread_load: Whether loads go through weightlift at all.
        fast_load: Whether plans are derived from one layer of each kind.
        parallel_module_load: Whether components of a diffusion pipeline load through weightlift.
        num_load_threads: Readers of this process; 0 chooses by its share of the cores.
        readers: What they are: ``auto`` for processes where a CUDA device is loaded to and threads
            elsewhere; ``processes`` or ``threads``.
        staging_mib: Most host memory, in MiB, for bytes in flight to one device: pinned on CUDA,
            scratch elsewhere.
        stage_gib: Host memory of each rank for the next checkpoint, in GiB; 0 for no staging.
        shared_gib: Most of the files in shared memory that each rank keeps page-locked between loads, in
            GiB; 0 for none.
        stage_watch: A directory whose new checkpoints are staged as they appear; empty for none.
        direct_io: Whether files are read past the page cache: ``auto`` for what is not in it, on a
            local filesystem; ``on`` or ``off``.
        exchange: Whether ranks of one host each read a part and pass it on: ``auto`` where that
            reads less, on CUDA devices; ``on`` or ``off``.
        report: A file that gets one JSON line a load; empty for none.
        load_timeline: A file that gets what was read when, by its ending; empty for none.
        untested_versions: Whether engine versions that weightlift was not tested with are patched.
        asked: Names of the settings that the user gave. Asked for and not to be had is an error.
    """

    multithread_load: bool = True
    fast_load: bool = False
    parallel_module_load: bool = False
    num_load_threads: int = 0
    readers: str = "auto"
    staging_mib: int = 256
    stage_gib: int = 0
    stage_watch: str = ""
    shared_gib: int = 0
    direct_io: str = "auto"
    exchange: str = "auto"
    report: str = ""
    load_timeline: str = ""
    untested_versions: bool = False
    asked: frozenset[str] = field(default=frozenset())

    def with_threads(self, threads: object) -> Settings:
        """These, with the readers that an engine's own configuration names, if the user named none.

        Args:
            threads: What stands in the configuration; anything but a positive whole number is none.
        """
        if "num_load_threads" in self.asked or not isinstance(threads, int) or threads < 1:
            return self
        return replace(self, num_load_threads=threads)

    def insist(self, reason: str) -> str:
        """Why a load is left to the engine, unless the user asked for what is now not to be had.

        Raises:
            WeightliftError: They did.
        """
        if self.multithread_load and "multithread_load" in self.asked:
            raise WeightliftError(
                f"multithread load was asked for and cannot be had here: {reason}. Leave out the "
                "flag that enables it (or its variable or YAML key) to load with the engine's own "
                "loader."
            )
        return reason
