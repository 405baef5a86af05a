# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

import ast
import io
from pathlib import Path

import pytest

from pyro_hollow.experiments import harness
from pyro_hollow.experiments.harness import Progress, duration

EXPERIMENTS = Path(harness.__file__).parent


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """The seconds that pass; both the bar's lines and tqdm's own redrawing go by them."""
    now = [0.0]
    monkeypatch.setattr(harness.time, "monotonic", lambda: now[0])
    return now


def run(clock, steps, seconds, file, **kwargs):
    bar = Progress(total=steps, desc="fit", file=file, **kwargs)
    for _ in range(steps):
        clock[0] += seconds
        bar.update()
        bar.refresh()
        bar.set_postfix(loss=1.0)
    bar.close()
    return file.getvalue()


def test_file_gets_a_line_a_minute(clock):
    written = run(clock, 10_000, 0.1, io.StringIO())
    assert len(written.splitlines()) == 1000 // 60
    assert all(line.startswith("fit: ") and "/10000 [" in line for line in written.splitlines())
    assert "\r" not in written


def test_file_gets_nothing_of_less_than_a_minute(clock):
    assert run(clock, 500, 0.1, io.StringIO()) == ""


def test_file_gets_no_line_more_where_the_bar_would_stay(clock):
    assert run(clock, 500, 0.1, io.StringIO(), leave=True).strip() == ""


def test_terminal_gets_a_bar_that_vanishes(clock):
    written = run(clock, 5, 0.1, Terminal())
    assert "fit: " in written and written.endswith("\r")


def test_slow_steps_get_a_line_each(clock):
    assert len(run(clock, 3, 100.0, io.StringIO()).splitlines()) == 3


def test_iteration_is_unchanged():
    assert list(Progress(iter("abc"), file=io.StringIO())) == ["a", "b", "c"]


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*.py")), ids=lambda path: path.stem)
def test_experiments_have_no_other_bars(path):
    if path.stem == "harness":
        return
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names}
    modules = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert not {"tqdm", "TQDMProgressBar", "RichProgressBar"} & names
    assert not any(module and module.partition(".")[0] == "tqdm" for module in modules)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.0, "1 seconds"), (40.4, "40 seconds"), (89.0, "89 seconds"), (700.0, "12 minutes"), (12600.0, "3.5 hours")],
)
def test_duration(seconds, words):
    assert duration(seconds) == words.replace("1 seconds", "1 second")
