"""A comparison as one HTML file that needs nothing else."""

from __future__ import annotations

import jinja2
from rich.table import Table
from rich.text import Text

from polygraft.cli.bench.compare.plots import plots
from polygraft.cli.bench.compare.result import Comparison
from polygraft.cli.bench.compare.table import conclusions, tables

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>Merged and unmerged LoRA: {{ found.model }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }
caption { text-align: left; font-weight: 600; padding: .3rem 0 }
th, td { padding: .15rem .7rem; border-bottom: 1px solid #ddd; text-align: left; white-space: nowrap }
.number { text-align: right }
svg { max-width: 100%; height: auto }
</style>
<h1>Merged and unmerged LoRA</h1>
<p>{{ found.model }}, {{ found.dtype }}, quantization {{ found.quantization }},
Polygraft {{ found.server_version }}; {{ found.machine }}.
Closed loop, {{ found.prompt_tokens }} prompt tokens, {{ found.new_tokens }} new tokens a request,
{{ found.rounds }} rounds; in each round every path takes its turn.</p>
<ul>{% for line in lines %}<li>{{ line }}</li>{% endfor %}</ul>
{% for title, svg in drawn.items() %}<h2>{{ title }}</h2>{{ svg | safe }}{% endfor %}
<h2>Figures</h2>
{% for table in shown %}<table><caption>{{ table.title }}</caption>
<tr>{% for column in table.columns %}<th>{{ column.name }}</th>{% endfor %}</tr>
{% for row in table.rows %}<tr>{% for cell in row %}
<td{% if table.columns[loop.index0].number %} class="number"{% endif %}>{{ cell }}</td>
{%- endfor %}</tr>{% endfor %}
</table>{% endfor %}
</html>
"""


def html(found: Comparison) -> str:
    """The report."""
    environment = jinja2.Environment(autoescape=True)
    return environment.from_string(_PAGE).render(
        found=found,
        lines=conclusions(found),
        drawn=plots(found),
        shown=[_plain(table) for table in tables(found)],
    )


def _plain(table: Table) -> dict[str, object]:
    columns = [{"name": _text(c.header), "number": c.justify == "right"} for c in table.columns]
    cells = [[_text(cell) for cell in column.cells] for column in table.columns]
    return {"title": _text(table.title), "columns": columns, "rows": list(zip(*cells, strict=True))}


def _text(shown: object) -> str:
    return shown.plain if isinstance(shown, Text) else str(shown)
