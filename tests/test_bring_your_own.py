"""The page on bringing one's own network: its commands and snippets run as they are printed."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastokd.cli import main

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "bring-your-own.md").read_text(encoding="utf-8")


def test_commands(tmp_path, monkeypatch, capsys):
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 64), ("val", 2)):
        for name in ("cat", "dog"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                Image.fromarray(torch.randint(0, 256, (32, 32, 3), generator=generator, dtype=torch.uint8).numpy()).save(folder / f"{index}.png")
    monkeypatch.chdir(tmp_path)
    lines = [line for line in PAGE.splitlines() if line.startswith("fastokd ")]
    assert len(lines) == 4
    for line in lines:
        assert main(shlex.split(line.replace("path/to/images", "images"))[1:]) == 0, f"{line}: {capsys.readouterr().err}"


@pytest.mark.filterwarnings("ignore:ResNet has 1000 classes")
def test_snippets():
    names = {"images": torch.randn(4, 3, 32, 32), "target": torch.arange(4)}
    snippets = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len(snippets) == 3
    for snippet in snippets:
        exec(snippet, names)
    model = names["model"]
    assert [tuple(row.shape) for row in names["result"].logits] == [(4, 10)] * 3
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model.merged_first_conv
    with torch.no_grad():
        x = names["images"]
        torch.testing.assert_close(model.eval()(x).logits[0], names["stock"].eval()(x), rtol=1e-4, atol=1e-5)
