"""Recipes with today's training schedules run for a few steps on small images."""

import dataclasses

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from fastokd.experiments.recipes import get_recipe
from fastokd.train.progress import Reporter
from fastokd.train.session import begin_run

IMAGES, BATCH, SIDE = 8, 4, 64
RECIPES = [
    "finetune",
    *(f"imagenet-resnet50-{method}-modern" for method in ("ahbf", "baseline")),
    *(f"imagenet-resnet18-{method}-a3" for method in ("ahbf", "baseline")),
]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two classes of random JPEG files of 80 x 72 pixels, in the splits train and val."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split in ("train", "val"):
        for label in ("dark", "light"):
            (folder := root / split / label).mkdir(parents=True)
            for index in range(IMAGES // 2):
                low = 0 if label == "dark" else 128
                pixels = rng.integers(low, low + 128, (72, 80, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.jpg")
    return root


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A cache with weights of torchvision's ResNet-18."""
    url = torchvision.models.ResNet18_Weights.DEFAULT.url
    (cache := tmp_path / "hub/checkpoints").mkdir(parents=True)
    torch.save(torchvision.models.resnet18().state_dict(), cache / url.rpartition("/")[2])
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.usefixtures("published")
def test_recipe_trains_an_epoch_of_two_steps(name, images, tmp_path):
    """Only data, sizes, loader and device differ from the recipe; its schedule is of all epochs."""
    recipe = get_recipe(name).config
    config = dataclasses.replace(
        recipe,
        data=str(images),
        image_size=SIDE,
        resize_schedule={0: SIDE} if recipe.resize_schedule else {},
        batch_size=BATCH,
        loader="torchvision",
        loader_options={"workers": 1},
        device="cpu",
        precision="fp32",
    )
    trainer = begin_run(config, tmp_path / "run", name, Reporter(quiet=True))
    before = {key: each.clone() for key, each in trainer.model.state_dict().items()}
    summary = trainer.run(until=1)
    (record,) = trainer.run_folder.read_metrics()
    terms = record["train"]
    assert np.isfinite(list(terms.values())).all()
    assert ("ce/branch2" in terms) == (recipe.method == "ahbf")
    assert trainer.config.epochs == recipe.epochs > summary.epochs == 1
    assert int(trainer.step.number) == IMAGES // BATCH
    changed = [
        key
        for key, value in trainer.model.state_dict().items()
        if key.endswith("weight") and not torch.equal(value, before[key])
    ]
    assert len(changed) > 0.9 * sum(key.endswith("weight") for key in before)
    log = (tmp_path / "run" / "log.txt").read_text()
    assert recipe.auto_augment in log
    assert ("CutMix" in log) == bool(recipe.cutmix)
    if recipe.pretrained:
        assert "trained weights of torchvision:resnet18" in log
