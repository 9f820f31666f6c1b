"""Progress in log files: a line now and then, and none for work that is soon done."""
from __future__ import annotations

import logging

import pytest

from ldm.common import progress
from ldm.common.progress import show_progress


class Clock:
    """A clock that advances by as many seconds as each item takes."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def monotonic(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(progress, "time", found)
    return found


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def work(clock: Clock, count: int, seconds: float, **options: object) -> list[int]:
    done = []
    for item in show_progress(range(count), **options):
        clock.seconds += seconds
        done.append(item)
    return done


def test_a_line_now_and_then(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert work(clock, 50, 1.0, description="covariance", unit="captions") == list(range(50))
    assert lines(caplog) == ["covariance: 5 of 50 captions, about 45 s left",
                             "covariance: 25 of 50 captions, about 25 s left",
                             "covariance: 45 of 50 captions, about 5 s left"]


def test_quick_work_logs_nothing(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        work(clock, 40, 0.1, description="masks")
        work(clock, 1, 100.0, description="one")  # done as soon as there is something to say
        work(clock, 9, 100.0, description="off", enabled=False)
    assert not caplog.records


def test_counting_by_hand_and_unknown_totals(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), show_progress(description="scoring", unit="images") as counter:
        for _ in range(3):
            clock.seconds += 400
            counter.update(8)
        counter.update(0)
    assert lines(caplog) == ["scoring: 8 images", "scoring: 16 images", "scoring: 24 images"]
    with show_progress(total=1000, description="long") as counter, caplog.at_level(logging.INFO):
        clock.seconds += 400
        counter.update(100)
    assert lines(caplog)[-1] == "long: 100 of 1000, about 60 min left"


def test_a_terminal_gets_a_bar(clock: Clock, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
                               capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    work(clock, 3, 100.0, description="masks", leave=True)
    assert "masks: 100%" in capsys.readouterr().err and not caplog.records
    work(clock, 3, 100.0, description="images", in_terminals=False)
    assert not capsys.readouterr().err
