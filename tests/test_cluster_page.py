"""The batch scripts of docs/cluster.md, with replacements for the programs of the cluster."""

import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parent.parent / "docs" / "cluster.md"
ONE_MACHINE, SEVERAL_MACHINES = re.findall(
    r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL
)

TRAINING = """#!/bin/bash
echo "$0 $*" >> "$LOG"
trap 'sleep 0.3; exit {stopped}' USR1
touch "$STARTED"
for i in $(seq {steps}); do sleep 0.1; done
exit {ended}
"""
SCONTROL = """#!/bin/bash
echo "scontrol $*" >> "$LOG"
[ "$1" != show ] || printf 'node1\\nnode2\\n'
"""
SRUN = """#!/bin/bash
echo "srun $1" >> "$LOG"
exec "${@:2}"
"""


def run_script(folder, script, *, stop, steps=100, stopped=75, ended=0):
    """Run a script, with the signal ``stop`` to it alone; the exit code and the called programs.

    Args:
        steps: tenths of a second until the training ends with the code ``ended``.
        stopped: the code with which it ends after the signal.
    """
    programs = {"scontrol": SCONTROL, "srun": SRUN}
    training = TRAINING.format(stopped=stopped, steps=steps, ended=ended)
    programs |= {"fastokd": training, "torchrun": training}
    (folder / "bin").mkdir()
    for name, text in programs.items():
        path = folder / "bin" / name
        path.write_text(text)
        path.chmod(0o755)
    environment = {
        "PATH": f"{folder / 'bin'}:/usr/bin:/bin",
        "HOME": str(folder),
        "LOG": str(folder / "log"),
        "STARTED": str(folder / "started"),
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NNODES": "4",
        "SLURM_CPUS_PER_TASK": "64",
    }
    process = subprocess.Popen(["bash", "-c", script], env=environment)
    deadline = time.monotonic() + 60
    while not (folder / "started").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    if stop is not None:
        process.send_signal(stop)
    code = process.wait(timeout=60)
    return code, (folder / "log").read_text().splitlines()


@pytest.mark.parametrize(
    ("script", "stopped"), [(ONE_MACHINE, 75), (SEVERAL_MACHINES, 1)], ids=["one", "several"]
)
def test_stopped_job_is_requeued(tmp_path, script, stopped):
    code, calls = run_script(tmp_path, script, stop=signal.SIGUSR1, stopped=stopped)
    assert code == stopped
    assert calls[-1] == "scontrol requeue 17"


@pytest.mark.parametrize("script", [ONE_MACHINE, SEVERAL_MACHINES], ids=["one", "several"])
def test_cancelled_job_is_saved_and_not_requeued(tmp_path, script):
    code, calls = run_script(tmp_path, script, stop=signal.SIGTERM)
    assert code == 75  # of the training after SIGUSR1
    assert "scontrol requeue 17" not in calls


@pytest.mark.parametrize(("ended", "steps"), [(0, 3), (2, 0)])
@pytest.mark.parametrize("script", [ONE_MACHINE, SEVERAL_MACHINES], ids=["one", "several"])
def test_ended_job_is_not_requeued(tmp_path, script, ended, steps):
    code, calls = run_script(tmp_path, script, stop=None, steps=steps, ended=ended)
    assert code == ended
    assert "scontrol requeue 17" not in calls


def test_several_machines_get_first_node_and_cores(tmp_path):
    _, calls = run_script(tmp_path, SEVERAL_MACHINES, stop=None, steps=0)
    assert "srun --cpus-per-task=64" in calls
    (launch,) = [call for call in calls if "torchrun" in call]
    assert "--nnodes=4" in launch
    assert "--rdzv-endpoint=node1:29500" in launch
