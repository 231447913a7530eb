"""The loaders' promises: what is visited how often, in which order, and what augmentation does to a
pixel.
"""

import contextlib
import itertools
import resource
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.fx.experimental.proxy_tensor import make_fx

from fastokd.data import (
    Augment,
    ResidentLoader,
    Split,
    list_files,
    list_loaders,
    make_loader,
    open_dataset,
    register_loader,
)
from fastokd.data.augment import Mixing, crop, flip
from fastokd.errors import ConfigError, DataError

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def make_split(count: int, size: int = 6, name: str = "train") -> Split:
    generator = torch.Generator().manual_seed(count)
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    return Split(name, images, torch.arange(count) % 7)


def make(count=50, batch_size=8, train=True, seed=0, split=None, **settings) -> ResidentLoader:
    settings = {"mean": MEAN, "std": STD, "augment": Augment(pad=2, flip=True), **settings}
    return ResidentLoader(split or make_split(count), batch_size, train, seed=seed, **settings)


def equal(left, right) -> bool:
    return len(left) == len(right) and all(
        torch.equal(x, y)
        for a, b in zip(left, right, strict=True)
        for x, y in zip(a, b, strict=True)
    )


def slow_augmented(image, offset, flipped, pad, padding="zero"):
    """One image [C, H, W], pixel by pixel: what a crop out of the padded image and a flip must
    give.
    """
    height, width = image.shape[1:]
    out = torch.zeros_like(image)
    for y, x in itertools.product(range(height), range(width)):
        source_y, source_x = y + int(offset[0]) - pad, x + int(offset[1]) - pad
        if padding == "reflect":
            source_y, source_x = (
                -place if place < 0 else 2 * (side - 1) - place if place >= side else place
                for place, side in ((source_y, height), (source_x, width))
            )
        if 0 <= source_y < height and 0 <= source_x < width:
            out[:, y, width - 1 - x if flipped else x] = image[:, source_y, source_x]
    return out


@pytest.mark.parametrize(
    ("height", "width", "pad", "padding"),
    [
        (5, 5, 1, "zero"),
        (4, 7, 3, "zero"),
        (1, 1, 1, "zero"),
        (6, 3, 0, "zero"),
        (3, 3, 5, "zero"),
        (5, 5, 1, "reflect"),
        (4, 7, 3, "reflect"),
        (2, 2, 1, "reflect"),
    ],
)
def test_crop_and_flip_match_a_per_pixel_oracle(height, width, pad, padding):
    offsets = torch.tensor(list(itertools.product(range(2 * pad + 1), repeat=2)))
    images = torch.randint(1, 256, (len(offsets), 3, height, width), dtype=torch.uint8)
    flipped = torch.arange(len(offsets)) % 3 == 0
    got = flip(crop(images.permute(0, 2, 3, 1), offsets, pad, padding), flipped).permute(0, 3, 1, 2)
    want = torch.stack(
        [slow_augmented(*each, pad, padding) for each in zip(images, offsets, flipped, strict=True)]
    )
    assert torch.equal(got, want)


def test_draws_cover_every_offset_evenly_and_flip_half():
    offsets, flipped = Augment(pad=2, flip=True).draw(50_000, torch.Generator().manual_seed(0))
    counts = torch.bincount(offsets[:, 0] * 5 + offsets[:, 1], minlength=25)
    assert counts.sum() == 50_000
    assert ((counts / 50_000 - 1 / 25).abs() < 0.005).all()
    assert abs(flipped.float().mean() - 0.5) < 0.01
    _, flipped = Augment(pad=2).draw(1000, torch.Generator())
    assert not flipped.any()


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_evaluation_images_are_normalized(dtype, memory_format):
    loader = make(count=10, batch_size=4, train=False, dtype=dtype, memory_format=memory_format)
    pixels = make_split(10).images.double() / 255
    want = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(
        STD, dtype=torch.float64
    ).view(3, 1, 1)
    for batch in loader:
        assert batch.images.dtype == dtype
        assert batch.images.is_contiguous(memory_format=memory_format)
        # One rounding of a number up to 4, and for float32 the arithmetic's few roundings.
        torch.testing.assert_close(
            batch.images.double(), want[batch.index], rtol=torch.finfo(dtype).eps, atol=2e-6
        )


