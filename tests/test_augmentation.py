"""Policies, color jitter and random erasing: equal to torchvision's, and determined by seed, epoch
and position in every loader.
"""

import numpy as np
import pytest
import torch
from stream_loaders import LEVELS, dali, torchvision, write_split
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from fastokd.data import Augment, LoaderKind, ResidentLoader, Split
from fastokd.data.augment import erase, jitter
from fastokd.data.policies import apply_policy
from fastokd.data.random_crop import erasures, jitters, uniforms
from fastokd.errors import ConfigError
from fastokd.train.config import TrainConfig, identity_fields
from fastokd.train.data import data_record, loader_for, open_data, prepared, with_augmentation
from fastokd.train.rules import check_config

POLICIES = ("randaugment", "trivialaugment", "autoaugment", "augmix")


def photos(count: int, side: int = 24) -> torch.Tensor:
    """Images uint8 [N, side, side, 3] with areas and noise."""
    generator = torch.Generator().manual_seed(7)
    coarse = torch.randint(0, 256, (count, 3, 4, 4), dtype=torch.uint8, generator=generator)
    return F.resize(coarse, [side, side]).permute(0, 2, 3, 1).contiguous()


def resident(count=40, **settings) -> ResidentLoader:
    images = photos(count).permute(0, 3, 1, 2)
    split = Split("train", images, torch.arange(count) % 5)
    settings = {"train": True, **LEVELS, **settings}
    return ResidentLoader(split, 8, **settings)


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    return write_split(tmp_path_factory.mktemp("data"), 24)


def streamed(make, split, augment, train=True, **settings):
    return make(split, 8, train, seed=3, augment=augment, **settings)


def pixels(batches) -> torch.Tensor:
    return torch.cat([batch.images for batch in batches])


# --- the operations


@pytest.mark.parametrize("policy", POLICIES)
def test_policy_of_each_image_is_torchvisions_with_its_seed(policy):
    transform = {
        "randaugment": v2.RandAugment(),
        "trivialaugment": v2.TrivialAugmentWide(),
        "autoaugment": v2.AutoAugment(),
        "augmix": v2.AugMix(),
    }[policy]
    images, seeds = photos(12), range(100, 112)
    before = torch.get_rng_state()
    out = apply_policy(images, policy, {}, seeds)
    assert torch.equal(torch.get_rng_state(), before)
    for image, seed, result in zip(images, seeds, out, strict=True):
        torch.manual_seed(seed)
        assert torch.equal(transform(image.permute(2, 0, 1)), result.permute(2, 0, 1))
    assert not torch.equal(out, images)


def test_policy_options_change_its_strength():
    images = photos(16)
    weak, strong = (
        apply_policy(images, "randaugment", {"num_ops": 1, "magnitude": level}, range(16))
        for level in (0, 30)
    )
    change = [(each.int() - images.int()).abs().float().mean() for each in (weak, strong)]
    assert change[1] > 2 * change[0]


def test_jitter_of_each_image_matches_torchvisions_functions():
    images, choices = photos(20), torch.from_numpy(jitters(uniforms(1, 2, 0, 20), 0.6))
    operations = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)
    for image, choice, result in zip(images, choices, jitter(images, choices), strict=True):
        assert sorted(choice[:, 0].tolist()) == [0, 1, 2]
        wanted = image.permute(2, 0, 1)
        for kind, factor in choice.tolist():
            assert 0.4 <= factor <= 1.6
            wanted = operations[int(kind)](wanted, factor)
        error = (wanted.permute(1, 2, 0).int() - result.int()).abs()
        assert error.max() <= 2
        assert error.float().mean() < 0.1


def test_erased_boxes_have_torchvisions_distribution():
    height, width, count = 40, 60, 4000
    boxes = erasures(uniforms(0, 0, 0, count, purpose="erase"), 0.25, (height, width))
    areas = ((boxes[:, 1] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 2])) / (height * width)
    assert abs((areas > 0).mean() - 0.25) < 0.03
    assert boxes.min() >= 0
    assert boxes[:, 1].max() <= height
    assert boxes[:, 3].max() <= width
    torch.manual_seed(0)
    wanted, image = [], torch.ones(1, height, width)
    for _ in range(1000):
        wanted.append(float((v2.RandomErasing(p=1.0)(image) == 0).float().mean()))
    assert abs(areas[areas > 0].mean() - sum(wanted) / 1000) < 0.01


def test_erase_sets_only_the_box_to_zero():
    out = erase(torch.ones(2, 5, 6, 3), torch.tensor([[1, 3, 2, 6], [0, 0, 0, 0]]))
    assert out[0, 1:3, 2:6].sum() == 0
    assert out.sum() == 2 * 5 * 6 * 3 - 2 * 4 * 3


