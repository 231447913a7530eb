"""Every method has a page, and the page's layout, options and graph are what its code says."""

import re

import pytest

from bench import method_pages
from bench.method_pages import END, FOLDER, START, generated, main, page
from bench.pages import page_with
from fastokd.cli import main as fastokd
from fastokd.experiments.recipes import list_recipes
from fastokd.methods import get_method, list_methods


def test_pages_are_current(capsys):
    code = main(["--check"])
    assert code == 0, capsys.readouterr().err


def test_stale_and_missing_pages_are_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(method_pages, "FOLDER", tmp_path)
    for path, block in generated().items():
        path.write_text(f"before\n{block}\nafter\n", encoding="utf-8")
    assert main(["--check"]) == 0
    one = tmp_path / "one.md"
    good = one.read_text(encoding="utf-8")
    one.write_text(good.replace("T=3", "T=4"), encoding="utf-8")
    (tmp_path / "dml.md").unlink()
    assert main(["--check"]) == 1
    said = capsys.readouterr().err
    assert "one.md is stale" in said
    assert "dml.md is missing" in said
    assert main([]) == 1  # a page is written by hand; only its generated part is not
    assert one.read_text(encoding="utf-8") == good
    assert good.startswith("before\n" + START)
    assert good.endswith(END + "\nafter\n")


@pytest.mark.parametrize("name", list_methods())
def test_page_matches_show_command(name, capsys):
    text = (FOLDER / f"{name}.md").read_text(encoding="utf-8")
    for preset in get_method(name).loss_class.presets:
        assert fastokd(["show", name, "--preset", preset]) == 0
        assert capsys.readouterr().out.strip() in text
    for heading in ("## Recipe", "## Published results", "## Differences "):
        assert heading in text


@pytest.mark.parametrize("name", list_methods())
def test_page_describes_every_option(name):
    """The table's meanings come from the declarations of the options."""
    rows = [line for line in page(get_method(name)) if line.startswith("| `")]
    assert rows
    assert all(re.search(r"\| \S[^|]+ \|$", row) for row in rows), rows


def test_recipes_that_pages_name_exist():
    for path in FOLDER.glob("*.md"):
        for name in re.findall(r"`fastokd recipes ([\w-]+)`", path.read_text(encoding="utf-8")):
            assert name in list_recipes(), f"{path}: {name}"


def test_page_with_replaces_only_generated_part():
    block = f"{START}\nnew\n{END}"
    assert page_with(f"a\n{START}\nold\n{END}\nb\n", block) == f"a\n{block}\nb\n"