def test_padding_is_a_black_pixel():
    white = Split(
        "train",
        torch.full((64, 3, 2, 2), 255, dtype=torch.uint8),
        torch.zeros(64, dtype=torch.int64),
    )
    loader = ResidentLoader(white, 64, True, mean=MEAN, std=STD, augment=Augment(pad=1))
    values = next(iter(loader)).images[:, 0].unique()
    torch.testing.assert_close(values, torch.tensor([-MEAN[0] / STD[0], (1 - MEAN[0]) / STD[0]]))


@pytest.mark.parametrize(
    "augment", [Augment(), Augment(pad=2), Augment(flip=True), Augment(pad=1, flip=True)]
)
def test_training_images_are_one_of_the_possible_augmentations(augment):
    split = make_split(12)
    loader = ResidentLoader(split, 4, True, mean=(0, 0, 0), std=(1, 1, 1), augment=augment)
    for batch in loader:
        assert torch.equal(batch.target, split.targets[batch.index])
        for image, index in zip(
            (batch.images * 255).round().to(torch.uint8), batch.index, strict=True
        ):
            offsets = itertools.product(range(2 * augment.pad + 1), repeat=2)
            possible = [
                slow_augmented(split.images[index], offset, flipped, augment.pad)
                for offset in offsets
                for flipped in {False, augment.flip}
            ]
            assert any(torch.equal(image, each) for each in possible)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [1, 2, 7, 31, 32, 33])
@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_evaluation_visits_every_image_once_over_all_ranks(count, world_size, batch_size):
    split, seen = make_split(count), []
    for rank in range(world_size):
        loader = make(count, batch_size, train=False, rank=rank, world_size=world_size)
        for epoch in range(2):
            loader.set_epoch(epoch)
            batches = list(loader)
            assert len(batches) == len(loader)
            assert all(len(batch.index) == batch_size for batch in batches[:-1])
            for batch in batches:
                assert torch.equal(batch.target, split.targets[batch.index])
                seen += batch.index.tolist()
    assert sorted(seen) == sorted([*range(count), *range(count)])


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize(("count", "batch_size"), [(48, 4), (49, 4), (12, 3), (37, 9)])
def test_training_drops_last_partial_batch_on_every_rank(count, batch_size, world_size):
    seen = []
    for rank in range(world_size):
        loader = make(count, batch_size, rank=rank, world_size=world_size)
        batches = list(loader)
        assert len(batches) == len(loader) == count // (batch_size * world_size)
        assert all(batch.images.shape == (batch_size, 3, 6, 6) for batch in batches)
        seen += [i for batch in batches for i in batch.index.tolist()]
    assert (
        len(seen) == len(set(seen)) == count // (batch_size * world_size) * batch_size * world_size
    )


def test_global_batch_is_independent_of_rank_count():
    alone = list(make(50, 8))
    ranks = [list(make(50, 2, rank=rank, world_size=4)) for rank in range(4)]
    joined = [
        tuple(torch.cat(parts) for parts in zip(*batches, strict=True))
        for batches in zip(*ranks, strict=True)
    ]
    assert equal(alone, joined)


def test_batch_order_depends_on_seed_and_epoch():
    assert equal(list(make(seed=3)), list(make(seed=3)))
    loader = make(seed=3)
    epochs = []
    for epoch in range(3):
        loader.set_epoch(epoch)
        epochs.append(list(loader))
    runs = [*epochs, list(make(seed=4))]
    for left, right in itertools.combinations(runs, 2):
        assert not torch.equal(left[0].index, right[0].index)
    loader.set_epoch(1)
    assert equal(list(loader), epochs[1])


def test_epoch_and_seed_are_not_interchangeable():
    late = make(seed=0)
    late.set_epoch(1)
    assert not equal(list(late), list(make(seed=1)))


