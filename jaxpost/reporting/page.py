"""The frame of a self-contained HTML page: its style sheet is inline, and it has no script."""

import html

# Of lines in charts and marks in tables.
COLOURS = ("#2563a8", "#d1600f", "#2f8a4e", "#9a3f9e", "#b3262e", "#0e8a94", "#8a6d1b", "#5b5f66")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2125; background: #fff }
body { max-width: 1320px; margin: 2em auto; padding: 0 1.5em }
h1 { font-size: 1.7em; margin: 0 } h2 { font-size: 1.25em; margin: 2em 0 .6em } h3 { font-size: 1em; margin: 1.2em 0 .3em }
p.note { color: #5b6570; margin: .2em 0 .8em }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .3em .8em; text-align: right; border-bottom: 1px solid #e3e7eb; vertical-align: top }
th { font-weight: 600; color: #3c454e } th:first-child, td:first-child { text-align: left }
thead tr:last-child th { border-bottom: 2px solid #c5ccd3 } th.stage { text-align: center; border-left: 1px solid #c5ccd3 }
td.open, th.open { border-left: 1px solid #c5ccd3 } td small { color: #5b6570 } td.best { font-weight: 600 }
td.text, th.text { text-align: left; white-space: pre-wrap; overflow-wrap: anywhere; max-width: 34em }
td.better { color: #2f8a4e } td.worse { color: #b3262e }
td.text { font-family: ui-monospace, monospace; font-size: 13px }
.scroll { overflow-x: auto } .charts { display: flex; flex-wrap: wrap; gap: 1em 1.2em }
figure { margin: 0 } figcaption { font-weight: 600; font-size: 14px; overflow-wrap: anywhere; max-width: 400px }
svg text { font: 11px system-ui, sans-serif; fill: #5b6570 } svg .grid { stroke: #e9edf0 } svg .axis { stroke: #aab3bc }
.key span { display: inline-block; margin-right: 1.4em } i.mark { display: inline-block; width: 1.4em; height: 4px;
  margin: 0 .45em .2em 0; border-radius: 2px }
pre { background: #f5f7f9; padding: .8em 1em; overflow-x: auto; font-size: 13px } summary { cursor: pointer; font-weight: 600 }
"""


def mark(colour):
    """A short line in a chart's colour, for a key or a table."""
    return f'<i class="mark" style="background: {colour}"></i>'


def whole(title, content):
    """The page around its content, which is HTML; the title is text."""
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style>"
    )
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n{content}\n</body></html>\n'
