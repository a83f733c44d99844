"""What of a file is in the page cache."""

from __future__ import annotations

import os
from pathlib import Path

from weightlift.loading.residency import PageCache


def cached(path: Path) -> int:
    """Bytes of a file that are in the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        cache = PageCache(descriptor, path.stat().st_size)
        try:
            return cache.cached_bytes()
        finally:
            cache.close()
    finally:
        os.close(descriptor)
