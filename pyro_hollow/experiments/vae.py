# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""
Variational autoencoders whose posteriors are flows: the published table, under one protocol.

Every posterior is amortised: the encoder gives it the parameters of its base distribution and a context. "table"
trains the chosen posteriors and seeds with Lightning, evaluates the best epoch of each on the test images, prints the
table and writes it as Markdown and CSV, with figures; what is complete is used again, and what was stopped goes on.
"gradients" tells how noisy the gradients of what "table" has trained are.

    python -m pyro_hollow.experiments.vae table --data digits
    python -m pyro_hollow.experiments.vae table --data mnist --data-dir FOLDER --flow none hollow --seed 0 1 2
    python -m pyro_hollow.experiments.vae gradients --data digits --flow hollow hollow-stochastic

Options can also stand in a YAML file, ``--config FILE``, by their names without dashes; those of the command line come
first. Options of Lightning's Trainer (``--devices 2 --strategy ddp``) train one run on several devices.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyro_hollow.experiments import harness
from pyro_hollow.experiments.data import BINARIZATIONS, DATASETS, DataError, Images, load_images
from pyro_hollow.experiments.harness import not_negative, positive, positive_real
from pyro_hollow.experiments.vae_models import CONTINUOUS, FLOWS, NETWORKS, PATH_GRADIENT, VAE
from pyro_hollow.experiments.vae_training import (
    Config,
    Estimate,
    estimate,
    expected_seconds,
    fit,
    gradient_variance,
    make_vae,
)
from pyro_hollow.ode import SolverError

#: Colours that the colour-blind can tell apart. Those that are trained with the path gradient are dashed.
COLOURS = dict(
    zip(
        [name for name in FLOWS if name not in PATH_GRADIENT],
        "#000000 #56B4E9 #E69F00 #CC79A7 #999999 #D55E00 #009E73 "
        "#332288 #DDCC77 #AA4499 #44AA99 #882255 #0072B2 #F0E442".split(),
        strict=True,
    )
)


@dataclass
class Result:
    """Measurements of a run."""

    config: Config  #: its settings.
    parameters: int  #: the number of parameters.
    #: a row an epoch: epoch, loss, validation (-ELBO), kl_weight, seconds (of training, in all), nfe and nfe_backward
    #: (evaluations per solve, the mean).
    history: list[dict[str, float]]
    estimate: Estimate | None = None  #: the test, None before it.

    @property
    def seconds(self) -> float:
        """Seconds of training an epoch."""
        return self.history[-1]["seconds"] / len(self.history)


def train(
    configs: Sequence[Config], images: Images, output: Path, force: bool, settings: dict[str, Any], **options: Any
) -> dict[Config, str]:
    """
    Trains the runs that are not complete yet; a run that fails does not stop the others. Before each run it prints the
    time left for all of them, estimated at first from a few batches of each, later also from the runs that are done.

    :param configs: the settings of the runs.
    :param Images images: the data.
    :param ~pathlib.Path output: the folder of all runs.
    :param bool force: to begin anew what is there.
    :param settings: of the test that follows, for :func:`~pyro_hollow.experiments.vae_training.estimate`.
    :param options: for :class:`lightning.Trainer`.
    :returns: the runs that failed, with the errors' first lines.
    :raises DataError: if a folder holds a run with other settings.
    """
    # Looked up before the first one starts, as with several processes all of them have to do the same.
    pending = [config for config in configs if not _prepare(config, _folder(output, config), force)]
    device = torch.device("cuda" if options.get("accelerator") == "gpu" else "cpu")
    expected = [_expected(config, images, device, **settings) for config in pending]
    failures: dict[Config, str] = {}
    begin = time.perf_counter()
    for i, config in enumerate(pending):
        folder = _folder(output, config)
        left = sum(training for training, _ in expected[i:]) + sum(test for _, test in expected)
        if i:  # each run has as many steps, so as much time beside them
            late = time.perf_counter() - begin - sum(training for training, _ in expected[:i])
            left += max(0.0, late) / i * (len(pending) - i)
        label = f"{config.flow}, seed {config.seed} (run {i + 1} of {len(pending)})"
        print(f"{label}: {folder}; about {harness.duration(left)} left for training and test of all", file=sys.stderr)
        try:
            task = fit(config, images, folder, **options)
        except (SolverError, ValueError) as error:  # a ValueError is Pyro's, of parameters that are not finite
            failures[config] = str(error).partition("\n")[0]
            continue
        if task.global_rank == 0:
            parameters = sum(p.numel() for p in task.vae.parameters())
            software = {name: version(name) for name in ("pyro_hollow", "torch")}
            content = {**asdict(Result(config, parameters, task.history)), "software": software}
            harness.write(folder / "training.json", json.dumps(content, indent=1))
    return failures