# --- the loaders

EACH = Augment(pad=2, flip=True, policy="trivialaugment", color_jitter=0.4, erasing=0.5)


@pytest.mark.parametrize(
    "augment",
    [
        Augment(policy="randaugment"),
        Augment(policy="augmix"),
        Augment(color_jitter=0.5),
        Augment(erasing=1.0),
        EACH,
    ],
    ids=["randaugment", "augmix", "jitter", "erasing", "all"],
)
def test_resident_images_depend_on_seed_epoch_and_position(augment):
    loader, plain = resident(augment=augment), resident(augment=Augment())
    first = list(loader)
    assert [b.index.tolist() for b in first] == [b.index.tolist() for b in plain]
    assert not torch.equal(pixels(first), pixels(plain))
    loader.set_epoch(1)
    assert not torch.equal(pixels(first).sort(0)[0], pixels(loader).sort(0)[0])
    other = resident(augment=augment)
    torch.rand(3)  # the state of the global generator has no influence
    batches = iter(other)
    next(batches), next(batches)
    state = other.state_dict()
    resumed = resident(augment=augment)
    resumed.load_state_dict(state)
    assert torch.equal(pixels(resumed), pixels(first[2:]))
    halves = [resident(count=40, augment=augment, rank=r, world_size=2) for r in (0, 1)]
    joined = [pixels(pair) for pair in zip(*halves, strict=True)]
    assert torch.equal(torch.cat(joined), pixels(first)[: 32 * len(joined)][: len(joined) * 16])


def test_resident_views_have_different_policies():
    batch = next(iter(resident(augment=Augment(policy="trivialaugment"), views=2)))
    assert batch.images.shape[0] == 2
    assert not torch.equal(batch.images[0], batch.images[1])


def test_resident_operations_follow_torchvisions_order():
    only = {name: getattr(EACH, name) for name in ("pad", "flip")}
    cropped = pixels(resident(augment=Augment(**only))).permute(0, 2, 3, 1)
    loader = resident(augment=EACH)
    seeds = [int(s) for s in (uniforms(0, 0, 0, 40, purpose="policy")[:, 0] * 2.0**53)]
    images = apply_policy(cropped.round().to(torch.uint8), "trivialaugment", {}, seeds)
    images = jitter(images, torch.from_numpy(jitters(uniforms(0, 0, 0, 40, 0, "jitter"), 0.4)))
    boxes = torch.from_numpy(erasures(uniforms(0, 0, 0, 40, 0, "erase"), 0.5, (24, 24)))
    wanted = erase(images.float(), boxes).permute(0, 3, 1, 2)
    torch.testing.assert_close(pixels(loader), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("make", [dali, torchvision])
@pytest.mark.parametrize(
    "augment",
    [
        Augment(flip=True, crop_scale=(0.3, 1.0), policy="trivialaugment", erasing=0.5),
        Augment(3, True, policy="randaugment", policy_options={"num_ops": 1}, color_jitter=0.4),
        Augment(policy="autoaugment", policy_options={"policy": "cifar10"}),
        Augment(color_jitter=0.4, erasing=0.5),
    ],
    ids=["trivialaugment", "randaugment", "autoaugment", "jitter"],
)
def test_streamed_images_depend_on_seed_epoch_and_position(split, make, augment):
    loader = streamed(make, split, augment)
    first = list(loader)
    plain = streamed(make, split, Augment(augment.pad, augment.flip))
    assert not torch.equal(pixels(first), pixels(plain))
    loader.set_epoch(1)
    second = pixels(loader)
    assert not torch.equal(pixels(first).sort(0)[0], second.sort(0)[0])
    resumed = streamed(make, split, augment)
    resumed.load_state_dict({**loader.state_dict(), "epoch": 0, "position": 8})
    assert torch.equal(pixels(resumed), pixels(first[1:]))
    evaluated = streamed(make, split, augment, train=False)
    unchanged = streamed(make, split, Augment(crop_scale=augment.crop_scale), train=False)
    assert torch.equal(pixels(evaluated), pixels(unchanged))
    for each in (loader, resumed, plain, evaluated, unchanged):
        each.close()


@pytest.mark.parametrize("policy", ["randaugment", "trivialaugment", "autoaugment"])
def test_dali_policy_matches_torchvisions_operations(split, policy):
    """The mean change of many images is that of torchvision's policy."""
    changes = []
    for make in (dali, torchvision):
        images = {}
        for name in ("none", policy):
            augment = Augment(policy=name)
            loader = streamed(make, split, augment)
            images[name] = []
            for epoch in range(8):
                loader.set_epoch(epoch)
                images[name].append(pixels(loader))
            loader.close()
        difference = torch.cat(images[policy]) - torch.cat(images["none"])
        changes.append(difference.abs().mean().item())
    assert changes[0] == pytest.approx(changes[1], rel=0.2)


@pytest.mark.parametrize("name", ["imagenet", "cifar10", "svhn"])
def test_dali_autoaugment_has_torchvisions_magnitudes(name):
    """Every stage of every pair: operation, probability, and the parameter for a side of 331."""
    pytest.importorskip("nvidia.dali", reason="pip install -e '.[dali]'")
    from fastokd.data.dali_policies import learned_policy, policy_operations

    transform, operations = v2.AutoAugment(v2.AutoAugmentPolicy(name)), policy_operations()
    for pair, expected in zip(learned_policy(name), transform._policies, strict=True):
        for (index, probability, level), (title, wanted, at) in zip(pair, expected, strict=True):
            operation = operations[index]
            assert (operation.name.replace("_", ""), probability) == (title.lower(), wanted)
            values, signed = transform._AUGMENTATION_SPACE[title]
            assert operation.randomly_negate == signed
            if (theirs := values(10, 331, 331)) is None:
                assert level is None
                continue
            magnitude = np.linspace(*operation.mag_range, 10)[level]
            if title == "Posterize":
                magnitude = int(operation.mag_to_param(magnitude)).bit_count()
            factor = {"Solarize": 1 / 256, "TranslateX": 331, "TranslateY": 331}.get(title, 1)
            assert magnitude * factor == pytest.approx(float(theirs[at]), abs=1e-4)


def test_dali_refuses_unsupported_augmentation(split):
    with pytest.raises(ConfigError, match=r"augmix.*--loader torchvision"):
        streamed(dali, split, Augment(policy="augmix"))
    with pytest.raises(ConfigError, match=r"padding=reflect.*--padding zero"):
        streamed(dali, split, Augment(pad=2, padding="reflect", policy="randaugment"))


# --- configuration


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"auto_augment": "randaug"}, "unknown auto_augment 'randaug'; did you mean"),
        (
            {"auto_augment": "trivialaugment", "auto_augment_options": {"magnitude": 3}},
            "magnitude=3: auto_augment=trivialaugment has no options",
        ),
        (
            {"auto_augment": "randaugment", "auto_augment_options": {"magnitude": 31}},
            r"magnitude=31: it must be a whole number in \[0, 30\]",
        ),
        (
            {"auto_augment": "autoaugment", "auto_augment_options": {"policy": "coco"}},
            "policy='coco': it must be one of imagenet",
        ),
        ({"auto_augment": "augmix", "loader": "dali"}, "loader=dali: it does not support"),
        ({"random_erasing": 1.5}, "random_erasing=1.5: it must be in"),
        ({"color_jitter": -1.0}, "color_jitter=-1.0: it must be at least 0"),
    ],
    ids=str,
)
def test_wrong_augmentation_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        check_config(TrainConfig(data="digits", **fields))