def test_augmentation_differs_between_epochs():
    loader = make(count=8, batch_size=8, augment=Augment(pad=3))
    first = next(iter(loader))
    loader.set_epoch(1)
    second = next(iter(loader))
    assert not torch.equal(
        first.images[first.index.argsort()], second.images[second.index.argsort()]
    )


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("done", [0, 1, 3, 6])
def test_resume_yields_exactly_the_remaining_batches(train, done):
    straight = make(train=train)
    straight.set_epoch(5)
    batches = list(straight)
    interrupted = make(train=train)
    interrupted.set_epoch(5)
    iterator = iter(interrupted)
    for _ in range(done):
        next(iterator)
    resumed = make(train=train)
    resumed.load_state_dict(interrupted.state_dict())
    resumed.set_epoch(5)  # engines name the epoch before they iterate
    assert equal(list(resumed), batches[done:])
    resumed.set_epoch(6)
    straight.set_epoch(6)
    assert equal(list(resumed), list(straight))


def test_finished_epoch_resumes_as_finished():
    loader = make()
    assert len(list(loader)) == 6
    resumed = make()
    resumed.load_state_dict(loader.state_dict())
    assert list(resumed) == []


def test_abandoned_iteration_restarts():
    loader = make()
    first = list(loader)
    next(iter(loader))
    assert equal(list(loader), first)


def test_resume_with_other_number_of_ranks_keeps_batches():
    alone = make(50, 8)
    batches = list(alone)
    iterator = iter(alone)
    next(iterator), next(iterator)
    ranks = [make(50, 4, rank=rank, world_size=2) for rank in range(2)]
    for loader in ranks:
        loader.load_state_dict(alone.state_dict())
    parts = [[batch.index for batch in loader] for loader in ranks]
    assert [torch.cat(pair).tolist() for pair in zip(*parts, strict=True)] == [
        batch.index.tolist() for batch in batches[2:]
    ]


def test_state_of_other_loader_is_refused():
    loader = make()
    next(iter(loader))
    state = loader.state_dict()
    with pytest.raises(ConfigError, match="seed 0"):
        make(seed=1).load_state_dict(state)
    with pytest.raises(ConfigError, match="size 50"):
        make(count=51).load_state_dict(state)
    with pytest.raises(ConfigError, match="global batch size"):
        make(batch_size=5).load_state_dict(state)
    with pytest.raises(ConfigError, match="global batch size"):
        make().load_state_dict({**state, "position": 56})


def test_training_images_fewer_than_batch_are_refused():
    with pytest.raises(
        DataError, match=r"50 images, fewer than one batch of 64; use --batch-size 50 or less"
    ):
        make(batch_size=64)
    with pytest.raises(DataError, match=r"each of 4 ranks; use --batch-size 12 or less"):
        make(batch_size=16, world_size=4)
    with pytest.raises(DataError, match="use fewer ranks"):
        make(count=3, batch_size=16, world_size=4)
    assert len(make(batch_size=64, train=False)) == 1