def _expected(config: Config, images: Images, device: torch.device, **settings: Any) -> tuple[float, float]:
    """Seconds of training and test; none where the training will fail at once, and say why."""
    try:
        return expected_seconds(config, images, device, **settings)
    except (SolverError, ValueError):
        return 0.0, 0.0


def _folder(output: Path, config: Config) -> Path:
    return output / config.data / f"{config.flow}-{config.seed}"


def _prepare(config: Config, folder: Path, force: bool) -> bool:
    """Sees to it that nothing of other settings is mixed in or lost; tells whether there is nothing left to train."""
    kept = folder / "config.json"
    if force or not kept.exists():
        for name in ("last.ckpt", "best.ckpt", "training.json", "estimate.json"):
            (folder / name).unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        harness.write(kept, json.dumps(asdict(config), indent=1))
    _check(config, folder)
    return (folder / "training.json").exists()


def _check(config: Config, folder: Path) -> None:
    """Checks that the run in a folder has these settings."""
    settings = json.loads((folder / "config.json").read_text())
    if settings != asdict(config):
        names = [name for name, value in asdict(config).items() if settings.get(name) != value]
        raise DataError(
            f"{folder} holds a run with other settings ({', '.join(names)}): choose another --output, or lose it by "
            "--force"
        )


def load(config: Config, output: Path, images: Images) -> VAE:
    """Loads the model of a run's best epoch; raises a DataError if the folder's run has other settings."""
    folder = _folder(output, config)
    _check(config, folder)
    vae = make_vae(config, images.train.shape[1])
    state = torch.load(folder / "best.ckpt", map_location="cpu", weights_only=True)["state_dict"]
    vae.load_state_dict({name.removeprefix("vae."): value for name, value in state.items() if name.startswith("vae.")})
    return vae


def evaluate(config: Config, output: Path, images: Images, device: torch.device, **settings: Any) -> Result:
    """
    Tests the best epoch of a run and draws its figures, or reads an earlier test with the same settings. They are those
    of :func:`~pyro_hollow.experiments.vae_training.estimate`.
    """
    folder = _folder(output, config)
    training = json.loads((folder / "training.json").read_text())
    result = Result(config, training["parameters"], training["history"])
    kept = folder / "estimate.json"
    if kept.exists() and (content := json.loads(kept.read_text()))["settings"] == settings:
        result.estimate = Estimate(**content["estimate"])
        return result
    vae = load(config, output, images).to(device)
    result.estimate = estimate(vae, images.test.to(device), **settings)
    draw_images(vae, images, folder, device)
    harness.write(kept, json.dumps({"settings": settings, "estimate": asdict(result.estimate)}, indent=1))
    return result


