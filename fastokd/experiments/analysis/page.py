"""One HTML page that needs nothing but itself: no network, no script, no font."""

import base64
from collections.abc import Sequence
from html import escape

from fastokd.version import __version__

_STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --page: #fff; --soft: #59636e;
  --line: #d1d9e0; --head: #f3f5f7; }
@media (prefers-color-scheme: dark) { :root { --text: #e6edf3; --page: #0d1117; --soft: #9198a1;
  --line: #3d444d; --head: #171c23; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 78rem; padding: 1rem 1.5rem 3rem;
  font: 1rem/1.5 system-ui, sans-serif; color: var(--text); background: var(--page); }
h1 { font-size: 1.6rem; } h2 { margin-top: 2.5rem; padding-bottom: .3rem;
  border-bottom: 1px solid var(--line); font-size: 1.25rem; } h3 { font-size: 1.05rem; }
p, li { max-width: 60rem; } p, footer { color: var(--soft); }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
caption { padding: .3rem 0; text-align: left; font-weight: 600; }
th, td { padding: .3rem .7rem; border: 1px solid var(--line); text-align: right;
  vertical-align: top; }
thead th { background: var(--head); vertical-align: bottom; } th:first-child { text-align: left;
  } tbody th { font-weight: 500; }
figure { margin: 1rem 0; }
img { width: 100%; height: auto; background: #fff; border-radius: .3rem; }
details { margin: .4rem 0; } summary { cursor: pointer; } footer { margin-top: 2.5rem; }
@media print {
  @page { size: landscape; margin: 12mm; }
  :root { --text: #000; --page: #fff; --soft: #333; --line: #999; --head: #eee; }
  body { max-width: none; padding: 0; font-size: 10pt; } table { font-size: 7.5pt; }
    th, td { padding: .15rem .3rem; }
  .scroll { overflow: visible; } img, tr { break-inside: avoid; }
    h2, h3, caption { break-after: avoid; } img { width: auto; max-width: 100%;
    max-height: 165mm; }
}
"""


def page(title: str, body: str) -> str:
    """A whole page from a title and HTML. Its policy forbids browsers to load anything."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
{body}</main>
<footer>Made by fastokd {__version__}.</footer>
</body>
</html>
"""


def section(title: str, body: str, level: int = 2) -> str:
    """A heading, and HTML below it."""
    return f"<h{level}>{escape(title)}</h{level}>\n{body}\n"


def remarks_section(remarks: Sequence[str]) -> str:
    """The remarks on runs, if there are any."""
    return section("Not as in finished runs", bullets(remarks)) if remarks else ""


def bullets(lines: Sequence[str]) -> str:
    """A list of sentences."""
    return "<ul>\n" + "".join(f"<li>{escape(line)}</li>\n" for line in lines) + "</ul>\n"


def image(content: bytes, description: str) -> str:
    """An SVG figure embedded in the page, with a text for readers who cannot see it."""
    data = base64.b64encode(content).decode()
    source = f"data:image/svg+xml;base64,{data}"
    return f'<figure><img alt="{escape(description)}" src="{source}"></figure>\n'
