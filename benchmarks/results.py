"""Fill the result tables of README.md and docs/ from the result files. No figure is ever typed.

Run: make results, or: python benchmarks/results.py [--check]

A table stands between `<!-- results QUESTION: METRIC as TITLE; ... -->` and `<!-- /results -->`: one line a case and
hardware, one column a metric. `<!-- results all -->` gives every row of every file but the scoreboard's, with what it
was measured on; `scoreboard`, and with `brief`, `ranks`, `ablations` or `pictures` behind it, give that one's.
Pictures go to docs/pictures. --check changes nothing and fails if a table is not what the files give.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent))  # also for a test, which loads this file by its path
import scoreboard_page

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
KEYS = {
    "question", "case", "metric", "value", "unit", "baseline", "n", "spread", "hardware", "versions", "commit",
    "date", "command",
}  # fmt: skip
_PLACE = re.compile(r"(<!-- results (?P<what>[^>]+?) -->\n)(.*?)(<!-- /results -->)", re.DOTALL)

PICTURES = ROOT / "docs" / "pictures"
Row = dict[str, Any]
_SCOREBOARD: dict[str, Callable[[Sequence[Row]], str]] = {
    "scoreboard": scoreboard_page.section,
    "scoreboard brief": scoreboard_page.brief,
    "scoreboard ranks": scoreboard_page.ranks,
    "scoreboard ablations": scoreboard_page.ablations,
    "scoreboard pictures": lambda rows: scoreboard_page.gallery(rows, PICTURES),
}


def read_results(folder: Path = RESULTS) -> list[Row]:
    """Return all rows, by file name and in the order of each file. Raises: ValueError for what is no result file."""
    rows: list[Row] = []
    for path in sorted(folder.glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, list) or any(not isinstance(r, dict) or set(r) != KEYS for r in found):
            raise ValueError(f"{path} is not a list of rows with the keys {', '.join(sorted(KEYS))}")
        rows += found
    return rows


def fill(text: str, rows: Sequence[Row]) -> str:
    """Return `text` with every table made again from `rows`."""
    return _PLACE.sub(lambda m: m[1] + table(m["what"], rows) + m[4], text)


def table(what: str, rows: Sequence[Row]) -> str:
    """Return the Markdown that belongs under the marker `what`."""
    if what in _SCOREBOARD:
        return _SCOREBOARD[what](rows)
    if what == "all":
        return (
            "".join(
                _question(name, [r for r in rows if r["question"] == name])
                for name in _names(rows)
                if name != scoreboard_page.QUESTION
            )
            or _none()
        )
    question, _, wanted = what.partition(":")
    columns = [part.strip().partition(" as ")[::2] for part in wanted.split(";")]
    of = [r for r in rows if r["question"] == question and r["metric"] in {metric for metric, _ in columns}]
    if not of:
        return _none(question)
    places = list(dict.fromkeys((r["case"], r["hardware"]) for r in of))
    found = {(r["case"], r["hardware"], r["metric"]): r for r in of}
    lines = [["case", "hardware", *(title or metric for metric, title in columns)]]
    for place in places:
        lines.append([*place, *(_figure(found.get((*place, metric))) for metric, _ in columns)])
    return _markdown(lines, numbers_from=2)


def _question(name: str, rows: Sequence[Row]) -> str:
    parts = [f"\n## {name}\n"]
    for hardware in dict.fromkeys(r["hardware"] for r in rows):
        of = [r for r in rows if r["hardware"] == hardware]
        lines = [["case", "metric", "value", "spread", "n", "baseline"]]
        lines += [[r["case"], r["metric"], _value(r), r["spread"], f"{r['n']:,}", r["baseline"]] for r in of]
        origins = dict.fromkeys((r["date"], r["commit"], json.dumps(r["versions"]), r["command"]) for r in of)
        made = "".join(
            f"- {date}, code {commit}, {', '.join(f'{k} {v}' for k, v in json.loads(versions).items() if v != 'None')}: `{command}`\n"
            for date, commit, versions, command in origins
        )
        parts.append(f"\n### {hardware}\n\n{_markdown(lines, numbers_from=2)}\n{made}")
    return "".join(parts)


def _names(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(r["question"] for r in rows))


def _none(question: str = "campaign") -> str:
    return f"_No result file yet: `python benchmarks/{question}.py`, then `make results`._\n"


def _figure(row: Row | None) -> str:
    if row is None:
        return ""
    spread = f" ({row['spread'].replace('..', ' to ')})" if row["spread"] else ""
    return _value(row) + spread


def _value(row: Row) -> str:
    value, unit = row["value"], row["unit"]
    if unit == "%":
        return f"{value:.2f} %"
    number = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{number} {unit}".strip()


def _markdown(lines: Sequence[Sequence[str]], numbers_from: int) -> str:
    head, *body = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    rule = ["---" if i < numbers_from else "---:" for i in range(len(head))]
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, rule, *body))


def main() -> int:
    """Fill or check the pages; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    check, rows, stale = parser.parse_args().check, read_results(), []
    if not check:
        scoreboard_page.write_pictures(rows, PICTURES)
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        old = page.read_text(encoding="utf-8")
        new = fill(old, rows)
        if new != old:
            stale.append(str(page.relative_to(ROOT)))
            if not check:
                page.write_text(new, encoding="utf-8")
    verb = "out of date, run make results" if check else "filled"
    print(f"{len(rows)} result rows; {verb}: {', '.join(stale) or 'nothing'}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
