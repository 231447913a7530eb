"""The learning rate over a run, against numbers worked out by hand."""

import math
from typing import Any

import pytest

from fastokd.errors import ConfigError
from fastokd.train.config_files import config_from_mapping
from fastokd.train.rules import check_config


def rates(places: list[float], **fields: Any) -> list[float]:
    config = config_from_mapping({"data": "digits", **fields}, "test")
    check_config(config)
    return [config.lr_at(place) for place in places]


def test_step_schedule_divides_lr_at_fractions() -> None:
    """AHBF: 0.1, divided by 10 after half and three quarters of 300 epochs."""
    assert rates([0, 149, 149.999, 150, 224, 225, 299, 300], epochs=300) == pytest.approx(
        [0.1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001, 0.001]
    )
    # 0.28 * 200 is 56.00000000000001 in floating point, and 0.3 * 30 is 9.
    assert rates([55.999, 56], epochs=200, lr_decay_at=[0.28], lr_gamma=0.5) == pytest.approx(
        [0.1, 0.05]
    )
    assert rates([8.99, 9], epochs=30, lr_decay_at=[0.3], lr_gamma=0.2) == pytest.approx(
        [0.1, 0.02]
    )
    assert rates([0, 7], epochs=8, lr_decay_at=[]) == pytest.approx([0.1, 0.1])
    # Half of 5 epochs is within the third: the rate falls with the fourth.
    assert rates([2, 2.6, 3], epochs=5, lr_decay_at=[0.5]) == pytest.approx([0.1, 0.1, 0.01])


def test_cosine_schedule_values() -> None:
    """Half a cosine from the rate to its final fraction: (1 + cos(pi t / T)) / 2 of what is
    between.
    """
    quarter = 0.5 + math.sqrt(0.5) / 2
    assert rates([0, 25, 50, 75, 100], schedule="cosine", lr=0.4, epochs=100) == pytest.approx(
        [0.4, 0.4 * quarter, 0.2, 0.4 * (1 - quarter), 0.0]
    )
    assert rates(
        [0, 50, 100], schedule="cosine", lr=0.4, lr_final=0.1, epochs=100
    ) == pytest.approx([0.4, 0.22, 0.04])
    assert rates(
        [10, 55, 100], schedule="cosine", lr=0.4, warmup_epochs=10, epochs=100
    ) == pytest.approx([0.4, 0.2, 0.0])


def test_warmup_is_linear() -> None:
    for schedule in ("step", "cosine"):
        assert rates(
            [0, 0.5, 2.5, 4.75, 5], schedule=schedule, warmup_epochs=5, epochs=90
        ) == pytest.approx([0.0, 0.01, 0.05, 0.095, 0.1])
    # Steps are counted from the start of the run, not from the end of the warm-up.
    assert rates([44.9, 45], warmup_epochs=5, epochs=90) == pytest.approx([0.1, 0.01])
    assert rates([0], warmup_epochs=0, epochs=90) == pytest.approx([0.1])


def test_onecycle_schedule_values() -> None:
    """From a 25th up to the rate in 0.3 of the run, and down along half a cosine."""
    assert rates([0, 15, 30, 65, 100], schedule="onecycle", lr=1.0, epochs=100) == pytest.approx(
        [0.04, 0.52, 1.0, 0.5, 0.0]
    )
    assert rates(
        [0, 5, 10, 55, 100],
        schedule="onecycle",
        lr=1.0,
        epochs=100,
        warmup_epochs=10,
        lr_final=0.02,
    ) == pytest.approx([0.04, 0.52, 1.0, 0.51, 0.02])
    assert rates(
        [0, 50], schedule="onecycle", lr=1.0, epochs=100, warmup_epochs=0
    ) == pytest.approx([1.0, 0.5])


@pytest.mark.parametrize("schedule", ["step", "cosine", "onecycle"])
def test_schedule_past_end_keeps_last_rate(schedule: str) -> None:
    """Rounding may place the last step a little past the end."""
    end, beyond = rates([10, 10.001], schedule=schedule, lr_final=0.1, epochs=10)
    assert end == beyond == pytest.approx(0.001 if schedule == "step" else 0.01)


def test_lr_scaling_follows_batch_size() -> None:
    for scaling, factor in (("none", 1.0), ("linear", 4.0), ("sqrt", 2.0)):
        fields = {
            "lr": 0.1,
            "lr_scaling": scaling,
            "batch_size": 1024,
            "lr_batch_size": 256,
            "epochs": 100,
        }
        assert rates([2.5, 5, 75], warmup_epochs=5, **fields) == pytest.approx(
            [0.05 * factor, 0.1 * factor, 0.001 * factor]
        )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schedule": "cosin"}, r"unknown schedule 'cosin'; did you mean 'cosine'\?"),
        ({"lr_scaling": "lin"}, "unknown lr_scaling 'lin'; did you mean 'linear'"),
        ({"lr": 0.0}, "lr=0.0: it must be a positive number"),
        ({"lr": float("nan")}, "lr=nan: it must be a positive number"),
        ({"lr_decay_at": [0.5, 1.0]}, r"lr_decay_at=\(0.5, 1.0\): each value must be in \(0, 1\)"),
        ({"lr_gamma": 0.0}, r"lr_gamma=0.0: it must be in \(0, 1\]"),
        ({"lr_final": 1.5}, r"lr_final=1.5: it must be in \[0, 1\]"),
        ({"lr_batch_size": 0}, "lr_batch_size=0: it must be at least 1"),
        ({"warmup_epochs": 10.0, "epochs": 10}, "warmup_epochs=10.0: it must be below epochs=10"),
        ({"warmup_epochs": -1.0}, "warmup_epochs=-1.0: it must be at least 0"),
        ({"warmup_epochs": float("nan")}, "warmup_epochs=nan: it must be at least 0"),
    ],
    ids=str,
)
def test_invalid_values_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rates([0], **fields)
