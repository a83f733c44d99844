"""What ``scripts/docs`` does. ``--check`` writes nothing and ends with 1 if something is out of date."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from weightlift.compat.context import Option
from weightlift.compat.patch import Patch
from weightlift.hooks.options import OPTIONS
from weightlift.patches import DIFFUSION, INTEGRATIONS

TOP = Path(__file__).resolve().parents[1]
PATCHES = TOP / "docs/patches.md"
README = TOP / "README.md"
START, END = "<!-- options -->", "<!-- /options -->"


def patches() -> str:
    """Every patch with its notes, as Markdown."""
    lines = ["# Patches", "", "Generated from the records by `scripts/docs`.", ""]
    for integration in INTEGRATIONS:
        lines += [f"## {integration.engine} {integration.versions}", ""]
        for source in dict.fromkeys(file.source for file in integration.patch_files):
            records: tuple[Patch, ...] = importlib.import_module(source).PATCHES
            for patch in records:
                lines += [f"### `{patch.path}`", "", f"In `{patch.module}`, {patch.versions}.", ""]
                notes = {"Why": patch.why, "How": patch.how, "Upstream": patch.upstream}
                lines += [f"- **{name}**: {text}" for name, text in notes.items()]
                lines += [f"- **To be dropped when**: {patch.drop_when}", ""]
    return "\n".join(lines)


def options() -> str:
    """The options as a Markdown table."""
    lines = [
        "| option (YAML key) | variable | SGLang | SGLang Diffusion | vLLM, vLLM-Omni | what it does |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for option in OPTIONS:
        assert option.flags.get("vllm") == option.flags.get("vllm_omni"), "they share a column"
        flags = " | ".join(_flags(option, engine) for engine in ("sglang", DIFFUSION, "vllm"))
        lines.append(f"| `{option.name}` | `{option.env}` | {flags} | {option.help} |")
    return "\n".join(lines)


def _flags(option: Option, engine: str) -> str:
    shown = [f"`{flag} {option.metavar}".rstrip() + "`" for flag in option.flags.get(engine, ())]
    return ", ".join(shown) or "-"


def main() -> None:
    """Write or check."""
    text = README.read_text()
    before, rest = text.split(START)
    wanted = {
        PATCHES: patches(),
        README: f"{before}{START}\n{options()}\n{END}{rest.split(END)[1]}",
    }
    stale = [path for path, content in wanted.items() if path.read_text() != content]
    if "--check" in sys.argv:
        if stale:
            names = ", ".join(str(path.relative_to(TOP)) for path in stale)
            raise SystemExit(f"out of date: {names}; run scripts/docs")
        return
    for path in stale:
        path.write_text(wanted[path])


if __name__ == "__main__":
    main()
