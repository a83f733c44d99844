"""What runs at the start of every interpreter: it waits for an engine to be imported.

Called by ``weightlift.pth`` (up to Python 3.14) or ``weightlift.start`` (PEP 829, from 3.15). It
imports nothing but ``os`` and ``sys``, never raises and never exits.
"""

import os
import sys

ENGINES = frozenset({"sglang", "vllm", "vllm_omni"})


class EngineWatch:
    """A meta path finder that finds nothing and wakes weightlift up once."""

    armed = True

    @classmethod
    def find_spec(cls, fullname: str, path: object = None, target: object = None) -> None:
        """Wake up if this is an engine; the import goes on with the next finder either way."""
        # The import system walks sys.meta_path now: a finder that takes itself out
        # makes it skip the next one, so this one stays and goes quiet.
        if cls.armed and fullname in ENGINES:
            cls.armed = False
            wake()


def watch() -> None:
    """Watch for engine imports. With ``WEIGHTLIFT=0``, all that comes of one is a log line."""
    if EngineWatch in sys.meta_path:
        return
    if ENGINES.isdisjoint(sys.modules):
        sys.meta_path.insert(0, EngineWatch)
    else:
        wake()


def is_off() -> bool:
    """Whether the environment turns weightlift off, in one of the words that switches take."""
    return os.environ.get("WEIGHTLIFT", "").lower() in ("0", "false", "off")


def wake() -> None:
    """Install the patches; if that fails, say so and leave the engine as it is."""
    if is_off():
        import logging

        given = os.environ["WEIGHTLIFT"]
        logging.getLogger("weightlift").warning(
            "weightlift: off in this process (WEIGHTLIFT=%s)", given
        )
        return
    try:
        from weightlift.hooks.bootstrap import install

        install()
    except Exception:
        import logging

        logger = logging.getLogger("weightlift")
        logger.exception("weightlift is off in this process: it failed to start")
