"""The table of a part of the suite: show.py PART.json"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(path: Path) -> None:
    """Print a row a loader, in Markdown."""
    print("| loader | page cache | first call | median | GB/s | device | host | equal |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in json.loads(path.read_text()):
        if row["problem"]:
            print(f"| {row['loader']} | {row['state']} | {row['problem'][:200]} |")
            continue
        rate = row["nbytes"] / row["median_s"] / 1e9
        print(
            f"| {row['loader']} | {row['state']} | {row['first_s']:.3f} s | {row['median_s']:.3f} s "
            f"| {rate:.1f} | {row['device_bytes'] / 1e6:.0f} MB | {row['host_bytes'] / 1e6:.0f} MB "
            f"| {'yes' if row['is_equal'] else 'NO'} |"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
