"""Writes the results into docs/performance.md, between its two markers, and into its picture.

python -m benchmarks.page
"""

from __future__ import annotations

from .picture import svg
from .results import Results, read
from .subjects import ROOT
from .table import markdown

PAGE, PICTURE = ROOT / "docs" / "performance.md", ROOT / "docs" / "performance.svg"
BEGIN, END = "<!-- begin: results, by python -m benchmarks.page -->\n", "<!-- end: results -->\n"


def main() -> None:
    results = read()
    PAGE.write_text(with_block(PAGE.read_text(), block(results)))
    PICTURE.write_text(svg(results))


def with_block(page: str, text: str) -> str:
    """The page with this text between its markers."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{text}{END}{after}"


def block(results: Results) -> str:
    """What was measured on which machine, with which versions, and all tables."""
    machine = results.machine
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    where = f"{machine.cores} cores ({machine.cpu}, {machine.memory_gib:g} GiB), {machine.system}, kernel {machine.kernel}"
    rounds = "1 round" if results.rounds == 1 else f"{results.rounds} rounds"
    run = f"Revision {results.revision}, {rounds} with samples of {results.seconds:g} s, on {where}."
    return f"{run}\n\nVersions: {versions}.\n\n{markdown(results)}"


if __name__ == "__main__":
    main()
