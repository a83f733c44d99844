"""Staging from Python, in the process that made the engine."""

from __future__ import annotations

from typing import Any

STAGE_SECONDS = 3600.0


def stage_weights(
    path: str, *, wait: bool = True, timeout: float = STAGE_SECONDS
) -> dict[str, Any]:
    """Have the ranks of this process's engine read a checkpoint into host memory.

    The next ``update_weights_from_disk`` of that checkpoint then only copies from there.
    Generation goes on meanwhile. The engine must have been made with ``weight_stage_gib``.

    Args:
        path: The checkpoint.
        wait: Whether to return only when it is staged.
        timeout: How long to wait, in seconds.

    Returns:
        ``success``, ``message``, and ``ranks`` with each rank's bytes and seconds.
    """
    from weightlift.loading.control import server_control
    from weightlift.patches.sglang.server import stage

    return stage(server_control(), path, wait=wait, timeout=timeout)