def test_custom_loader_without_policies_is_refused():
    reason = LoaderKind(lambda: None, decoded=False).lacks("randaugment")
    assert reason is not None
    assert "auto_augment=randaugment" in reason


def test_configuration_augments_training_images_only():
    fields = {"auto_augment": "trivialaugment", "random_erasing": 0.5, "color_jitter": 0.3}
    cpu, config = torch.device("cpu"), TrainConfig(data="digits", batch_size=64, precision="fp32")
    changed = TrainConfig(**{**vars(config), **fields})
    images = []
    for each in (config, changed):
        dataset = with_augmentation(each, open_data(each, cpu))
        parts = ((dataset.train, True), (dataset.test, False))
        images.append([next(iter(loader_for(each, dataset, *p, cpu))).images for p in parts])
    assert not torch.equal(images[0][0], images[1][0])
    assert torch.equal(images[0][1], images[1][1])


def test_unused_augmentation_keeps_identity_of_earlier_versions():
    names = [name for name, _ in identity_fields(TrainConfig(data="digits"))]
    assert not {"auto_augment", "auto_augment_options", "color_jitter"} & set(names)
    names = [name for name, _ in identity_fields(TrainConfig(data="digits", color_jitter=0.1))]
    assert "color_jitter" in names


@pytest.mark.parametrize("seen", [None, {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}])
def test_normalization_is_imagenets_or_the_recorded_one(seen):
    cpu, config = torch.device("cpu"), TrainConfig(data="digits")
    dataset = open_data(config, cpu)
    assert prepared(config, dataset).mean == dataset.mean
    imagenet = TrainConfig(data="digits", normalization="imagenet")
    record = data_record(prepared(imagenet, dataset, seen), "resident")
    assert record["mean"] == (seen["mean"] if seen else [0.485, 0.456, 0.406])
    assert record["std"] == (seen["std"] if seen else [0.229, 0.224, 0.225])
