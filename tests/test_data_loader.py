"""The loaders' promises: what is visited how often, in which order, and what augmentation does to a pixel."""

import itertools

import pytest
import torch

from fastokd.data import Augment, ResidentLoader, Split
from fastokd.data.augment import crop, mirror
from fastokd.errors import ConfigError, DataError

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def make_split(count: int, size: int = 6, name: str = "train") -> Split:
    generator = torch.Generator().manual_seed(count)
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    return Split(name, images, torch.arange(count) % 7)


def make(count=50, batch_size=8, train=True, seed=0, **settings) -> ResidentLoader:
    settings = {"mean": MEAN, "std": STD, "augment": Augment(pad=2, flip=True), **settings}
    return ResidentLoader(make_split(count), batch_size, train, seed=seed, **settings)


def equal(left, right) -> bool:
    return len(left) == len(right) and all(torch.equal(x, y) for a, b in zip(left, right, strict=True) for x, y in zip(a, b, strict=True))


def slow_augmented(image, offset, mirrored, pad):
    """One image [C, H, W], pixel by pixel: what a crop out of the black-padded image and a mirroring must give."""
    height, width = image.shape[1:]
    out = torch.zeros_like(image)
    for y, x in itertools.product(range(height), range(width)):
        source_y, source_x = y + int(offset[0]) - pad, x + int(offset[1]) - pad
        if 0 <= source_y < height and 0 <= source_x < width:
            out[:, y, width - 1 - x if mirrored else x] = image[:, source_y, source_x]
    return out


@pytest.mark.parametrize(("height", "width", "pad"), [(5, 5, 1), (4, 7, 3), (1, 1, 1), (6, 3, 0), (3, 3, 5)])
def test_crop_and_mirror_against_a_per_pixel_oracle(height, width, pad):
    offsets = torch.tensor(list(itertools.product(range(2 * pad + 1), repeat=2)))
    images = torch.randint(1, 256, (len(offsets), 3, height, width), dtype=torch.uint8)
    mirrored = torch.arange(len(offsets)) % 3 == 0
    got = mirror(crop(images.permute(0, 2, 3, 1), offsets, pad), mirrored).permute(0, 3, 1, 2)
    want = torch.stack([slow_augmented(*each, pad) for each in zip(images, offsets, mirrored, strict=True)])
    assert torch.equal(got, want)


def test_draws_cover_every_offset_evenly_and_mirror_half():
    offsets, mirrored = Augment(pad=2, flip=True).draw(50_000, torch.Generator().manual_seed(0))
    counts = torch.bincount(offsets[:, 0] * 5 + offsets[:, 1], minlength=25)
    assert counts.sum() == 50_000
    assert ((counts / 50_000 - 1 / 25).abs() < 0.005).all()
    assert abs(mirrored.float().mean() - 0.5) < 0.01
    _, mirrored = Augment(pad=2).draw(1000, torch.Generator())
    assert not mirrored.any()


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_evaluation_images_are_normalised(dtype, memory_format):
    loader = make(count=10, batch_size=4, train=False, dtype=dtype, memory_format=memory_format)
    pixels = make_split(10).images.double() / 255
    want = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD, dtype=torch.float64).view(3, 1, 1)
    for batch in loader:
        assert batch.images.dtype == dtype
        assert batch.images.is_contiguous(memory_format=memory_format)
        # One rounding of a number up to 4, and for float32 the arithmetic's few roundings.
        torch.testing.assert_close(batch.images.double(), want[batch.index], rtol=torch.finfo(dtype).eps, atol=2e-6)


def test_padding_is_a_black_pixel():
    white = Split("train", torch.full((64, 3, 2, 2), 255, dtype=torch.uint8), torch.zeros(64, dtype=torch.int64))
    loader = ResidentLoader(white, 64, True, mean=MEAN, std=STD, augment=Augment(pad=1))
    values = next(iter(loader)).images[:, 0].unique()
    torch.testing.assert_close(values, torch.tensor([-MEAN[0] / STD[0], (1 - MEAN[0]) / STD[0]]))


@pytest.mark.parametrize("augment", [Augment(), Augment(pad=2), Augment(flip=True), Augment(pad=1, flip=True)])
def test_training_images_are_one_of_the_possible_augmentations(augment):
    split = make_split(12)
    loader = ResidentLoader(split, 4, True, mean=(0, 0, 0), std=(1, 1, 1), augment=augment)
    for batch in loader:
        assert torch.equal(batch.target, split.targets[batch.index])
        for image, index in zip((batch.images * 255).round().to(torch.uint8), batch.index, strict=True):
            offsets = itertools.product(range(2 * augment.pad + 1), repeat=2)
            possible = [
                slow_augmented(split.images[index], offset, mirrored, augment.pad)
                for offset in offsets for mirrored in {False, augment.flip}
            ]
            assert any(torch.equal(image, each) for each in possible)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [1, 2, 7, 31, 32, 33])
