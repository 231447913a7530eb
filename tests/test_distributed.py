"""Several processes that train together do what one process would do with the whole batch."""

import socket
import threading
import time

import pytest
import rank_checks
import torch
import torch.distributed as dist
from launching import finish, start_ranks

from fastokd.errors import ConfigError
from fastokd.train.config import TrainConfig
from fastokd.train.distributed import (
    Agreement,
    Ranks,
    _store_of_this_start,
    choose_device,
    from_main,
    gather_states,
    process_group,
    share_of_batch,
    sum_counts,
)
from fastokd.train.launch import launched

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request, tmp_path_factory):
    """The results of each of several processes, see ``rank_checks.py``."""
    folder = tmp_path_factory.mktemp("ranks")
    for process in start_ranks(request.param, ["tests/rank_checks.py", folder]):
        code, _, errors = finish(process)
        assert code == 0, errors
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(request.param)]


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name],
            value,
            rtol=1e-12,
            atol=1e-12,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def test_gradients_equal_whole_batch(ranks):
    model = rank_checks.make_model(norms=False)
    alone = rank_checks.train(model, model, [[step] for step in rank_checks.images()])
    for found in ranks:
        for accumulate in (1, 2):
            assert_same(found[f"weights{accumulate}"], alone)


def test_synchronized_norms_equal_whole_batch(ranks):
    model = rank_checks.make_model(norms=True)
    alone = rank_checks.train(model, model, [[step] for step in rank_checks.images()])
    for found in ranks:
        assert_same(found["synchronized"], alone)
        assert not torch.allclose(
            found["apart"]["trunk.0.weight"], alone["trunk.0.weight"], atol=1e-6
        )


def test_running_statistics_are_averaged(ranks):
    floats = [name for name in ranks[0]["together"] if not name.endswith("num_batches_tracked")]
    each = {name: torch.stack([found["apart"][name] for found in ranks]) for name in floats}
    assert sum(bool(values.std(0).max() > 1e-4) for values in each.values()) >= 5
    for found in ranks:
        assert found["together"]["trunk.1.num_batches_tracked"] == rank_checks.STEPS
        for name in floats:
            torch.testing.assert_close(found["together"][name], each[name].mean(0))
            assert torch.equal(found["together"][name], ranks[0]["together"][name])


def test_agreement_is_returned_one_call_later(ranks):
    for found in ranks:
        assert found["agreed"] == [0, 0, 3, 0, 2, 0]  # what is raised with 2 is dropped
        assert found["settled"] == [1, 0]
    alone = Agreement()
    assert [alone.exchange(raised) for raised in (0, 2, 0)] == [0, 2, 0]


def test_sum_counts_with_an_empty_process(ranks):
    size = len(ranks)
    expected = (
        {"branch1": sum(2 + rank for rank in range(1, size)), "ta2": size - 1},
        5 * sum(range(size)),
    )
    assert all(found["counts"] == expected for found in ranks)
    assert sum_counts({"branch1": torch.tensor(3)}, 4) == ({"branch1": 3}, 4)


def test_out_of_memory_in_one_process_is_reported_to_all(ranks):
    """None waits in the step for gradients of the one that has left it."""
    for found in ranks:
        assert found["fits"] == [True] * (len(ranks) - 1) + [False]


def test_gather_states_and_from_main(ranks):
    for found in ranks:
        assert [state["list"] for state in found["gathered"]] == [
            [rank, None] for rank in range(len(ranks))
        ]
        assert [state["rng"].tolist() for state in found["gathered"]] == [
            list(range(rank + 1)) for rank in range(len(ranks))
        ]
        assert [state["name"] for state in found["gathered"]] == [
            "x" * rank for rank in range(len(ranks))
        ]
        assert found["main"]["path"] == "runs/0"
        assert found["main"]["value"].tolist() == [0, 0, 0]
    assert gather_states([1, "a"]) == [[1, "a"]]
    assert from_main({"a": 1}) == {"a": 1}


@pytest.mark.parametrize(
    ("given", "size", "described", "share"),
    [
        ({"batch_size": 256, "device_batch": 64}, 2, "batch 256 = 2 processes x 2 x 64", (2, 64)),
        ({"batch_size": 256}, 8, "batch 256 = 8 processes x 32", (1, 32)),
        ({"batch_size": 128, "device_batch": 32}, 1, "batch 128 = 1 process x 4 x 32", (4, 32)),
        ({"batch_size": 128}, 1, "batch 128", (1, 128)),
    ],
)
def test_global_batch_is_divided(given, size, described, share):
    found = share_of_batch(TrainConfig(**given), Ranks(0, size))
    assert found.describe() == described
    assert (found.accumulate, found.device_batch) == share


