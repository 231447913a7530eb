"""Replaces ``python -m fastokd train`` where many runs are needed: takes its arguments, and writes
a run folder without training.

Its errors follow from the configuration, see ``error``. The file ``orders.json`` next to the
sweep's folder changes runs by name: "fail" (ends with exit code 3), "wait" (trains until it is
asked to stop, and saves half of its epochs) or "stubborn" (ignores signals). Starts and ends of
runs are written to ``events.txt`` there. The fingerprint of the data is that of ``sweep.json`` or
``reproduce.json``.
"""

import fcntl
import json
import os
import signal
import sys
import time
from pathlib import Path

import yaml


def error(config: dict) -> float:
    """The student's error in % in the last epoch; in the best it is 1 less."""
    options = config["method_options"]
    return (
        20
        + 2 * options.get("lambda_ta", 4)
        + options.get("lambda_branch", 2)
        + config["seed"] * 0.5
    )


def main(arguments: list[str]) -> int:
    given = dict(zip(arguments[0::2], arguments[1::2], strict=False))
    config, run = yaml.safe_load(Path(given["--config"]).read_text()), Path(given["--out"])
    root = run.parents[2]
    orders = (
        json.loads((root / "orders.json").read_text()) if (root / "orders.json").is_file() else {}
    )
    order = orders.get(run.name, "")
    stopped = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: stopped.append(received))

    def event(what: str) -> None:
        with open(root / "events.txt", "a") as file:
            file.write(
                json.dumps(
                    {
                        "what": what,
                        "run": run.name,
                        "device": given["--device"],
                        "threads": os.environ["OMP_NUM_THREADS"],
                        "pid": os.getpid(),
                    }
                )
                + "\n"
            )

    run.mkdir(parents=True, exist_ok=True)
    fcntl.flock(os.open(run, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)  # as a run does
    event("begins")
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text(yaml.safe_dump({**config, "device": given["--device"]}))
    code, epochs = 0, config["epochs"]
    if order == "fail":
        print("fastokd: warming up", file=sys.stderr)
        print("fastokd: the images are not to my taste; bring others", file=sys.stderr)
        code, epochs = 3, 0
    elif order in ("wait", "stubborn"):
        deadline = time.monotonic() + 120  # a test that fails must not leave it behind
        while not stopped or order == "stubborn":
            if time.monotonic() > deadline:
                return 1
            time.sleep(0.05)
        code, epochs = 75, epochs // 2
    else:
        time.sleep(0.3)
    if epochs:
        of = next(
            (
                json.loads(path.read_text())["data"]
                for path in run.parents[1].glob("*.json")
                if path.stem in ("sweep", "reproduce")
            ),
            {},
        )
        (run / "checkpoints" / "last.pt").touch()
        (run / "environment.json").write_text(
            json.dumps(
                {
                    "data": {
                        "name": "digits",
                        "num_classes": 10,
                        "num_images": {"train": 1442, "test": 355},
                        "image_size": [8, 8],
                        "fingerprint": next(iter(of.values()), None),
                    }
                }
            )
        )
        last = 1 - error(config) / 100
        accuracies = [last + (0.01 if epoch == 0 and epochs > 1 else 0) for epoch in range(epochs)]
        rows = [
            {"branch1": value, "branch2": value - 0.02, "ensemble": value + 0.02}
            for value in accuracies
        ]
        (run / "metrics.jsonl").write_text(
            "".join(
                json.dumps({"epoch": epoch, "eval": row}) + "\n" for epoch, row in enumerate(rows)
            )
        )
    if code == 0:
        (run / "summary.json").write_text(json.dumps({"epochs": epochs}))
    event("ends")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