def format_table(results: Sequence[Result]) -> str:
    """A Markdown table with a row per posterior, mean and standard deviation over seeds."""
    lines, mean = [], partial(harness.spread, deviation=False)
    for flow in dict.fromkeys(result.config.flow for result in results):
        rows = [result for result in results if result.config.flow == flow]
        tests = [result.estimate for result in rows if result.estimate is not None]
        nfe = [sum(r["nfe"] for r in result.history) / len(result.history) for result in rows]
        evaluations = f"{mean(nfe, 0)} / {mean([t.nfe for t in tests], 0)}" if any(nfe) else "-"
        epochs = sorted({len(result.history) for result in rows})
        trained = f"{epochs[0]} to {epochs[-1]}" if epochs[1:] else epochs[0]
        bounds = harness.spread([t.elbo for t in tests], 2), harness.spread([t.nll for t in tests], 2)
        seconds = mean([r.seconds for r in rows], 1)
        lines.append([flow, *bounds, len(rows), trained, seconds, evaluations, f"{rows[0].parameters:,}"])
    header = (
        "posterior | -ELBO | NLL | seeds | epochs | seconds an epoch | evaluations per solve, training / test | "
        "parameters"
    )
    return "\n".join(harness.table(header, lines))


def write_csv(results: Sequence[Result], path: Path) -> None:
    """Writes a row per run."""
    last = ("loss", "validation", "nfe", "nfe_backward")
    rows = [
        {
            **asdict(result.config),
            "parameters": result.parameters,
            "trained_epochs": len(result.history),
            "seconds_an_epoch": result.seconds,
            **{f"training_{name}": result.history[-1][name] for name in last},
            **(asdict(result.estimate) if result.estimate is not None else {}),
        }
        for result in results
    ]
    harness.write_csv(path, rows)


@torch.no_grad()
def draw_images(vae: VAE, images: Images, folder: Path, device: torch.device) -> None:
    """Writes reconstructions.png (above the original, below its reconstruction) and samples.png to a folder."""
    choice = torch.randperm(len(images.test), generator=torch.Generator().manual_seed(0))[:16]
    x = images.test[choice].to(device)
    pairs = torch.stack([x, vae.decode(vae.posterior(x).rsample())])
    samples = vae.decode(torch.randn(8 * 16, vae.latent_dim, device=device)).view(8, 16, -1)
    titles = {"reconstructions": f"{len(x)} test images and their reconstructions", "samples": "samples from the prior"}
    for (name, title), grid in zip(titles.items(), (pairs, samples), strict=True):
        height, width = images.shape
        tiles = nn.functional.pad(grid.view(*grid.shape[:2], height, width), (1, 1, 1, 1), value=0.5)
        picture = tiles.permute(0, 2, 1, 3).reshape(grid.shape[0] * (height + 2), -1).cpu().numpy()
        size = 9, 9 * picture.shape[0] / picture.shape[1] + 0.4
        with harness.figure(folder / f"{name}.png", 1, 1, size, dpi=120) as (_, ax):
            ax.imshow(picture, cmap="gray_r", vmin=0, vmax=1)
            ax.set_title(title)
            ax.set_axis_off()


def draw_training(results: Sequence[Result], path: Path) -> None:
    """
    Draws the validation -ELBO against epochs and against seconds, and, of continuous flows, the evaluations per solve
    against epochs; one line a run.
    """
    panels = [("epoch", "validation", "epoch"), ("seconds", "validation", "training time (s)")]
    if any(row["nfe"] for result in results for row in result.history):
        panels.append(("epoch", "nfe", "epoch"))
    with harness.figure(path, 1, len(panels), (4.3 * len(panels), 3.8), dpi=120) as (_, axes):
        for ax, (x, y, label) in zip(axes, panels, strict=True):
            for result in results:
                name, rows = result.config.flow, result.history
                if y == "nfe" and not any(row["nfe"] for row in rows):
                    continue
                known = name in ax.get_legend_handles_labels()[1]
                line = {"color": COLOURS[name.removesuffix("-path")], "ls": "--" if name in PATH_GRADIENT else "-"}
                ax.plot([r[x] for r in rows], [r[y] for r in rows], **line, label=None if known else name)
            ax.set_xlabel(label)
            ax.set_ylabel("evaluations per solve" if y == "nfe" else "validation -ELBO (nats per image)")
            ax.grid(alpha=0.3)
        # The first epochs would squeeze the differences together.
        settled = [row["validation"] for result in results for row in result.history[len(result.history) // 4 :]]
        low, high = min(settled), max(settled)
        for ax in axes[:2]:
            ax.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low) + 1e-6)
        axes[0].legend(title="posterior", fontsize="small")


