"""``python -m gossamer.experiments [results]``: all results as one Markdown page."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

__all__ = ["page"]


def page(folder: Path) -> str:
    """Every claim of every results file, the ones that fall short among them."""
    found: list[dict[str, Any]] = [
        json.loads(path.read_text())
        for path in sorted(folder.glob("*.json"))
        if not path.name.endswith(".quick.json")
    ]
    found = [entry for entry in found if "claims" in entry]
    total = sum(len(entry["claims"]) for entry in found)
    held = sum(claim["holds"] for entry in found for claim in entry["claims"])
    lines = [
        "# Results",
        "",
        "Every figure comes from one command, which writes the file named here; hardware, commit, "
        "seeds and all raw figures are in it. A point that falls short stays.",
        "",
        f"{held} of {total} points hold.",
        "",
    ]
    for entry in found:
        seeds = ", ".join(map(str, entry["seeds"]))
        made = entry.get("commits", [entry["commit"]])
        commits = ", ".join(f"`{_short(c)}`" for c in made)
        judged = f"; judged at `{_short(entry['judged'])}`" if "judged" in entry else ""
        lines += [
            f"## {entry['name']}",
            "",
            f"{entry['about']} `{entry['command']}` (seeds {seeds}; {entry['seconds']:.0f} s on "
            f"{entry['hardware']['cpu']}, {entry['hardware']['cores']} cores; commit"
            f"{'s' * (len(made) > 1)} {commits}{judged}).",
            "",
        ]
        if not entry["claims"]:
            lines += ["Figures only: nothing here could hold or fall short.", ""]
            continue
        lines += [
            "| point | what | value | bound | holds |",
            "| --- | --- | --- | --- | --- |",
        ]
        lines += [
            f"| {c['id']} | {c['what']} | {c['value']:.4g} | {c['bound']} | "
            f"{'yes' if c['holds'] else '**no**'} |"
            for c in entry["claims"]
        ]
        lines.append("")
    return "\n".join(lines)


def _short(commit: str) -> str:
    return commit[:10] + commit[40:]  # with +dirty


if __name__ == "__main__":
    print(page(Path(sys.argv[1] if len(sys.argv) > 1 else "results")))
