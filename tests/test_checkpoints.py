"""Nothing is lost: whatever happens while a checkpoint is saved, one that is whole and as new as
was promised can be loaded.
"""

import errno
import itertools
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import checkpoint_saver
import numpy as np
import pytest
import torch
from checkpoint_saver import KEEP, make_state, number_of, numbers_in, save_up_to, tap, temporaries

from fastokd import storage
from fastokd.errors import CheckpointError, ConfigError, StorageError
from fastokd.train.checkpoint import (
    ADDED,
    FORMAT,
    CheckpointStore,
    check_resumable,
    load_checkpoint,
    load_newest,
    serialize,
    snapshot,
    state_bytes,
)
from fastokd.train.run_folder import RunFolder

ROOT = Path(__file__).resolve().parent.parent
REFUSALS = [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT, errno.EIO, errno.ESTALE]


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The files found after each process that was killed while it saved."""
    command = [sys.executable, checkpoint_saver.__file__, str(tmp_path_factory.mktemp("killed"))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


class TestKilled:
    def test_killed_save_at_random_moments_keeps_checkpoints(self, killed):
        assert len(killed["random"]) == 50
        for found in killed["random"]:
            assert found["newest"] >= found["reported"], found
            assert found["complaints"] == [], found
            assert found["kept"] == sorted(found["kept"], reverse=True), found
            assert len(set(found["kept"])) >= KEEP - 1, found
        assert (
            sum(bool(found["temporaries"]) for found in killed["random"]) >= 5
        )  # the moments were those of saving
        assert killed["random"][-1]["newest"] > killed["random"][0]["newest"]

    def test_killed_save_at_each_call_keeps_checkpoints(self, killed):
        *cut_short, whole = killed["calls"]
        calls = [re.sub(r"\.[0-9a-f]{8}$|(folder) .*", r"\1", found["call"]) for found in cut_short]
        assert calls == [
            "open .best.pt",
            "write .best.pt",
            "fsync .best.pt",
            "replace best.pt",
            "fsync folder",
            "open .last.pt",
            "write .last.pt",
            "fsync .last.pt",
            "replace last-2.pt",
            "replace last-1.pt",
            "replace last.pt",
            "fsync folder",
        ]
        for name, found in zip(calls, cut_short, strict=True):
            renamed = found is cut_short[-1]  # before the folder was flushed, after the rename
            assert found["newest"] == (6 if renamed else 5), found
            assert found["best"] in (3, 6), found
            assert found["complaints"] == [], found
            assert {5, 4} <= set(found["kept"]), found
            # The oldest goes when the new one is complete on the disk, no earlier.
            assert 3 in found["kept"] or name.startswith("replace last") or renamed, found
            assert found["left_over"] == []  # the next store has removed the temporary files
        assert [found["file"] for found in cut_short if found["file"] != "last.pt"] == ["last-1.pt"]
        assert (whole["newest"], whole["best"], whole["kept"], whole["temporaries"]) == (
            6,
            6,
            [6, 5, 4],
            [],
        )

    def test_save_past_file_size_limit_fails_cleanly(self, killed):
        found = killed["limit"]
        assert len(found["said"]) == 1
        assert re.fullmatch(
            r"StorageError: cannot write .*last\.pt: File too large\. Free some space or use"
            r" another folder; .*",
            found["said"][0],
        )
        assert (found["newest"], found["kept"], found["temporaries"]) == (2, [2, 1], [])


def fail_from(monkeypatch, number, place):
    """Make the system refuse with an error: its call at a place in a save, and all after it."""
    count = itertools.count()

    def hook(call, file):
        if next(count) >= place:
            raise OSError(number, os.strerror(number))

    tap(hook, lambda where, name, value: monkeypatch.setattr(where, name, value, raising=False))


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    """The system calls of one save that is the best so far, in their order: (call, file)."""
    found = []
    folder = tmp_path_factory.mktemp("calls")
    store = save_up_to(folder, 5)
    with pytest.MonkeyPatch.context() as patch:
        tap(
            lambda *call: found.append(call),
            lambda where, name, value: patch.setattr(where, name, value, raising=False),
        )
        store.save(make_state(6), is_best=True)
    return found


def places(calls):
    """Some of the places where a save can fail: every call but most of the writes."""
    counts = {}
    for place, call in enumerate(calls):
        counts[call] = counts.get(call, -1) + 1
        if counts[call] in (0, 1, 20):
            yield place, call


class TestRefused:
    def test_save_flushes_file_then_renames_then_folder(self, calls):
        for name in ("best.pt", "last.pt"):
            renamed = calls.index(("replace", name))
            temporary = [
                i
                for i, (call, file) in enumerate(calls)
                if re.fullmatch(rf"\.{re.escape(name)}\.[0-9a-f]{{8}}", file)
            ]
            assert calls[temporary[-1]][0] == "fsync"
            assert {calls[i][0] for i in temporary[:-1]} == {"open", "write"}
            assert temporary[-1] < renamed
            assert calls[renamed + 1][0] == "fsync folder"
        assert calls.index(("replace", "best.pt")) < calls.index(("replace", "last.pt"))

    @pytest.mark.parametrize("number", REFUSALS, ids=errno.errorcode.get)
    def test_save_failing_at_any_call_keeps_checkpoints(self, tmp_path, monkeypatch, calls, number):
        store = save_up_to(tmp_path / "start", 5)
        for place, _ in places(calls):
            folder = tmp_path / str(place)
            folder.mkdir()
            for path in (tmp_path / "start").iterdir():
                os.link(path, folder / path.name)
            store = CheckpointStore(folder, KEEP)
            with monkeypatch.context() as patch:
                fail_from(patch, number, place)
                with pytest.raises(
                    StorageError, match=rf"cannot write .*\.pt: {os.strerror(number)}\. Free"
                ) as raised:
                    store.save(make_state(6), is_best=True)
            assert "\n" not in str(raised.value)
            state, _, complaints = load_newest(folder)
            assert complaints == []
            # Only a folder that cannot be flushed leaves the new one there, and it does not count
            # as saved.
            assert number_of(state) == 5 or (number_of(state) == 6 and place == len(calls) - 1)
            assert {5, 4} <= set(numbers_in(folder))
            assert temporaries(folder) == []
            assert number_of(load_checkpoint(folder / "best.pt")) in (3, 6)
            store.save(make_state(7))  # the disk is well again
            assert numbers_in(folder)[:2] == [7, number_of(state)]


class TestSave:
    def test_save_writes_best_then_others_then_last(self, tmp_path):
        store, seen = save_up_to(tmp_path, 3), []

        def before():
            seen.append(
                tuple(load_checkpoint(tmp_path / name)["epoch"] for name in ("best.pt", "last.pt"))
            )

        for number in (4, 5):
            store.save(make_state(number), is_best=number == 4, before=before)
        assert seen == [(4, 3), (4, 4)]
        assert numbers_in(tmp_path) == [5, 4, 3]

    def test_save_whose_records_fail_does_not_count(self, tmp_path):
        store = save_up_to(tmp_path, 1)

        def refuse():
            raise StorageError("cannot write metrics.jsonl: No space left on device")

        with pytest.raises(StorageError):
            store.save(make_state(2), before=refuse)
        assert numbers_in(tmp_path) == [1]
        store.save(make_state(4))
        assert numbers_in(tmp_path) == [4, 1]

    def test_save_refuses_values_that_cannot_be_loaded(self, tmp_path):
        store = CheckpointStore(tmp_path, KEEP)
        for entry, value, said in (
            ("last", {"branch1": np.float64(0.5)}, r"\['last'\]\['branch1'\] is of type float64"),
            ("classes", [Path("a")], r"\['classes'\]\[0\] is of type \w*Path"),
            ("data", {(1, 2): 3}, r"\['data'\] has a key of type tuple"),
        ):
            with pytest.raises(TypeError, match=said):
                store.save({**make_state(1), entry: value})
        for entry in ("model", "step", "ranks"):
            with pytest.raises(
                TypeError,
                match=f"the entry '{entry}' of a checkpoint is missing or of the wrong type",
            ):
                store.save({name: value for name, value in make_state(1).items() if name != entry})
        assert list(tmp_path.iterdir()) == []

    def test_snapshot_keeps_types_strides_and_versions(self):
        network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).to(
            memory_format=torch.channels_last
        )
        state = network.state_dict()
        taken = snapshot(state)
        assert taken._metadata == state._metadata
        for name, value in state.items():
            assert torch.equal(taken[name], value)
            assert (taken[name].dtype, taken[name].stride()) == (value.dtype, value.stride())
            assert taken[name].data_ptr() != value.data_ptr()
        part = snapshot({"view": torch.zeros(1000)[:10], "pair": (1, [None, True])})
        assert (
            part["view"].untyped_storage().nbytes() == 40
        )  # and not of the whole, which torch.save would write
        assert part["pair"] == (1, [None, True])

    @pytest.mark.gpu
    def test_save_of_gpu_tensors(self, tmp_path):
        store = CheckpointStore(tmp_path, KEEP)
        for number in (1, 2):
            state = make_state(number, 1_000_000)
            state["model"] = {name: value.cuda() for name, value in state["model"].items()}
            store.save(state)
        assert numbers_in(tmp_path) == [2, 1]


class TestDamaged:
    DAMAGE = {  # noqa: RUF012
        "cut short": lambda path: os.truncate(path, path.stat().st_size // 2),
        "empty": lambda path: os.truncate(path, 0),
        "one byte of a tensor": lambda path: flip(path, path.stat().st_size // 2),
        "text": lambda path: path.write_text("not a checkpoint"),
        "another file of torch": lambda path: torch.save({"weights": torch.zeros(3)}, path),
        "of the wrong kind": lambda path: torch.save(
            {"format": FORMAT, **make_state(9), "model": None}, path
        ),
        "a link to itself": lambda path: (path.unlink(), path.symlink_to(path.name)),
    }

    @pytest.mark.parametrize("damage", DAMAGE)
    def test_damaged_last_falls_back_to_previous(self, tmp_path, damage):
        save_up_to(tmp_path, 3)
        self.DAMAGE[damage](tmp_path / "last.pt")
        state, path, complaints = load_newest(tmp_path)
        assert (number_of(state), path) == (2, tmp_path / "last-1.pt")
        assert len(complaints) == 1
        assert re.search(
            r"last\.pt (is damaged|is not a fastokd checkpoint)|cannot read .*last\.pt: ",
            complaints[0],
        )
        assert "\n" not in complaints[0]
        # Resumed from there, the damaged one does not push a whole one out.
        store = CheckpointStore(tmp_path, KEEP)
        store.save(make_state(4))
        assert numbers_in(tmp_path) == [4, 2, 1]

    def test_load_newest_skips_all_damaged_checkpoints(self, tmp_path):
        save_up_to(tmp_path, 3)
        for name in ("last.pt", "last-1.pt"):
            (tmp_path / name).write_bytes(b"")
        state, path, complaints = load_newest(tmp_path)
        assert (number_of(state), path.name, len(complaints)) == (1, "last-2.pt", 2)
        (tmp_path / "last-2.pt").write_bytes(b"")
        with pytest.raises(
            CheckpointError,
            match=(
                r"all checkpoints of the run are damaged: .*last\.pt .*last-1\.pt .*last-2\.pt .*"
                r"copy .*best\.pt to .*last\.pt$"
            ),
        ) as raised:
            load_newest(tmp_path)
        assert "\n" not in str(raised.value)
        (tmp_path / "best.pt").replace(tmp_path / "last.pt")
        assert number_of(load_newest(tmp_path)[0]) == 3

    def test_load_newest_without_checkpoint_is_refused(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"there is no checkpoint at .*last\.pt"):
            load_newest(tmp_path / "nowhere")

    def test_newer_format_is_refused(self, tmp_path):
        save_up_to(tmp_path, 2)
        torch.save({**make_state(3), "format": FORMAT + 1}, tmp_path / "last.pt")
        with pytest.raises(
            CheckpointError, match=f"has format {FORMAT + 1}, this fastokd reads up to {FORMAT}"
        ):
            load_newest(tmp_path)

    def test_any_changed_byte_is_detected(self, tmp_path):
        """A file with any byte changed is refused, or what is read from it is what was written."""
        path = tmp_path / "last.pt"
        path.write_bytes(serialize(make_state(1, 100)))
        whole, chance, refused = path.read_bytes(), random.Random(0), 0
        places = [*chance.sample(range(len(whole)), 300), *range(len(whole) - 100, len(whole))]
        for place in places:
            path.write_bytes(whole)
            flip(path, place, chance.randrange(1, 256))
            try:
                state = load_checkpoint(path)
            except CheckpointError:
                refused += 1
            else:
                assert number_of(state) == 1
        assert refused > 0.25 * len(
            places
        )  # much of so small a file is padding, and names written twice

    def test_unreadable_checkpoint_is_reported(self, tmp_path, monkeypatch):
        save_up_to(tmp_path, 1)

        def refuse(*arguments, **options):
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(torch, "load", refuse)
        with pytest.raises(CheckpointError, match=r"cannot read .*last\.pt: Input/output error"):
            load_checkpoint(tmp_path / "last.pt")


def flip(path: Path, place: int, bits: int = 0x10) -> None:
    """Change a byte of a file, where it is."""
    with open(path, "r+b") as file:
        file.seek(place)
        value = file.read(1)[0]
        file.seek(place)
        file.write(bytes([value ^ bits]))


class TestKept:
    @pytest.mark.parametrize("keep", [1, 2, 4])
    def test_store_keeps_the_newest(self, tmp_path, keep):
        save_up_to(tmp_path, 6, keep)
        assert numbers_in(tmp_path) == [6, 5, 4, 3][:keep]
        assert number_of(load_checkpoint(tmp_path / "best.pt")) == 6
        assert len(list(tmp_path.iterdir())) == keep + 1

    def test_store_with_changed_keep(self, tmp_path):
        save_up_to(tmp_path, 5, keep=4)
        for keep, expected in ((2, [6, 5]), (3, [7, 6, 5]), (1, [8])):
            store = CheckpointStore(tmp_path, keep)
            store.save(make_state(expected[0]))
            assert numbers_in(tmp_path) == expected

    def test_checkpoints_are_separate_files(self, tmp_path):
        """One of them that is written over in place, by whatever it is, takes no other with it."""
        save_up_to(tmp_path, 6)
        assert len({path.stat().st_ino for path in tmp_path.iterdir()}) == KEEP + 1


class TestOlderFormats:
    def state(self, number):
        state = {name: value for name, value in make_state(1).items() if name not in ADDED}
        if number == 1:
            del state["criterion"]
            state["optimizer"] = state["optimizer"]["sgd"]
        return {**state, "format": number}

    @pytest.mark.parametrize("number", [1, 2])
    def test_older_format_is_read_but_not_resumed(self, tmp_path, number):
        torch.save(self.state(number), tmp_path / "last.pt")
        for _ in range(2):  # what is done to one does not show in the next
            state = load_checkpoint(tmp_path / "last.pt")
            assert {name: state[name] for name in ADDED} == ADDED
            state["loader"]["epoch"] = 3
        assert (state["format"], state["criterion"], list(state["optimizer"])) == (
            number,
            {},
            ["sgd"],
        )
        assert torch.equal(state["model"]["trunk"], make_state(1)["model"]["trunk"])
        with pytest.raises(
            CheckpointError,
            match=f"last.pt has format {number}, .* can be evaluated and exported, but not resumed",
        ):
            check_resumable(state, str(tmp_path / "last.pt"))

    def test_current_format_is_resumed(self, tmp_path):
        save_up_to(tmp_path, 1)
        check_resumable(load_checkpoint(tmp_path / "last.pt"), "last.pt")


class TestSpace:
    def test_state_bytes_matches_file_size(self, tmp_path):
        for size in (5_000, 500_000):
            (tmp_path / "last.pt").write_bytes(serialize(make_state(1, size)))
            assert (
                0
                <= state_bytes(make_state(1, size)) - (tmp_path / "last.pt").stat().st_size
                < 2**17
            )

    def test_check_space_refuses_full_disk(self, tmp_path, monkeypatch):
        store = CheckpointStore(tmp_path / "checkpoints", 3)
        store.check_space(2**20)
        with pytest.raises(
            StorageError,
            match=(
                r"^5 checkpoints \(3 of the newest, the best, and one while it is written\) need"
                r" 5242880 GiB, and .* has \S+ [MG]iB free: free some space"
            ),
        ):
            store.check_space(2**50)
        usage = storage.shutil.disk_usage(tmp_path)
        for free, total, good in (
            (5 * 2**20, 2**30, True),
            (5 * 2**20 - 1, 2**30, False),
            (0, 0, True),
        ):
            monkeypatch.setattr(
                storage.shutil,
                "disk_usage",
                lambda _, free=free, total=total: usage._replace(free=free, total=total),
            )
            if good:
                store.check_space(2**20)
            else:
                with pytest.raises(StorageError, match=r"need 5\.0 MiB, and .* has 5\.0 MiB free"):
                    store.check_space(2**20)

    def test_check_space_counts_existing_checkpoints(self, tmp_path, monkeypatch):
        save_up_to(tmp_path, 3)
        size = state_bytes(make_state(1))
        there = sum(path.stat().st_size for path in tmp_path.iterdir())
        store, usage = CheckpointStore(tmp_path, KEEP), storage.shutil.disk_usage(tmp_path)
        monkeypatch.setattr(
            storage.shutil, "disk_usage", lambda _: usage._replace(free=5 * size - there)
        )
        store.check_space(size)


class TestRunFolder:
    def test_run_without_last_checkpoint_is_kept(self, tmp_path):
        run = RunFolder.create(tmp_path / "run")
        run.unlock()
        save_up_to(run.checkpoints, 2)
        run.last.unlink()
        with pytest.raises(ConfigError, match="already holds a run: continue it with"):
            RunFolder.create(tmp_path / "run")
        run.discard_without_checkpoint()
        assert numbers_in(run.checkpoints) == [1]

    def test_files_of_killed_run_are_replaced(self, tmp_path):
        run = RunFolder.create(tmp_path / "run")
        run.unlock()
        left = [
            run.csv_path,
            run.log_path,
            run.best,
            run.path / ".config.yaml.0123abcd",
            run.path / ".metrics.jsonl.0123abcd",
            run.checkpoints / ".last.pt.0123abcd",
        ]
        for path in left:
            path.write_text("")
        again = RunFolder.create(tmp_path / "run")
        assert not any(path.exists() for path in left)
        again.unlock()
        for path in left:
            path.write_text("")
        again.discard_without_checkpoint()
        assert not (tmp_path / "run").exists()

    def test_foreign_hidden_file_is_not_replaced(self, tmp_path):
        (tmp_path / "run" / "checkpoints").mkdir(parents=True)
        (tmp_path / "run" / ".git").mkdir()
        with pytest.raises(ConfigError, match=r"is not empty \(\.git\)"):
            RunFolder.create(tmp_path / "run")

    def test_forked_process_does_not_hold_the_lock(self, tmp_path):
        run = RunFolder.create(tmp_path / "run")
        (read, write), (begun, begin) = os.pipe(), os.pipe()
        worker = (
            os.fork()
        )  # as a loader's, which lives on for seconds when the training process is killed
        if worker == 0:
            os.close(write)
            os.write(begin, b"x")
            os.read(read, 1)
            os._exit(0)
        try:
            os.read(begun, 1)
            with pytest.raises(ConfigError, match="another process is training"):
                RunFolder(tmp_path / "run").lock()
            run.unlock()
            RunFolder(tmp_path / "run").lock()
        finally:
            os.close(write)
            os.waitpid(worker, 0)
