"""A plugin for pytest that writes down at once which test begins and how it ends, so that it is
known of a run that was killed too.

The file is the environment variable's ``VARIABLE``; its lines are JSON: ``{"begun": test}``, then
``{"ended": test, "outcome": ..., "message": ...}``.
"""

import json
import os
from typing import Any

VARIABLE = "FASTOKD_BENCH_OUTCOMES"
_MESSAGE = 600
"""Characters of a failure's message that are kept; the rest is to be had by running that test."""


def _write(line: dict[str, Any]) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        return  # the process that started the workers hears of everything
    with open(os.environ[VARIABLE], "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def pytest_runtest_logstart(nodeid: str) -> None:
    _write({"begun": nodeid})


def pytest_runtest_logreport(report: Any) -> None:
    if report.when != "call" and report.outcome == "passed":
        return  # of what comes before and after the test only what goes wrong is an outcome
    failed = report.outcome == "failed"
    _write(
        {
            "ended": report.nodeid,
            "outcome": "errors" if failed and report.when != "call" else report.outcome,
            **(_message(report) if failed else {}),
        }
    )


def pytest_collectreport(report: Any) -> None:
    if report.outcome == "failed":  # a file that cannot be imported
        _write({"ended": report.nodeid, "outcome": "errors", **_message(report)})


def _message(report: Any) -> dict[str, str]:
    crash = getattr(report.longrepr, "reprcrash", None)
    return {
        "message": (crash.message if crash else report.longreprtext.strip().splitlines()[-1])[
            :_MESSAGE
        ],
        "end": report.longreprtext[-_MESSAGE:],
    }
