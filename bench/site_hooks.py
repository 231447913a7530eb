"""Drawings and formulas that the documentation site (``make docs``) renders at build time,
so that its pages need no other server.

On GitHub a page shows a Mermaid drawing and LaTeX; here they become SVG and MathML. Hooks of
MkDocs, named in ``mkdocs.yml``.
"""

import html
import posixpath
import re
from pathlib import Path, PurePosixPath
from typing import Any

from latex2mathml.converter import convert

from fastokd.experiments.analysis.graph_svg import draw_svg
from fastokd.methods import get_method, list_methods


def on_config(config: Any) -> Any:
    """Replace ``folder/*.md`` in the navigation by the folder's pages, named by their headings."""
    config.nav = [_with_pages(item, Path(config.docs_dir)) for item in config.nav]
    return config


def _with_pages(item: Any, docs: Path) -> Any:
    if not isinstance(item, dict):
        return item
    ((title, content),) = item.items()
    if not isinstance(content, list):
        return item
    entries: list[Any] = []
    for entry in content:
        if not isinstance(entry, str) or not entry.endswith("/*.md"):
            entries.append(entry)
            continue
        for path in sorted(docs.glob(entry)):
            if path.name != "index.md":
                heading = path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
                name = heading.partition(":")[0]
                entries.append({name: path.relative_to(docs).as_posix()})
    return {title: entries}


def on_page_markdown(markdown: str, page: Any, **others: Any) -> str:
    """A method's graph instead of its Mermaid source, and the packages as a drawing above their
    order.
    """
    path = PurePosixPath(page.file.src_uri)
    markdown = re.sub(
        r"^(<!-- .* -->)\n(?=\|)", r"\1\n\n", markdown, flags=re.MULTILINE
    )  # else a table may be taken for a paragraph
    if path.parent.name == "methods" and path.stem in list_methods():
        method = get_method(path.stem)
        loss = method.loss_class.preset(
            next(iter(method.loss_class.presets)), method.default_branches
        )
        drawing = draw_svg(loss.graph)
        return re.sub(
            r"```mermaid\n.*?```", lambda _: _figure(drawing), markdown, count=1, flags=re.DOTALL
        )
    if path.name == "architecture.md":
        return re.sub(
            r"```text\n([^`\n]+ < [^`\n]+)\n```",
            lambda found: f"{_figure(draw_packages(found[1]))}\n\n{found[0]}",
            markdown,
            count=1,
        )
    return markdown


def on_page_content(content: str, page: Any, files: Any, **others: Any) -> str:
    """Formulas as MathML, and pages that are named by their file as links with their titles."""
    content = re.sub(
        r'<(div|span) class="arithmatex">(.*?)</\1>', _formula, content, flags=re.DOTALL
    )

    def titled(found: re.Match[str]) -> str:
        target = posixpath.normpath(PurePosixPath(page.file.src_uri).parent / found[2])
        return f"{found[1]}{_title(files, target) or found[2]}</a>"

    def linked(found: re.Match[str]) -> str:
        title = _title(files, found[1])
        return (
            f'<a href="{files.get_file_from_path(found[1]).url_relative_to(page.file)}">{title}</a>'
            if title
            else found[0]
        )

    content = re.sub(r'(<a href="[^"]+">)([\w/.-]+\.md)</a>', titled, content)
    return re.sub(r'(?<![\w/"=>])docs/([\w/-]+\.md)', linked, content)


def draw_packages(order: str) -> str:
    """The packages as an SVG drawing, from their order: ``a, b < c < d``, where a package may
    import those to its left.
    """
    columns = [[name.strip() for name in part.split(",")] for part in order.split("<")]
    middle, parts, x = 20.0 * max(map(len, columns)), [], 0.0
    for column in columns:
        width = 8 * max(map(len, column)) + 16
        y = middle - 20 * len(column)
        for name in column:
            parts.append(
                f'<rect x="{x:.0f}" y="{y + 5:.0f}" width="{width}" height="30" rx="4"/><text'
                f' x="{x + width / 2:.0f}" y="{y + 24:.0f}" text-anchor="middle"'
                f' fill="currentColor" stroke="none">{name}</text>'
            )
            y += 40
        x += width + 26
        parts.append(f'<path d="M{x - 4:.0f} {middle:.0f}h-18m5 -4l-5 4l5 4"/>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-2 0 {x - 20:.0f} {2 * middle:.0f}"'
        f' width="{x - 20:.0f}" height="{2 * middle:.0f}" role="img" font-family="monospace"'
        ' font-size="12" fill="none" stroke="currentColor"><title>packages, and their allowed'
        f" imports</title>{''.join(parts[:-1])}</svg>"
    )


def _title(files: Any, path: str) -> str | None:
    """The title of a page in the navigation."""
    file = files.get_file_from_path(path)
    return file.page.title if file is not None and file.page is not None else None


def _figure(drawing: str) -> str:
    return f'<figure class="drawing">{drawing}</figure>'


def _formula(found: re.Match[str]) -> str:
    display = found[1] == "div"
    latex = (
        html.unescape(found[2])
        .strip()
        .removeprefix(r"\[" if display else r"\(")
        .removesuffix(r"\]" if display else r"\)")
    )
    formula = convert(latex, display="block" if display else "inline")
    return f'<div class="formula">{formula}</div>' if display else formula
