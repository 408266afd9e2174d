"""A comparison as one HTML file that needs nothing else."""

from __future__ import annotations

import jinja2
from rich.table import Table
from rich.text import Text

from polygraft.cli.bench.compare.panels import rows
from polygraft.cli.bench.compare.plots import STYLES, svg
from polygraft.cli.bench.compare.result import Comparison
from polygraft.cli.bench.compare.table import conclusions, tables
from polygraft.cli.bench.compare.verdict import caveats, count, headline

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Unmerged or merged LoRA: {{ found.model }}</title>
<style>
:root { color-scheme: light dark; --ink: #1c2128; --page: #fff; --line: #d8dee4; --soft: #f5f7f9;
  --faint: #57606a; --warn: #9a6700 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --page: #0f1319; --line: #30363d;
  --soft: #171c23; --faint: #9aa4af; --warn: #d8a93a } }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 72rem;
  margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .5rem }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem }
.lead { font-size: 1.2rem; margin: 0 0 1rem }
.setup { color: var(--faint); font-size: .9rem }
.caveat { border-left: 4px solid var(--warn); background: var(--soft); padding: .5rem .8rem; margin: .5rem 0 }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; margin: .2rem 0 .6rem; font-size: .9rem }
.legend svg { width: 1.9em; height: .8em; vertical-align: middle; margin-right: .4em }
.panels { display: grid; gap: .8rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 23rem)) }
.panels svg { width: 100%; height: auto; display: block }
.scroll { overflow-x: auto; margin: 1rem 0 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .88rem }
caption { text-align: left; font-weight: 600; padding: .3rem 0 }
th, td { padding: .15rem .7rem; border-bottom: 1px solid var(--line); text-align: left; white-space: nowrap }
.number { text-align: right }
@media print { body { margin: 0; max-width: none } .panels svg { break-inside: avoid } }
</style>
<h1>Unmerged or merged LoRA?</h1>
<p class="lead">{{ lead }}</p>
{% for line in caveats %}<p class="caveat">{{ line }}</p>{% endfor %}
<ul>{% for line in lines %}<li>{{ line }}</li>{% endfor %}</ul>
<p class="setup">{{ found.model }}, {{ found.dtype }}{% if found.quantization != "none" %} with
{{ found.quantization }} weights{% endif %}; Polygraft {{ found.server_version }}; {{ found.machine }}.
Each request has {{ found.prompt_tokens }} prompt tokens and {{ found.new_tokens }} new tokens;
the next one is sent when one ends. {{ rounds }}; all paths take turns in each.</p>
<div class="legend">{% for path, (colour, marker) in styles.items() %}<span><svg viewBox="0 0 24 10"
aria-hidden="true"><line x1="0" x2="24" y1="5" y2="5" stroke="{{ colour }}" stroke-width="2"/>
{{- marker | safe }}</svg>{{ path }}</span>{% endfor %}</div>
{% for row in drawn %}<h2>{{ row.title }}</h2><div class="panels">
{% for svg in row.panels %}<div role="img" aria-label="{{ row.title }}">{{ svg | safe }}</div>
{%- endfor %}</div>
{% if row.spread %}<p class="setup">Bars span the slowest and the fastest round.</p>{% endif %}{% endfor %}
<h2>Figures</h2>
{% for table in shown %}<div class="scroll"><table><caption>{{ table.title }}</caption>
<tr>{% for column in table.columns %}
<th{% if column.number %} class="number"{% endif %}>{{ column.name }}</th>
{%- endfor %}</tr>
{% for row in table.rows %}<tr>{% for cell in row %}
<td{% if table.columns[loop.index0].number %} class="number"{% endif %}>{{ cell }}</td>
{%- endfor %}</tr>{% endfor %}
</table></div>{% endfor %}
</html>
"""

_MARKERS = {
    "D": '<path d="M12 1.2 15.8 5 12 8.8 8.2 5z" fill="{0}"/>',
    "o": '<circle cx="12" cy="5" r="3.4" fill="{0}"/>',
    "s": '<rect x="9" y="2" width="6" height="6" fill="{0}"/>',
    "^": '<path d="M12 1 15.6 8 8.4 8z" fill="{0}"/>',
}
"""The plots' markers, for the legend."""


def html(found: Comparison) -> str:
    """The report."""
    shown = {cell.path for cell in found.cells} | {size.path for size in found.sizes}
    styles = {
        path: (colour, _MARKERS[marker].format(colour))
        for path, (colour, marker) in STYLES.items()
        if path in shown
    }
    drawn = [
        {
            "title": row.title,
            "panels": [svg(panel, row.y_label) for panel in row.panels],
            "spread": found.rounds > 1 and any(curve.low for panel in row.panels for curve in panel.curves),
        }
        for row in rows(found)
    ]
    environment = jinja2.Environment(autoescape=True)
    return environment.from_string(_PAGE).render(
        found=found,
        lead=headline(found),
        caveats=caveats(found),
        rounds=count(found.rounds, "round"),
        lines=conclusions(found),
        styles=styles,
        drawn=drawn,
        shown=[_plain(table) for table in tables(found)],
    )


def _plain(table: Table) -> dict[str, object]:
    columns = [{"name": _text(c.header), "number": c.justify == "right"} for c in table.columns]
    cells = [[_text(cell) for cell in column.cells] for column in table.columns]
    return {"title": _text(table.title), "columns": columns, "rows": list(zip(*cells, strict=True))}


def _text(shown: object) -> str:
    return shown.plain if isinstance(shown, Text) else str(shown)