def test_split_larger_than_device_memory_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5000, 2**30))
    with contextlib.suppress(RuntimeError, AssertionError):  # torch's, without a GPU
        make(count=40, device="cuda")  # 40 x 3 x 6 x 6 bytes fit
    with pytest.raises(
        DataError,
        match=(
            r"split 'train' takes 5.03e-06 GiB on cuda, which has 4.66e-06 GiB free; use a smaller"
            r" --image-size"
        ),
    ):
        make(count=50, device="cuda")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"rank": 2, "world_size": 2}, "rank=2"),
        ({"rank": -1}, "rank=-1"),
        ({"dtype": torch.uint8}, "floating"),
        ({"memory_format": torch.preserve_format}, "channels_last"),
        ({"views": 0}, "views=0"),
        ({"mixup": -0.1}, "mixup=-0.1: it must be a positive number"),
        ({"cutmix": float("inf")}, "cutmix=inf"),
        ({"mixup": 0.2}, "num_classes"),
        ({"augment": Augment(pad=6, padding="reflect")}, "pad=6: too large to reflect 6 x 6"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        make(**settings)
    with pytest.raises(ConfigError, match="negative"):
        Augment(pad=-1)
    with pytest.raises(ConfigError, match="padding='mirror'; use zero or reflect"):
        Augment(pad=1, padding="mirror")
    with pytest.raises(ConfigError, match="negative"):
        make().set_epoch(-1)


def test_loader_does_not_modify_split():
    split = make_split(20)
    before = split.images.clone()
    for train in (True, False):
        list(ResidentLoader(split, 4, train, mean=MEAN, std=STD, augment=Augment(pad=2, flip=True)))
    assert torch.equal(split.images, before)


def test_augmentation_of_seed_and_epoch_has_fixed_values():
    """Fixed numbers: runs of earlier versions can be resumed, and one view is the first of many."""
    for views in (1, 3):
        loader = make(
            count=10, batch_size=5, seed=2, augment=Augment(pad=1, flip=True), views=views
        )
        loader.set_epoch(4)
        first = next(iter(loader))
        assert first.index.tolist() == [2, 3, 4, 9, 5]
        images = first.images if views == 1 else first.images[0]
        # Of each image the sum over its pixels, as a fingerprint.
        assert [round(value, 3) for value in images.double().sum((1, 2, 3)).tolist()] == [
            36.759,
            36.618,
            -27.825,
            -10.997,
            -27.163,
        ]


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_views_are_different_augmentations_of_same_images(memory_format):
    split = make_split(48)
    loader = ResidentLoader(
        split,
        16,
        True,
        mean=(0, 0, 0),
        std=(1, 1, 1),
        augment=Augment(pad=2, flip=True),
        views=3,
        memory_format=memory_format,
    )
    differ = 0
    for batch in loader:
        assert batch.images.shape == (3, 16, 3, 6, 6)
        assert all(view.is_contiguous(memory_format=memory_format) for view in batch.images)
        assert torch.equal(batch.target, split.targets[batch.index])
        for view in batch.images:
            for image, index in zip((view * 255).round().to(torch.uint8), batch.index, strict=True):
                choices = itertools.product(itertools.product(range(5), repeat=2), (False, True))
                assert any(
                    torch.equal(image, slow_augmented(split.images[index], *choice, 2))
                    for choice in choices
                )
        differ += sum(
            not torch.equal(*pair) for pair in zip(batch.images[1], batch.images[2], strict=True)
        )
    assert differ > 40  # one in fifty draws the same crop and mirroring
    assert next(iter(make(train=False, views=3))).images.ndim == 4


def without_mixing(**settings):
    return make(**{**settings, "mixup": 0.0, "cutmix": 0.0})


@pytest.mark.parametrize("views", [1, 2])
def test_mixup_blends_pixels_and_labels_by_one_weight(views):
    settings = {
        "count": 48,
        "batch_size": 8,
        "num_classes": 7,
        "augment": Augment(pad=2, flip=True),
        "views": views,
    }
    weights = []
    for mixed, plain in zip(make(**settings, mixup=0.8), without_mixing(**settings), strict=True):
        assert torch.equal(mixed.index, plain.index)
        first, other = (
            torch.nn.functional.one_hot(plain.target, 7).float(),
            torch.nn.functional.one_hot(plain.target.flip(0), 7).float(),
        )
        row = int((first != other).any(1).nonzero()[0])
        weight = mixed.target[row, plain.target[row]]
        torch.testing.assert_close(mixed.target, weight * first + (1 - weight) * other)
        torch.testing.assert_close(
            mixed.images,
            weight * plain.images + (1 - weight) * plain.images.flip(-4),
            rtol=1e-5,
            atol=1e-5,
        )
        weights.append(float(weight))
    assert len(set(weights)) == 6
    assert all(0 <= weight <= 1 for weight in weights)


def test_cutmix_pastes_a_box_and_labels_by_its_area():
    settings = {
        "count": 64,
        "batch_size": 8,
        "num_classes": 7,
        "augment": Augment(pad=2, flip=True),
    }
    pasted = 0
    for mixed, plain in zip(make(**settings, cutmix=1.0), without_mixing(**settings), strict=True):
        other = plain.images.flip(0)
        from_other = (mixed.images == other).all(1) & ~(plain.images == other).all(1)
        from_own = (mixed.images == plain.images).all(1)
        assert (from_other | from_own).all(), "every pixel is one image's or the other's"
        box = from_other.any(
            0
        )  # where any image of the batch shows the other: the same box for all
        rows, columns = box.any(1), box.any(0)
        assert torch.equal(box, rows[:, None] & columns), "a rectangle"
        share = 1 - box.float().mean()
        one_hot = torch.nn.functional.one_hot(plain.target, 7).float()
        torch.testing.assert_close(mixed.target, share * one_hot + (1 - share) * one_hot.flip(0))
        pasted += int(box.sum())
    assert pasted > 0


def test_mixing_weights_have_their_distribution():
    alpha = 0.4
    draws = Mixing(mixup=alpha).draw(20_000, 0)
    assert (draws[:, 0] == draws[:, 1]).all(), "mixup has no box"
    assert draws[:, 4].mean() == pytest.approx(0.5, abs=0.01)
    assert draws[:, 4].var() == pytest.approx(
        0.25 / (2 * alpha + 1), rel=0.02
    )  # of Beta(alpha, alpha)
    draws = Mixing(cutmix=1.0).draw(20_000, 0)
    assert (draws[:, 4] == 1).all()
    inner = ((draws[:, :4] > 0) & (draws[:, :4] < 1)).all(1)  # boxes that the border did not cut
    sides = draws[inner, 1] - draws[inner, 0]
    torch.testing.assert_close(sides, draws[inner, 3] - draws[inner, 2], rtol=0, atol=1e-6)
    # With so large an alpha every weight is one half, and so is the area of a box that the border
    # does not cut.
    halves = Mixing(cutmix=1e7).draw(100, 0)
    whole = ((halves[:, :4] > 0) & (halves[:, :4] < 1)).all(1)
    torch.testing.assert_close(
        (halves[whole, 1] - halves[whole, 0]).square(),
        torch.full((int(whole.sum()),), 0.5),
        rtol=0,
        atol=2e-3,
    )
    assert whole.any()
    both = Mixing(mixup=0.2, cutmix=1.0).draw(20_000, 0)
    assert (both[:, 4] == 1).float().mean() == pytest.approx(0.5, abs=0.02)
    assert not torch.equal(both, Mixing(mixup=0.2, cutmix=1.0).draw(20_000, 1))


@pytest.mark.parametrize(
    "settings", [{"views": 2}, {"mixup": 0.4, "cutmix": 1.0, "num_classes": 7}]
)
def test_views_and_mixing_ignore_ranks_and_interruption(settings):
    alone = make(50, 8, **settings)
    alone.set_epoch(3)
    batches = list(alone)
    ranks = [make(50, 2, rank=rank, world_size=4, **settings) for rank in range(4)]
    for loader in ranks:
        loader.load_state_dict({"epoch": 3, "position": 16, "seed": 0, "size": 50})
    dims = (1 if "views" in settings else 0, 0, 0)
    joined = [
        tuple(
            torch.cat(parts, dim)
            for parts, dim in zip(zip(*rank_batches, strict=True), dims, strict=True)
        )
        for rank_batches in zip(*ranks, strict=True)
    ]
    assert equal(joined, batches[2:])
    alone.set_epoch(4)
    assert not equal(list(alone), batches)


def test_gather_from_step_yields_batches_of_epoch():
    loader = make(mixup=0.4, num_classes=7)
    loader.set_epoch(2)
    batches = list(loader)
    again = make(mixup=0.4, num_classes=7)
    again.set_epoch(2)
    step = torch.zeros((), dtype=torch.int64)
    for batch in batches:
        assert equal([again.gather(step)], [batch])
        step += 1
    again.mark_done(4)
    resumed = make(mixup=0.4, num_classes=7)
    resumed.load_state_dict(again.state_dict())
    assert equal(list(resumed), batches[4:])


def test_gather_uses_only_tensor_operations():
    """Replay of a captured graph: a trace of one step in one epoch gives every other, once the
    epoch is drawn.
    """
    settings = {"views": 2, "mixup": 0.4, "cutmix": 1.0, "num_classes": 7}
    loader = make(**settings)
    loader.set_epoch(0)
    traced = make_fx(lambda step: loader.gather(step))(torch.tensor(1))
    for epoch in (0, 5):
        loader.set_epoch(epoch)
        fresh = make(**settings)
        fresh.set_epoch(epoch)
        for step, batch in enumerate(fresh):
            assert equal([traced(torch.tensor(step))], [batch])


@pytest.mark.parametrize("size", [3, 5])
def test_resized_training_images_are_antialiased(size):
    loader = make(augment=Augment(pad=2, flip=True), memory_format=torch.contiguous_format)
    whole = list(loader)
    loader.set_size(size)
    weights = triangle_weights(6, size)
    for got, want in zip(loader, whole, strict=True):
        assert torch.equal(got.index, want.index)
        torch.testing.assert_close(
            got.images,
            torch.einsum("yh,bchw,xw->bcyx", weights, want.images, weights),
            rtol=0,
            atol=1e-5,
        )
    loader.set_size(None)
    assert equal(list(loader), whole)
    with pytest.raises(ConfigError, match="image size 7: the images are 6 x 6"):
        loader.set_size(7)


def triangle_weights(source: int, target: int) -> torch.Tensor:
    """The antialiased triangle filter: weights [target, source], from its definition."""
    scale = source / target
    centres = (torch.arange(target) + 0.5) * scale
    distance = ((torch.arange(source) + 0.5) - centres[:, None]).abs() / scale
    weights = (1 - distance).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)


@pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="needs /proc to see this process's memory"
)
def test_fifty_epochs_take_no_more_memory_than_ten():
    loader = make(
        count=256,
        batch_size=32,
        views=2,
        mixup=0.4,
        cutmix=1.0,
        num_classes=7,
        split=make_split(256, 32),
    )

    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    for epoch in range(50):
        loader.set_epoch(epoch)
        assert sum(len(batch.index) for batch in loader) == 256
        if epoch == 9:
            before = resident_bytes()
    # A batch kept from every epoch would be 31 MB.
    assert resident_bytes() - before < 8 * 2**20


def test_make_loader_with_conflicting_options_is_refused(tmp_path):
    digits = open_dataset("digits")
    with pytest.raises(ConfigError, match="unknown loader 'residnt'; did you mean 'resident'"):
        make_loader(digits, "train", 8, loader="residnt")
    for split in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / split / name / "0.png")
    with pytest.raises(ConfigError, match=r"takes decoded images; open .* with open_dataset"):
        make_loader(list_files(tmp_path), "train", 2, loader="resident")


def test_new_loader_is_one_module_and_one_registry_entry(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    resident = {"resident": "fastokd.data.resident"}
    # Private, because a registered loader cannot be removed in a public way.
    monkeypatch.setattr("fastokd.data.loader._loaders.targets", resident)
    (tmp_path / "toy_loader_module.py").write_text(
        "from fastokd.data import LoaderKind, ResidentLoader\nLOADER = LoaderKind(ResidentLoader,"
        " decoded=True, missing=lambda device: 'pip install toy' if device.type == 'meta' else"
        " None)\n"
    )
    register_loader("toy", "toy_loader_module")
    assert list_loaders() == ["resident", "toy"]
    digits = open_dataset("digits")
    assert len(make_loader(digits, "train", 100, loader="toy")) == 14
    with pytest.raises(ConfigError, match="loader 'toy' cannot run here: pip install toy"):
        make_loader(digits, "train", 100, loader="toy", device="meta")


@pytest.mark.gpu
def test_captured_graph_replays_other_steps_and_epochs():
    settings = {"views": 2, "mixup": 0.4, "cutmix": 1.0, "num_classes": 7}
    loader = make(device="cuda", **settings)
    loader.set_epoch(0)
    step = torch.zeros((), dtype=torch.int64, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        loader.gather(step)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        batch = loader.gather(step)
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        want = make(**settings)
        want.set_epoch(epoch)
        for i, expected in enumerate(want):
            step.fill_(i)
            graph.replay()
            assert torch.equal(batch.index.cpu(), expected.index)
            torch.testing.assert_close(batch.images.cpu(), expected.images, rtol=0, atol=1e-5)
            torch.testing.assert_close(batch.target.cpu(), expected.target)


@pytest.mark.gpu
def test_cuda_batches_equal_cpu_without_synchronization():
    for train in (True, False):
        settings = {"views": 2, "mixup": 0.4, "cutmix": 1.0, "num_classes": 7}
        loader = make(train=train, device="cuda", **settings)
        iterator = iter(loader)
        batches = [next(iterator)]  # the first batch may wait for allocations
        torch.cuda.set_sync_debug_mode("error")
        try:
            batches += iterator
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for got, want in zip(batches, make(train=train, **settings), strict=True):
            assert torch.equal(got.index.cpu(), want.index)
            torch.testing.assert_close(got.images.cpu(), want.images, rtol=0, atol=2e-6)
