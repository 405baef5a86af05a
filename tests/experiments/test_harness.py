# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

import csv
import importlib
import json
import math
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from pyro_hollow.experiments import harness
from pyro_hollow.experiments.data import load_images
from pyro_hollow.experiments.harness import (
    Parser,
    extra,
    figure,
    interleaved,
    keep,
    kept,
    minimise,
    spread,
    table,
    write,
    write_csv,
)

EXPERIMENTS = Path(harness.__file__).parent

# Extras

#: Modules of extras that a whole run needs; the other experiments need none.
NEEDS = {
    "overview": ["matplotlib"],
    "posteriors": ["arviz", "matplotlib"],
    "sde": ["matplotlib"],
    "stiff": ["matplotlib"],
    "vae": ["lightning", "matplotlib", "tensorboard", "yaml"],
}
WITHOUT_EXTRAS = """
import json, runpy, sys

hidden, modules, programs = (words.split() for words in sys.argv[1:])

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in hidden:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
imported, ended = {}, {}
for name in modules:
    try:
        __import__(f"pyro_hollow.experiments.{name}")
    except Exception as error:
        imported[name] = f"{type(error).__name__}: {error}"
for name in programs:
    sys.argv[1:] = ["table"] if name == "vae" else []
    sys.modules.pop(f"pyro_hollow.experiments.{name}", None)
    try:
        runpy.run_module(f"pyro_hollow.experiments.{name}", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        ended[name] = end.code
print(json.dumps([imported, ended]))
"""


ELSEWHERE = ("numpyro_peers", "sbi_peers")  #: programs for other environments.