def gradients(configs: Sequence[Config], output: Path, images: Images, device: torch.device) -> str:
    """A Markdown table of the variance of gradients before and after the training, with a row per run."""
    x = images.test[torch.randperm(len(images.test), generator=torch.Generator().manual_seed(0))[:128]].to(device)
    rows = []
    for config in configs:
        models = [make_vae(config, x.shape[1]), load(config, output, images)]
        variances = [f"{value:.3g}" for vae in models for value in gradient_variance(vae.to(device), x)]
        rows.append([config.flow, config.seed, *variances])
    header = "posterior | seed | before training: new samples | same sample | after it: new samples | same sample"
    return "\n".join(harness.table(header, rows))


#: What a data set's size asks for, where nothing else is said.
_DEFAULTS = {
    "digits": {"epochs": 100, "latent_dim": 16, "hidden_dim": 128, "batch_size": 64, "lr": 1.6e-2},
    "mnist": {"epochs": 10, "latent_dim": 64, "hidden_dim": 512, "batch_size": 32, "lr": 4e-3},
    "omniglot": {"epochs": 20, "latent_dim": 64, "hidden_dim": 512, "batch_size": 32, "lr": 4e-3},
}


def make_parser() -> harness.Parser:
    """The command line."""
    parser = harness.Parser(__file__, __doc__, paragraphs=2, needs=("matplotlib", "tensorboard", "yaml"), threads=None)
    add, flows, schedules = parser.add_argument, tuple(FLOWS), ("cosine", "constant")
    tolerance = "rtol and atol of training solves by dopri5 (default: 1e-3)"
    patience = "epochs after the warm-up without a better validation -ELBO that end it (default: never)"
    add("command", choices=("table", "gradients"), help="what to do")
    add("--flow", nargs="+", choices=flows, default=list(flows[:7]), help="posteriors (default: the first seven)")
    add("--data", choices=DATASETS, default="digits", help="data set (default: digits)")
    add("--data-dir", type=Path, help="folder with the files of mnist or omniglot (default: download)")
    add("--binarization", choices=BINARIZATIONS, default="static", help="of mnist (default: static)")
    add("--network", choices=NETWORKS, default="mlp", help="encoder and decoder (default: mlp)")
    add("--seed", nargs="+", type=not_negative, default=[0], help="seeds (default: 0)")
    add("--epochs", type=positive, help="at most (default: 100 for digits, 10 for mnist, 20 for omniglot)")
    add("--warmup", type=not_negative, help="epochs in which the KL weight rises to 1 (default: four fifths of all)")
    add("--patience", type=not_negative, default=0, help=patience)
    add("--latent-dim", type=positive, help="dimension of the latent variable (default: 16 for digits, otherwise 64)")
    add("--hidden-dim", type=positive, help="width of the networks (default: 128 for digits, 512; 256 for conv)")
    add("--batch-size", type=positive, help="images a batch, over all devices (default: 64 for digits, otherwise 32)")
    add("--lr", type=positive_real, help="learning rate of Adamax (default: 1.6e-2 for digits, otherwise 4e-3)")
    add("--schedule", choices=schedules, default="cosine", help="of the learning rate (default: cosine)")
    add("--tolerance", type=positive_real, default=1e-3, help=tolerance)
    add("--adjoint", action="store_true", help="gradients of continuous flows by the adjoint method")
    add("--num-samples", type=positive, default=100, metavar="K", help="importance samples an image (default: 100)")
    add("--nll-images", type=not_negative, help="test images for the likelihood, 0 for none (default: all)")
    parser.add_kept("results/vae")
    add("--accelerator", choices=("cpu", "gpu"), default="cpu", help="of Lightning's Trainer (default: cpu)")
    add("--devices", type=positive, default=1, help="their number (default: 1)")
    add("--num-nodes", type=positive, default=1, help="machines (default: 1)")
    add("--strategy", default="auto", help="of Lightning's Trainer, such as ddp (default: auto)")
    add("--config", type=Path, help="YAML file with options")
    return parser