@pytest.mark.parametrize(
    ("given", "size", "message"),
    [
        (
            {"batch_size": 128},
            3,
            "batch_size=128 over 3 processes leaves 2; it is the global batch: use 126 or 129",
        ),
        (
            {"batch_size": 2},
            4,
            "batch_size=2 over 4 processes leaves 2; it is the global batch: use 4",
        ),
        (
            {"batch_size": 24, "device_batch": 8},
            2,
            (
                "device_batch=8: each of 2 processes has 12 images of a batch of 24; use one of 1,"
                " 2, 3, 4, 6, 12"
            ),
        ),
        (
            {"batch_size": 4},
            4,
            (
                "batch_size=4 over 4 processes is one image at once, and batch norm needs two: use"
                " 8 or more, or --sync-bn True"
            ),
        ),
    ],
)
def test_indivisible_batch_is_refused(given, size, message):
    with pytest.raises(ConfigError, match=message):
        share_of_batch(TrainConfig(**given), Ranks(0, size))


def test_single_image_needs_synchronized_norms():
    assert share_of_batch(TrainConfig(batch_size=4, sync_bn=True), Ranks(0, 4)).device_batch == 1


@pytest.fixture
def environment(monkeypatch):
    """Sets the variables that torchrun sets, and no others of them."""

    def describe(**given):
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in given.items():
            monkeypatch.setenv(name, value)

    describe()
    return describe


def test_process_group_without_launcher(environment):
    environment(RANK="0", WORLD_SIZE="2")  # some clusters describe their nodes so
    assert not launched()
    with process_group("cpu") as found:
        assert found == Ranks(0, 1, 0)
        assert found.is_main


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"MASTER_PORT": ""},
            (
                r"MASTER_PORT='' in the environment; torchrun sets RANK, .*: start with torchrun or"
                r" --gpus N, or unset them"
            ),
        ),
        ({"RANK": "first"}, "RANK='first' in the environment"),
        (
            {"RANK": "2"},
            "RANK=2 with WORLD_SIZE=2 in the environment; ranks are 0 to WORLD_SIZE - 1",
        ),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR='' in the environment"),
    ],
)
def test_inconsistent_environment_is_refused(environment, given, message):
    environment(
        **{
            "RANK": "0",
            "WORLD_SIZE": "2",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "29500",
            **given,
        }
    )
    with pytest.raises(ConfigError, match=message), process_group("cpu"):
        pass


def test_taken_port_is_reported(environment):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        environment(
            RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=port
        )
        with (
            pytest.raises(
                ConfigError,
                match=(
                    rf"the port of 127.0.0.1:{port} is taken; choose another with torchrun's"
                    r" --master-port"
                ),
            ),
            process_group("cpu"),
        ):
            pass


def test_restart_ignores_store_of_previous_start():
    """In a store that outlives it: the second rank comes first, and finds the name and the answer
    of the start before.
    """
    store, stores = dist.HashStore(), []
    for value in ("old", "new"):
        found = {}

        def meet(rank, found=found):
            # Private, because torchrun restarts with one store only after workers have died.
            found[rank] = _store_of_this_start(store, Ranks(rank, 2, rank))

        threads = [threading.Thread(target=meet, args=(rank,), daemon=True) for rank in (1, 0)]
        for thread in threads:
            thread.start()
            time.sleep(0.2)
        for thread in threads:
            thread.join(30)
        found[0].set("address", value)
        assert found[1].get("address") == value.encode()
        stores.append(found[0])
    assert stores[0].get("address") == b"old"


def test_too_few_gpus_are_refused(environment, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    environment(LOCAL_WORLD_SIZE="4")
    assert choose_device("cuda", Ranks(0, 1)) == torch.device("cuda", 0)
    assert choose_device("auto", Ranks(0, 1)) == torch.device("cuda", 0)
    assert choose_device("cpu", Ranks(3, 4, 3)) == torch.device("cpu")
    with pytest.raises(
        ConfigError,
        match=(
            r"4 processes on this machine, and torch sees 2 GPUs; start 2 with --gpus 2 or"
            r" --nproc-per-node 2"
        ),
    ):
        choose_device("auto", Ranks(1, 8, 1))
    environment(LOCAL_WORLD_SIZE="2")
    assert choose_device("cuda", Ranks(3, 4, 1)) == torch.device("cuda", 1)
    with pytest.raises(
        ConfigError, match="device 'cuda:0' with 4 processes: each takes the GPU of its local rank"
    ):
        choose_device("cuda:0", Ranks(3, 4, 1))
