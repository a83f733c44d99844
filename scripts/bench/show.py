"""The table of a part of the suite: show.py PART.json"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(path: Path) -> None:
    """Print a row a loader, in Markdown."""
    rows = json.loads(path.read_text())
    floor = {row["state"]: row["median_s"] for row in rows if row["loader"] == "ceiling"}
    print(
        "| loader | page cache | first call | median | GB/s | of ceiling | device | host | equal |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        if row["problem"]:
            print(f"| {row['loader']} | {row['state']} | {row['problem'][:200]} |")
            continue
        rate = row["nbytes"] / row["median_s"] / 1e9
        share = floor.get(row["state"], 0) / row["median_s"]
        equal = {None: "", True: "yes", False: "NO"}[row["is_equal"]]
        print(
            f"| {row['loader']} | {row['state']} | {row['first_s']:.3f} s | {row['median_s']:.3f} s "
            f"| {rate:.1f} | {share:.0%} | {row['device_bytes'] / 1e6:.0f} MB | {row['host_bytes'] / 1e6:.0f} MB "
            f"| {equal} |"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