def parse(parser: harness.Parser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line (None for that of the process), and before it the YAML file that it names."""
    args = parser.begin(argv)
    if args.config is None:
        return args
    import yaml

    try:
        options = yaml.safe_load(args.config.read_text()) or {}
        if not isinstance(options, dict):
            raise ValueError("it must hold names of options with their values")
    except (OSError, ValueError, yaml.YAMLError) as error:
        parser.error(f"--config {args.config} cannot be read: {error}")
    words = []
    for name, value in options.items():
        values = value if isinstance(value, list) else [value]
        if value is not False and value is not None:
            words += [f"--{str(name).replace('_', '-')}", *(str(v) for v in values if v is not True)]
    return parser.parse_args(argv, parser.parse_args([args.command, *words]))


def make_config(args: argparse.Namespace, source: str, flow: str, seed: int) -> Config:
    """The settings of one run, on images from this source."""
    given: dict[str, Any] = {key: value for key, value in vars(args).items() if value is not None}
    defaults = dict(_DEFAULTS[args.data])
    if args.network == "conv":
        defaults["hidden_dim"] = 256
    settings = {**defaults, **given, "source": source, "flow": flow, "seed": seed}
    # At full weight too early, the KL divergence keeps the decoder from learning to use the latent variables.
    settings.setdefault("warmup", max(1, settings["epochs"] * 4 // 5))
    return Config(**{field.name: settings[field.name] for field in fields(Config)})


def main(argv: Sequence[str] | None = None) -> list[Result]:
    """Runs the experiment; see ``--help``."""
    from lightning.pytorch.utilities import rank_zero_only

    parser = make_parser()
    args = parse(parser, argv)
    device = torch.device("cuda" if args.accelerator == "gpu" else "cpu")
    if args.network == "conv" and args.data == "digits":
        parser.error("--network conv is for images of 28 x 28 pixels: take --data mnist or omniglot")
    if args.command == "gradients" and (others := set(args.flow) - set(CONTINUOUS)):
        parser.error(f"--flow must name continuous flows, {', '.join(CONTINUOUS)}, but got {', '.join(sorted(others))}")
    folder = args.output / args.data
    try:
        images = load_images(args.data, args.data_dir, args.binarization)
        configs = [make_config(args, images.source, flow, seed) for seed in args.seed for flow in args.flow]
        if args.command == "gradients":
            print(gradients(configs, args.output, images, device))
            return []
        options = {name: getattr(args, name) for name in ("accelerator", "devices", "num_nodes", "strategy")}
        settings = {"num_samples": args.num_samples, "nll_images": args.nll_images}
        failures = train(configs, images, args.output, args.force, settings, **options)
        if getattr(rank_zero_only, "rank", 0) != 0:
            return []  # one process is enough for the test
        for config, failure in failures.items():
            print(f"{config.flow}, seed {config.seed} failed: {failure}", file=sys.stderr)
        complete = [config for config in configs if config not in failures]
        if not complete:
            parser.exit(1, "no run is complete\n")
        results = [evaluate(config, args.output, images, device, **settings) for config in complete]
    except (DataError, OSError) as error:
        parser.error(str(error))
    table = format_table(results)
    harness.write(folder / "table.md", f"{table}\n")
    write_csv(results, folder / "table.csv")
    draw_training(results, folder / "training.png")
    uncertainty = max(result.estimate.elbo_error for result in results if result.estimate is not None)
    print(f"{images.source}; test images, nats per image (lower is better), K = {args.num_samples}:\n\n{table}\n")
    print(f"The standard error of a -ELBO over the images is up to {uncertainty:.2f}.")
    print(f"Models, tables and figures are in {folder}.", file=sys.stderr)
    return results


if __name__ == "__main__":
    main()