@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_evaluation_visits_every_image_once_over_all_ranks(count, world_size, batch_size):
    split, seen = make_split(count), []
    for rank in range(world_size):
        loader = make(count, batch_size, train=False, rank=rank, world_size=world_size)
        batches = list(loader)
        assert len(batches) == len(loader)
        assert all(len(batch.index) == batch_size for batch in batches[:-1])
        for batch in batches:
            assert torch.equal(batch.target, split.targets[batch.index])
            seen += batch.index.tolist()
    assert sorted(seen) == list(range(count))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize(("count", "batch_size"), [(48, 4), (49, 4), (12, 3), (37, 9)])
def test_training_drops_the_last_partial_batch_on_every_rank_alike(count, batch_size, world_size):
    seen = []
    for rank in range(world_size):
        loader = make(count, batch_size, rank=rank, world_size=world_size)
        batches = list(loader)
        assert len(batches) == len(loader) == count // (batch_size * world_size)
        assert all(batch.images.shape == (batch_size, 3, 6, 6) for batch in batches)
        seen += [i for batch in batches for i in batch.index.tolist()]
    assert len(seen) == len(set(seen)) == count // (batch_size * world_size) * batch_size * world_size


def test_the_global_batch_does_not_depend_on_the_number_of_ranks():
    alone = list(make(50, 8))
    ranks = [list(make(50, 2, rank=rank, world_size=4)) for rank in range(4)]
    joined = [tuple(torch.cat(parts) for parts in zip(*batches, strict=True)) for batches in zip(*ranks, strict=True)]
    assert equal(alone, joined)


def test_one_seed_gives_one_order_and_others_differ():
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
    assert not torch.equal(first.images[first.index.argsort()], second.images[second.index.argsort()])


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("done", [0, 1, 3, 6])
def test_resume_gives_exactly_the_batches_that_were_left(train, done):
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


def test_a_finished_epoch_resumes_as_finished():
    loader = make()
    assert len(list(loader)) == 6
    resumed = make()
    resumed.load_state_dict(loader.state_dict())
    assert list(resumed) == []


def test_an_abandoned_iteration_starts_over():
    loader = make()
    first = list(loader)
    next(iter(loader))
    assert equal(list(loader), first)


def test_resume_with_another_number_of_ranks_keeps_the_global_batches():
    alone = make(50, 8)
    batches = list(alone)
    iterator = iter(alone)
    next(iterator), next(iterator)
    ranks = [make(50, 4, rank=rank, world_size=2) for rank in range(2)]
    for loader in ranks:
        loader.load_state_dict(alone.state_dict())
    parts = [[batch.index for batch in loader] for loader in ranks]
    assert [torch.cat(pair).tolist() for pair in zip(*parts, strict=True)] == [batch.index.tolist() for batch in batches[2:]]


def test_a_state_that_does_not_fit_is_refused():
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


def test_too_few_training_images_for_a_batch():
    with pytest.raises(DataError, match=r"50 images, fewer than one batch of 64; use --batch-size 50 or less"):
        make(batch_size=64)
    with pytest.raises(DataError, match=r"each of 4 ranks; use --batch-size 12 or less"):
        make(batch_size=16, world_size=4)
    with pytest.raises(DataError, match="use fewer ranks"):
        make(count=3, batch_size=16, world_size=4)
    assert len(make(batch_size=64, train=False)) == 1


@pytest.mark.parametrize(("settings", "message"), [
    ({"batch_size": 0}, "batch_size=0"),
    ({"rank": 2, "world_size": 2}, "rank=2"),
    ({"rank": -1}, "rank=-1"),
    ({"dtype": torch.uint8}, "floating"),
    ({"memory_format": torch.preserve_format}, "channels_last"),
])
def test_settings_out_of_range(settings, message):
    with pytest.raises(ConfigError, match=message):
        make(**settings)
    with pytest.raises(ConfigError, match="negative"):
        Augment(pad=-1)
    with pytest.raises(ConfigError, match="negative"):
        make().set_epoch(-1)


def test_the_split_is_never_written_to():
    split = make_split(20)
    before = split.images.clone()
    for train in (True, False):
        list(ResidentLoader(split, 4, train, mean=MEAN, std=STD, augment=Augment(pad=2, flip=True)))
    assert torch.equal(split.images, before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_cpu_batches_without_making_the_host_wait():
    for train in (True, False):
        loader = make(train=train, device="cuda")
        iterator = iter(loader)
        batches = [next(iterator)]  # the first batch may wait for allocations
        torch.cuda.set_sync_debug_mode("error")
        try:
            batches += iterator
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for got, want in zip(batches, make(train=train), strict=True):
            assert torch.equal(got.index.cpu(), want.index)
            torch.testing.assert_close(got.images.cpu(), want.images, rtol=0, atol=2e-6)
