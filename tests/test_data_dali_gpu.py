"""DALI on a GPU: the JPEG engine, the hand-over without a copy, and the step's buffer. Skipped
where there is no GPU.
"""

import pytest
import torch
from stream_loaders import CROP, LEVELS, write_split

from fastokd.data import Augment

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    return write_split(tmp_path_factory.mktemp("pictures"), 40)


def on_gpu(split, batch_size, train, options=None, **settings):
    pytest.importorskip("nvidia.dali", reason="pip install -e '.[dali]'")
    from fastokd.data.dali import DaliLoader

    return DaliLoader(
        split,
        batch_size,
        train,
        GPU,
        **{"size": (64, 64), "augment": CROP, **LEVELS, **settings},
        options=options,
    )


@pytest.mark.parametrize("decoder", ["mixed", "cpu"])
@pytest.mark.parametrize("train", [True, False])
def test_dali_gpu_images_match_cpu(split, decoder, train):
    from fastokd.data.dali import DaliLoader

    here = DaliLoader(split, 8, train, "cpu", size=(64, 64), augment=CROP, **LEVELS)
    for want, got in zip(here, on_gpu(split, 8, train, {"decoder": decoder}), strict=True):
        assert got.images.device == GPU
        assert torch.equal(got.index.cpu(), want.index)
        assert torch.equal(got.target.cpu(), want.target)
        difference = (got.images.cpu() - want.images).abs()
        # Another inverse DCT, and other rounding while scaling.
        assert difference.mean() <= 1.5
        assert difference.mean((1, 2, 3)).max() <= 3


@pytest.mark.parametrize("augment", [CROP, Augment(pad=4, flip=True)])
def test_dali_gpu_resumed_epoch_has_same_pixels(split, augment):
    loader = on_gpu(split, 8, True, augment=augment, dtype=torch.bfloat16)
    batches = [tuple(part.clone() for part in batch) for batch in loader]
    running = iter(loader)
    next(running)
    again = on_gpu(split, 8, True, augment=augment, dtype=torch.bfloat16)
    again.load_state_dict(loader.state_dict())
    for got, want in zip(again, batches[1:], strict=True):
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(got, want, strict=True))


def test_batches_are_written_into_a_captured_graphs_input(split):
    loader = on_gpu(split, 8, True, dtype=torch.bfloat16)
    want = [batch.images.double().mean().item() for batch in loader]
    static = torch.zeros((8, 3, 64, 64), dtype=torch.bfloat16, device=GPU).to(
        memory_format=torch.channels_last
    )
    result, graph = torch.zeros((), dtype=torch.float64, device=GPU), torch.cuda.CUDAGraph()
    static.double().mean()  # what a capture may not do for the first time
    with torch.cuda.graph(graph):
        result.copy_(static.double().mean())
    loader.write_into(static)
    got = []
    for _ in loader:
        graph.replay()
        got.append(result.item())
    assert got == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("load", [0.0, 0.5, 1.0])
def test_dali_gpu_decodes_with_any_jpeg_engine_load(split, load):
    assert (
        sum(
            len(batch.index)
            for batch in on_gpu(
                split, 8, True, {"hw_decoder_load": load, "width_hint": 500, "height_hint": 400}
            )
        )
        == 40
    )
