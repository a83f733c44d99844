"""Words in pinned memory that a CUDA stream waits for and writes: no thread hands anything on.

Stream memory operations of the CUDA driver API (``cuStreamWaitValue32`` and the like).
"""

from __future__ import annotations

import ctypes
import functools
import platform
import struct

_OPERATION = "I4xQQI4xQ8x"  # CUstreamBatchMemOpParams
_WAIT_VALUE_32 = 1
_AT_LEAST, _AFTER_ALL_BEFORE = 0, 0
_STORES_IN_ORDER = ("x86_64", "AMD64")
"""Machines on which a device that sees a word sees what its writer stored before, for readers have no fences.
Elsewhere a thread looks at the words, and system calls of both sides lie between the bytes and the copy."""


class StreamWords:
    """The driver's functions for this.

    Raises:
        OSError: There is no driver.
        AttributeError: It is older than CUDA 12.
    """

    def __init__(self) -> None:
        # The lock of the interpreter is kept: to get it back takes longer than these calls.
        driver = ctypes.PyDLL("libcuda.so.1")
        word, flags, handle = ctypes.c_uint32, ctypes.c_uint, ctypes.c_void_p
        self._operate = driver.cuStreamBatchMemOp_v2
        self._operate.argtypes = [handle, ctypes.c_uint, ctypes.c_char_p, flags]
        self._write = driver.cuStreamWriteValue32_v2
        self._write.argtypes = [handle, ctypes.c_uint64, word, flags]
        self._copy = driver.cuMemcpyHtoDAsync_v2
        self._copy.argtypes = [ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t, handle]
        self._find = driver.cuMemHostGetDevicePointer_v2

    def address(self, host: int) -> int:
        """Where the device finds what is at this address of page-locked memory.

        Raises:
            RuntimeError: It does not.
        """
        found = ctypes.c_uint64()
        _check(self._find(ctypes.byref(found), ctypes.c_void_p(host), 0))
        return found.value

    def wait(self, stream: int, address: int, words: int, number: int) -> None:
        """Have the stream go on once so many words from this address on are at least ``number``.

        Raises:
            RuntimeError: The device cannot do that.
        """
        values: list[int] = []
        for word in range(address, address + 4 * words, 4):
            values += (_WAIT_VALUE_32, word, number, _AT_LEAST, 0)
        _check(self._operate(stream, words, _operations(words).pack(*values), 0))

    def write(self, stream: int, address: int, number: int) -> None:
        """Have the stream write a word once all before it is done.

        Raises:
            RuntimeError: The device cannot do that.
        """
        _check(self._write(stream, address, number, _AFTER_ALL_BEFORE))

    def copy(self, stream: int, target: int, source: int, nbytes: int) -> None:
        """Copy from page-locked memory to the device: one range, which takes half of what a list of one does.

        Raises:
            RuntimeError: The device cannot.
        """
        _check(self._copy(target, source, nbytes, stream))


@functools.cache
def _operations(count: int) -> struct.Struct:
    return struct.Struct(f"={_OPERATION * count}")


def _check(error: int) -> None:
    if error:
        raise RuntimeError(f"CUDA driver error {error}")


@functools.cache
def stream_words() -> StreamWords | None:
    """The one of this process; None where there is no such thing."""
    if platform.machine() not in _STORES_IN_ORDER:
        return None
    try:
        return StreamWords()
    except (OSError, AttributeError):
        return None
