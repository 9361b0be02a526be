"""The results as a picture: one bar for each subject, the line through its end from the least to the greatest round."""

from __future__ import annotations

from xml.sax.saxutils import escape

from .results import CaseResults, Results, ScenarioResults, Spread, spread, value_of
from .table import number, words

PANELS = {
    "noop-http": ("async, 64 clients", "def, 64 clients"),
    "bodies-http": ("10 KB of JSON and back, 64 clients", "1 MB, 16 clients"),
    "handles": ("sync", "async"),
}
OURS = ("embedded", "distributed")
WIDTH, BAR, STEP, LEFT, RIGHT = 720, 14, 22, 120, 90
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #24292f; } .title { font-weight: 600; } .peer { fill: #8c959f; } .ours { fill: #1a7f64; }
.spread { stroke: #24292f; stroke-width: 1; }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3; } .peer { fill: #7d8590; } .ours { fill: #2ea583; } .spread { stroke: #e6edf3; }
}
"""


def svg(results: Results) -> str:
    """One panel under the other; readable on a light and on a dark page."""
    parts, top = [], 8
    for scenario in results.scenarios:
        for case in scenario.cases:
            if case.case in PANELS.get(scenario.name, ()) and case.samples:
                parts.append(_panel(scenario, case, top))
                top += STEP * (len(case.samples) + 1) + 16
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{top}" viewBox="0 0 {WIDTH} {top}" role="img">'
    return "\n".join([head, f"<title>Measured by make bench</title><style>{STYLE}</style>", *parts, "</svg>"]) + "\n"


def _panel(scenario: ScenarioResults, case: CaseResults, top: int) -> str:
    values = {subject: spread([value_of(sample, scenario.headline) for sample in samples]) for subject, samples in case.samples.items()}
    scale = (WIDTH - LEFT - RIGHT) / max(value.high for value in values.values())
    title = escape(f"{scenario.title}, {case.case}: {words(scenario.headline)}")
    bars = [_bar(subject, value, scale, top + STEP * row) for row, (subject, value) in enumerate(values.items(), start=1)]
    return "\n".join([f'<text class="title" x="0" y="{top + 12}">{title}</text>', *bars])


def _bar(subject: str, value: Spread, scale: float, top: int) -> str:
    low, end, high = (LEFT + number_of * scale for number_of in (value.low, value.median, value.high))
    kind, middle = "ours" if subject in OURS else "peer", top + BAR / 2
    return (
        f'<text x="{LEFT - 8}" y="{top + 11}" text-anchor="end">{escape(subject)}</text>'
        f'<rect class="{kind}" x="{LEFT}" y="{top}" width="{end - LEFT:.1f}" height="{BAR}" rx="2"/>'
        f'<line class="spread" x1="{low:.1f}" x2="{high:.1f}" y1="{middle}" y2="{middle}"/>'
        f'<text x="{high + 6:.1f}" y="{top + 11}">{number(value.median)}</text>'
    )
