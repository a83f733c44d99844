"""Load model weights at the speed of the hardware in SGLang and vLLM.

Importing this package imports neither torch nor an engine: the start-up hook goes through here.
"""

__version__ = "0.2.0.dev0"


def release() -> int:
    """Give back the host memory that this process keeps for its next load; returns the bytes.

    Pinned memory stays from one load to the next, for pinning it takes 40 ms, and so does what was
    staged. Whoever loads no more, or is short of memory, can have it back. Not during a load.
    """
    from weightlift.loading.memory import release

    return release()
