"""The server's own process: a folder to talk to its ranks, a route to stage, an honest health.

``launch_server`` and ``_launch_subprocesses`` are the points that every way to start a server goes
by: the command line, ``sglang.Engine``, and the launchers that call them.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from weightlift.compat.patch import Patch
from weightlift.loading.control import ENV, Control, server_control
from weightlift.patches import SGLANG

ENGINE = "sglang.srt.entrypoints.engine"
HTTP = "sglang.srt.entrypoints.http_server"

STAGE_SECONDS = 3600.0
SERVED_WHEN_BROKEN = (
    *("/update_weights", "/stage_weights", "/begin_weight_update", "/end_weight_update"),
    *("/init_weights", "/destroy_weights", "/get_", "/server_info", "/model_info", "/metrics"),
    *("/flush_cache", "/abort_request", "/pause_generation", "/continue_generation"),
    *("/release_memory", "/resume_memory", "/weights_checker", "/set_internal_state"),
)
"""Routes that tell about a server or mend it. All others use its weights, or call it healthy."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class HonestHealth:
    """ASGI middleware: a server that holds parts of two checkpoints answers 503."""

    def __init__(self, app: Any, control: Control) -> None:
        self._app = app
        self._control = control

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer, or pass the request on."""
        if scope["type"] == "http" and not scope["path"].startswith(SERVED_WHEN_BROKEN):
            why = self._control.broken()
            if why:
                body = json.dumps({"error": {"message": why, "type": "ServiceUnavailable"}})
                headers = [(b"content-type", b"application/json")]
                await send({"type": "http.response.start", "status": 503, "headers": headers})
                await send({"type": "http.response.body", "body": body.encode()})
                return
        await self._app(scope, receive, send)


def _launch_server(
    wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Give the server's app our route and our say in its health, before it starts."""
    app = sys.modules[HTTP].app
    control = server_control()
    app.add_middleware(HonestHealth, control=control)
    app.add_route("/stage_weights", _stage_route(control), methods=["POST"])
    return wrapped(*args, **kwargs)


def _stage_route(control: Control) -> Callable[[Any], Awaitable[Any]]:
    """The route to stage, for who may update weights."""

    async def stage_weights(request: Any) -> Any:
        return await _stage_weights(control, request)

    auth = sys.modules.get("sglang.srt.utils.auth")
    if auth is not None:  # from 0.5.8, routes name who may use them
        auth.auth_level(auth.AuthLevel.ADMIN_OPTIONAL)(stage_weights)
    return stage_weights


async def _stage_weights(control: Control, request: Any) -> Any:
    """``POST {"model_path": ..., "wait": true, "timeout": 3600}``, the last two if wanted."""
    respond = importlib.import_module("starlette.responses").JSONResponse
    try:
        asked = await request.json()
        path, wait = asked["model_path"], asked.get("wait", True)
        timeout = float(asked.get("timeout", STAGE_SECONDS))
        if not isinstance(path, str) or not isinstance(wait, bool):
            raise TypeError("model_path must be a string and wait a boolean")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return respond({"success": False, "message": f"not a request to stage: {error!r}"}, 400)
    told = await asyncio.to_thread(stage, control, path, wait=wait, timeout=timeout)
    return respond(told, 200 if told["success"] else 400)


def stage(control: Control, path: str, *, wait: bool, timeout: float) -> dict[str, Any]:
    """Have every rank of this host stage a checkpoint.

    Args:
        control: The server's folder.
        path: The checkpoint.
        wait: Whether to wait until it is staged.
        timeout: How long, in seconds.

    Returns:
        ``success``, ``message``, and each rank's bytes and seconds.
    """
    if not control.answers():
        message = "no rank can stage: launch the server with --weight-stage-gib N"
        return {"success": False, "message": message, "ranks": []}
    request = control.ask_to_stage(path)
    told = control.wait_for(request, timeout if wait else 0.0)
    if not wait:
        return {"success": True, "message": "staging goes on", "ranks": []}
    errors = [f"rank {rank.rank}: {rank.error}" for rank in told if rank.error]
    errors += [f"rank {rank.rank} did not answer" for rank in told if rank.request < request]
    others = [rank for rank in told if rank.request >= request and rank.path != path]
    errors += [f"rank {rank.rank} staged {rank.path} instead, asked since" for rank in others]
    ranks = [{"rank": rank.rank, "bytes": rank.nbytes, "seconds": rank.seconds} for rank in told]
    message = "; ".join(errors) or f"{path} is staged"
    return {"success": not errors, "message": message, "ranks": ranks}


def _launch_subprocesses(
    wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Name the server's folder to the processes that it starts.

    With several tokenizer workers, requests are answered by processes that know nothing of it. Then
    there is no folder: staging cannot be asked for, and a rank with broken weights ends the server.
    """
    server_args = kwargs.get("server_args") or next(iter(args), None)
    if getattr(server_args, "tokenizer_worker_num", 1) > 1:
        return wrapped(*args, **kwargs)
    before = os.environ.get(ENV)
    os.environ[ENV] = str(server_control().folder)
    try:
        return wrapped(*args, **kwargs)
    finally:
        if before is None:
            del os.environ[ENV]
        else:
            os.environ[ENV] = before


_SUBPROCESSES: dict[str, Any] = {
    "wrapper": _launch_subprocesses,
    "parameters": (),
    "why": "Ranks can tell the server's process nothing but the answers to its requests, and it can "
    "ask them nothing while they generate.",
    "how": "Makes a folder of this server's own, and names it to the processes by environment.",
    "upstream": "No plugin interface for messages.",
    "drop_when": "The engine can pass a plugin's requests to its ranks.",
}

PATCHES: tuple[Patch, ...] = (
    Patch(
        target=f"{ENGINE}:_launch_subprocesses",
        versions=">=0.4.9.post2,<0.5.10",
        **_SUBPROCESSES,
    ),
    Patch(
        target=f"{ENGINE}:Engine._launch_subprocesses",
        versions=">=0.5.10,<0.5.24",
        **_SUBPROCESSES,
    ),
    Patch(
        target=f"{HTTP}:launch_server",
        versions=SGLANG.versions,
        wrapper=_launch_server,
        parameters=("server_args",),
        why="A server whose update failed half way answers /health as if nothing had happened, "
        "and a checkpoint can only be read while generation is stopped.",
        how="Answers 503 while the weights are of two checkpoints, and adds /stage_weights, which "
        "reads the next checkpoint into host memory while generation goes on.",
        upstream="Nothing of the kind is proposed.",
        drop_when="The engine reports broken weights, and stages them.",
    ),
)