def test_a_missing_extra_is_named():
    hidden = "arviz lightning matplotlib pooch sklearn statsmodels tensorboard yaml"
    modules = [path.stem for path in EXPERIMENTS.glob("[!_]*.py") if path.stem not in ELSEWHERE]
    command = [sys.executable, "-c", WITHOUT_EXTRAS, hidden, " ".join(modules), " ".join(NEEDS)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    imported, ended = json.loads(output.splitlines()[-1])
    message = '{} is not installed: pip install "pyro_hollow[experiments]"'
    # Classes of Lightning cannot be derived from without it; everything else can be imported.
    assert imported == dict.fromkeys(("vae", "vae_training"), f"ImportError: {message.format('lightning')}")
    program = "python -m pyro_hollow.experiments.{}: "
    assert ended == {name: program.format(name) + message.format(first) for name, (first, *_) in NEEDS.items()}


@pytest.mark.parametrize(
    "name, module", [(name, module) for name, modules in NEEDS.items() for module in modules if module != "lightning"]
)
def test_missing_modules_are_found_before_anything_takes_time(name, module, monkeypatch, tmp_path):
    monkeypatch.setattr(harness, "find_spec", lambda searched: None if searched == module else searched)
    command = [*(["table"] if name == "vae" else []), "--output", str(tmp_path / "results")]
    with pytest.raises(ImportError, match=rf'^{module} is not installed: pip install "pyro_hollow\[experiments\]"$'):
        importlib.import_module(f"pyro_hollow.experiments.{name}").main(command)
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("name, module", [("digits", "sklearn.datasets"), ("mnist", "pooch")])
def test_missing_modules_of_data_sets(name, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf'^{module} is not installed: pip install "pyro_hollow\[experiments\]"$'):
        load_images(name)


def test_errors_of_other_kinds_pass():
    with pytest.raises(ImportError, match="cannot import name 'missing'"), extra():
        from math import missing  # noqa: F401
    with pytest.raises(ImportError, match=r"no_such_module is not installed: pip install \"pyro_hollow\[sde\]\""):
        with extra("sde"):
            import no_such_module  # noqa: F401


# Command line


def test_parser(capsys):
    parser = Parser(
        "folder/name.py", "First\nparagraph.\n\nSecond.\n\nThird.", paragraphs=2, threads=torch.get_num_threads()
    )
    parser.add_kept("results/name", ", all of them")
    args = parser.begin([])
    assert args.output == Path("results/name") and args.force is False
    assert parser.begin(["--force", "--output", "x"]).force
    with pytest.raises(SystemExit):
        parser.begin(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "python -m pyro_hollow.experiments.name" in printed
    assert "First paragraph. Second." in printed and "Third" not in printed
    assert "where results are kept, all of them (default: results/name)" in printed


def test_threads():
    before = torch.get_num_threads()
    Parser("name.py", None).begin(["--threads", str(before + 1)])
    after = torch.get_num_threads()
    torch.set_num_threads(before)
    assert after == before + 1


NUMBERS = {
    "positive": ("7", 7, ["0", "-1"], "must be at least 1"),
    "not_negative": ("0", 0, ["-1"], "must be at least 0"),
    "positive_real": ("1e-3", 1e-3, ["0", "-0.1", "inf", "nan"], "must be positive and finite"),
    "not_negative_real": ("0", 0.0, ["-1", "inf", "nan"], "must be at least 0 and finite"),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_out_of_range(name, capsys):
    text, value, refused, reason = NUMBERS[name]
    parser = Parser("name.py", None, threads=None)
    parser.add_argument("--size", type=getattr(harness, name))
    assert parser.begin(["--size", text]).size == value
    for text in [*refused, "many"]:
        with pytest.raises(SystemExit):
            parser.begin(["--size", text])
        message = f"invalid {name} value: 'many'" if text == "many" else f"{reason}, but got {text}"
        assert f"error: argument --size: {message}" in capsys.readouterr().err


# Results


@dataclass(frozen=True)
class Config:
    name: str
    size: int = 3


@dataclass
class Result:
    config: Config
    error: float = math.nan
    history: list[list[float]] = field(default_factory=list)


@dataclass
class Plain:
    steps: list[int]


def test_kept_results(tmp_path):
    path = tmp_path / "new" / "folder" / "a.json"
    assert kept(path, Result) is None
    result = Result(Config("a", 4), 0.1, [[1.0, math.inf]])
    assert keep(path, result) is result
    assert kept(path, Result) == result
    assert kept(path, Result, force=True) is None
    assert [file.name for file in path.parent.iterdir()] == ["a.json"]  # no draft
    # Settings and findings that came later have their defaults.
    path.write_text('{"config": {"name": "b"}}')
    assert kept(path, Result).config == Config("b", 3) and math.isnan(kept(path, Result).error)
    keep(path, Plain([1, 2]))
    assert kept(path, Plain) == Plain([1, 2])


def test_arrays_of_a_result(tmp_path):
    draws = {"x[1]": np.arange(3.0), "y": np.eye(2)}
    keep(tmp_path / "a-0.5.json", Plain([1]), draws)
    with np.load(tmp_path / "a-0.5.npz") as found:
        assert {name: found[name].tolist() for name in found} == {name: a.tolist() for name, a in draws.items()}
    # Those of an earlier run do not outlive it.
    keep(tmp_path / "a-0.5.json", Plain([1]))
    assert [path.name for path in tmp_path.iterdir()] == ["a-0.5.json"]


def test_a_file_is_complete_or_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write(path, "before")
    monkeypatch.setattr(Path, "replace", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write(path, "after")
    assert path.read_text() == "before"


def test_csv(tmp_path):
    rows = [{**asdict(Config(name)), "error": 0.1 * i} for i, name in enumerate(('a"b', "c, d"))]
    write_csv(tmp_path / "a.csv", rows)
    with open(tmp_path / "a.csv", newline="") as file:
        assert list(csv.DictReader(file)) == [{key: str(value) for key, value in row.items()} for row in rows]


def test_table():
    lines = ["| a | b |", "|---|---|", "| 1 | x |", "| 2.5 | - |"]
    assert table("a | b", [[1, "x"], [2.5, "-"]]) == lines
    assert "\n".join(table("a | b", [], "title")) == "title\n\n| a | b |\n|---|---|"


def test_spread():
    assert spread([1.0, 2.0, 4.0], 2) == "2.33 ± 1.53"
    assert spread([1.0, 2.0, 4.0], 1, deviation=False) == "2.3"
    assert spread([1.25], 1) == "1.2"
    # A seed that failed must not vanish in a mean.
    assert spread([], 1) == spread([1.0, math.nan], 1) == spread([math.inf], 1) == "-"


def test_figure(tmp_path):
    from matplotlib import pyplot as plt

    with figure(tmp_path / "new" / "a.png", 1, 2, (4, 2), dpi=50) as (whole, axes):
        axes[1].plot([1, 2])
    height, width, _ = plt.imread(tmp_path / "new" / "a.png").shape
    assert (width, height) == (200, 100)
    with pytest.raises(ZeroDivisionError), figure(tmp_path / "b.png", 1, 1, (4, 2)):
        _ = 1 / 0
    assert not plt.get_fignums() and not (tmp_path / "b.png").exists()


# Training and timing


def test_minimise_follows_half_a_cosine():
    x = torch.tensor([1.0, -2.0], requires_grad=True)
    training = minimise(lambda: x.square().sum(), [x], num_steps=5, lr=0.1, progress=False)
    expected = [0.1 * (1 + math.cos(math.pi * k / 5)) / 2 for k in range(5)]
    torch.testing.assert_close(training.rates, torch.tensor(expected))
    assert training.losses[0] == 5.0 and training.losses.diff().max() < 0


def test_minimise_stops_at_a_gradient_that_is_not_finite():
    x = torch.tensor([0.0], requires_grad=True)
    with pytest.raises(ArithmeticError, match="norm of the gradient is inf in step 1"):
        minimise(lambda: x.sqrt().sum(), [x], num_steps=3, lr=0.1)


def test_candidates_take_turns(monkeypatch):
    calls, now = [], [0.0]

    def candidate(name, seconds):
        def function():
            calls.append(name)
            now[0] += seconds[calls.count(name) - 1]

        return function

    candidates = {"a": candidate("a", [9.0, 1.0, 5.0, 2.0]), "b": candidate("b", [9.0, 3.0, 3.0, 3.0])}
    assert interleaved(candidates, 3, "label", lambda: now[0]) == {"a": 2.0, "b": 3.0}
    assert calls == ["a", "b"] * 4
