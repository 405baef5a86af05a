# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""
A variational autoencoder whose posterior is a normalizing flow chosen by name.

Model and guide are Pyro programs, trained through Pyro's ELBO; every flow is amortised, that is, the encoder gives it
the parameters of its base distribution and a context. Prints a table of the test -ELBO and the negative log-likelihood,
saves the models, and draws reconstructions, samples from the prior, and the training curves.

    python -m pyro_hollow.experiments.vae --flow none hollow --data digits
    python -m pyro_hollow.experiments.vae --flow hollow --data mnist --data-dir FOLDER
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as T
import torch
from pyro import poutine
from pyro.distributions.conditional import ConditionalComposeTransformModule
from pyro.infer import Trace_ELBO
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyro_hollow.experiments.arguments import positive
from pyro_hollow.experiments.data import DATASETS, DataError, Images, load_images
from pyro_hollow.experiments.figures import pyplot
from pyro_hollow.ode import Solver
from pyro_hollow.transforms import ConditionalHollowCNF, conditional_hollow_cnf

FLOWS = ("none", "planar", "iaf", "hollow")

#: Training integrates by a few steps of fixed size; a test -ELBO is only reported for a solve that has converged.
TRAIN_SOLVER = Solver("rk4", options={"step_size": 1 / 3})
TEST_SOLVER = Solver("dopri5", rtol=1e-5, atol=1e-5)


@dataclass(frozen=True)
class Config:
    """All that decides the result of a run."""

    flow: str
    data: str
    seed: int
    epochs: int
    warmup: int
    latent_dim: int
    hidden_dim: int
    batch_size: int
    lr: float
    num_samples: int


@dataclass
class Result:
    """What a run measured, in nats per image where not said otherwise."""

    config: Config
    parameters: int
    elbo: float
    nll: float
    seconds: float
    nfe_train: int
    nfe_test: int
    history: list[dict[str, float]] = field(default_factory=list)


def make_flow(name: str, latent_dim: int, context_dim: int) -> nn.Module | None:
    """
    The flow of a posterior.

    :param str name: "none" for a diagonal Gaussian; "planar", 16 layers; "iaf", 4 affine autoregressive layers of 320
        hidden units, as in Pyro; "hollow", one Hollow-CNF.
    :param int latent_dim: Dimension of the latent variable
    :param int context_dim: Dimension of the context
    :raises ValueError: for any other name.
    """
    sizes = (latent_dim, context_dim)
    if name == "none":
        return None
    if name == "planar":
        return ConditionalComposeTransformModule([T.conditional_planar(*sizes, [64]) for _ in range(16)], cache_size=1)
    if name == "iaf":
        layers = [T.conditional_affine_autoregressive(*sizes, [320], stable=True) for _ in range(4)]
        return ConditionalComposeTransformModule(layers, cache_size=1)
    if name == "hollow":
        return conditional_hollow_cnf(*sizes, solver=TRAIN_SOLVER)
    raise ValueError(f"flow must be one of {FLOWS}, but got {name!r}")


class VAE(nn.Module):
    """
    A variational autoencoder of dense networks for binary images.

    :param int pixels: Number of pixels of an image
    :param int latent_dim: Dimension of the latent variable
    :param int hidden_dim: Width of the two hidden layers of encoder and decoder, and so of the flow's context
    :param str flow: Name of the posterior's flow; see :func:`make_flow`
    """

    def __init__(self, pixels: int, latent_dim: int, hidden_dim: int, flow: str) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.encoder = nn.Sequential(
            nn.Linear(pixels, hidden_dim), nn.SiLU(), nn.Linear(hidden_dim, hidden_dim), nn.SiLU()
        )
        self.to_base = nn.Linear(hidden_dim, 2 * latent_dim)
        self.flow = make_flow(flow, latent_dim, hidden_dim)
        self.decoder = nn.Sequential(
            nn.Linear(latent_dim, hidden_dim), nn.SiLU(), nn.Linear(hidden_dim, hidden_dim), nn.SiLU(),
            nn.Linear(hidden_dim, pixels),
        )  # fmt: skip

    def model(self, x: Tensor, kl_weight: float = 1.0) -> None:
        """
        :param Tensor x: binary images with shape ``(n, pixels)``.
        :param float kl_weight: weight of the latent variable's density, for warm-up.
        """
        pyro.module("vae", self)
        with pyro.plate("data", len(x), dim=-1):
            with poutine.scale(scale=kl_weight):
                z = pyro.sample("z", dist.Normal(x.new_zeros(self.latent_dim), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z), validate_args=False).to_event(1), obs=x)

    def guide(self, x: Tensor, kl_weight: float = 1.0) -> None:
        """As :meth:`model`."""
        pyro.module("vae", self)
        with pyro.plate("data", len(x), dim=-1), poutine.scale(scale=kl_weight):
            pyro.sample("z", self.posterior(x))

    def posterior(self, x: Tensor) -> dist.TorchDistribution:
        """The approximate posterior of the latent variables of images with shape ``(n, pixels)``."""
        hidden = self.encoder(x)
        loc, raw_scale = self.to_base(hidden).chunk(2, dim=-1)
        base = dist.Normal(loc, nn.functional.softplus(raw_scale) + 1e-5).to_event(1)
        if self.flow is None:
            return base
        return dist.TransformedDistribution(base, [self.flow.condition(hidden)])  # type: ignore[operator]

    def decode(self, z: Tensor) -> Tensor:
        """The probabilities of ink, with shape ``(*, pixels)``, for latent variables with shape ``(*, latent_dim)``."""
        return torch.sigmoid(self.decoder(z))

    def log_weights(self, x: Tensor, num_samples: int) -> Tensor:
        """
        :math:`\\log p(x, z) - \\log q(z | x)` for z drawn from the posterior.

        :param Tensor x: binary images with shape ``(n, pixels)``.
        :param int num_samples: samples an image.
        :returns: a tensor of shape ``(num_samples, n)``.
        """
        particles = pyro.plate("particles", num_samples, dim=-2)
        guide_trace = poutine.trace(particles(self.guide)).get_trace(x)
        model_trace = poutine.trace(poutine.replay(particles(self.model), trace=guide_trace)).get_trace(x)
        model_trace.compute_log_prob()
        guide_trace.compute_log_prob()
        log_p = model_trace.nodes["z"]["log_prob"] + model_trace.nodes["x"]["log_prob"]
        return (log_p - guide_trace.nodes["z"]["log_prob"]).expand(num_samples, len(x))


def train(vae: VAE, images: Tensor, config: Config, history: list[dict[str, float]]) -> None:
    """
    Trains by Adamax on freshly binarised images, with KL warm-up and a learning rate that falls to zero along a cosine.

    :param VAE vae: the model, trained in place.
    :param Tensor images: training images with shape ``(n, pixels)`` and values in [0, 1].
    :param Config config: the settings.
    :param history: receives a row an epoch.
    """
    optimizer = torch.optim.Adamax(vae.parameters(), lr=config.lr, eps=1e-7)
    batches = math.ceil(len(images) / config.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs * batches)
    elbo = Trace_ELBO()
    begin = time.perf_counter()
    with tqdm(total=config.epochs * batches, desc=f"{config.flow} (seed {config.seed})", unit="batch") as progress:
        for epoch in range(1, config.epochs + 1):
            total = 0.0
            order = torch.randperm(len(images), device=images.device)
            for i, index in enumerate(order.split(config.batch_size)):
                kl_weight = min(1.0, (epoch - 1 + (i + 1) / batches) / config.warmup) if config.warmup else 1.0
                loss = elbo.differentiable_loss(vae.model, vae.guide, torch.bernoulli(images[index]), kl_weight)
                optimizer.zero_grad()
                (loss / len(index)).backward()
                nn.utils.clip_grad_norm_(vae.parameters(), 100.0)
                optimizer.step()
                schedule.step()
                total += loss.item()
                progress.update()
            seconds = time.perf_counter() - begin
            history.append({"epoch": epoch, "loss": total / len(images), "kl_weight": kl_weight, "seconds": seconds})
            progress.set_postfix(epoch=epoch, loss=f"{total / len(images):.2f}")


@torch.no_grad()
def evaluate(vae: VAE, images: Tensor, num_samples: int, *, chunk: int = 5000) -> tuple[float, float]:
    """
    The -ELBO and, by importance sampling, the negative log-likelihood, in nats per image.

    :param VAE vae: the model.
    :param Tensor images: binary images with shape ``(n, pixels)``.
    :param int num_samples: the number K of samples an image.
    :param int chunk: samples that are in memory at a time.
    """
    elbo = likelihood = 0.0
    per_pass = min(num_samples, max(1, chunk // 50))
    for x in tqdm(images.split(max(1, chunk // per_pass)), desc="test", unit="batch", leave=False):
        counts = [per_pass] * (num_samples // per_pass) + [num_samples % per_pass] * (num_samples % per_pass > 0)
        log_w = torch.cat([vae.log_weights(x, count) for count in counts])
        elbo += log_w.mean(0).sum().item()
        likelihood += (log_w.logsumexp(0) - math.log(num_samples)).sum().item()
    return -elbo / len(images), -likelihood / len(images)


def run(config: Config, images: Images, folder: Path, device: torch.device) -> tuple[VAE, Result]:
    """
    Trains and evaluates one model.

    :param Config config: the settings.
    :param Images images: the data.
    :param ~pathlib.Path folder: receives model.pt, history.csv, the figures and, last, result.json.
    :param ~torch.device device: where to compute.
    """
    pyro.clear_param_store()
    pyro.set_rng_seed(config.seed)
    vae = VAE(images.train.shape[1], config.latent_dim, config.hidden_dim, config.flow).to(device)
    result = Result(config, sum(p.numel() for p in vae.parameters()), math.nan, math.nan, math.nan, 0, 0)
    train(vae, images.train.to(device), config, result.history)
    torch.save(vae.state_dict(), folder / "model.pt")  # before anything can go wrong
    _save_history(result, folder / "history.csv")
    result.seconds = result.history[-1]["seconds"]
    result.nfe_train = _evaluations(vae)
    if isinstance(vae.flow, ConditionalHollowCNF):
        vae.flow.solver = TEST_SOLVER
    result.elbo, result.nll = evaluate(vae, binarized_test(images).to(device), config.num_samples)
    result.nfe_test = _evaluations(vae)
    draw_images(vae, images, folder, device)
    draw_training([result], folder / "training.png")
    # Last, as its presence says that the run is complete.
    (folder / "result.json").write_text(json.dumps(asdict(result), indent=1))
    return vae, result


def _evaluations(vae: VAE) -> int:
    stats = vae.flow.last_solve if isinstance(vae.flow, ConditionalHollowCNF) else None
    return stats.nfe if stats else 0


def binarized_test(images: Images) -> Tensor:
    """The test images, binarised once and for all by a generator of fixed seed."""
    return torch.bernoulli(images.test, generator=torch.Generator().manual_seed(777))


def format_table(results: Sequence[Result]) -> str:
    """A Markdown table with a row per flow, mean and standard deviation over seeds."""
    lines = [
        f"| posterior | -ELBO | NLL (K = {results[0].config.num_samples}) | seeds | epochs | seconds | "
        "evaluations per solve, train / test | parameters |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for flow in dict.fromkeys(result.config.flow for result in results):
        rows = [result for result in results if result.config.flow == flow]
        first = rows[0]
        evaluations = f"{first.nfe_train} / {first.nfe_test}" if first.nfe_test else "-"
        lines.append(
            f"| {flow} | {_mean([r.elbo for r in rows])} | {_mean([r.nll for r in rows])} | {len(rows)} | "
            f"{first.config.epochs} | {sum(r.seconds for r in rows) / len(rows):.0f} | {evaluations} | "
            f"{first.parameters:,} |"
        )
    return "\n".join(lines)


def _mean(values: list[float]) -> str:
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.2f}"
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return f"{mean:.2f} ± {deviation:.2f}"


@torch.no_grad()
def draw_images(vae: VAE, images: Images, folder: Path, device: torch.device) -> None:
    """Writes reconstructions.png (above the original, below its reconstruction) and samples.png to a folder."""
    plt = pyplot()
    x = binarized_test(images)[:16].to(device)
    pairs = torch.stack([x, vae.decode(vae.posterior(x).rsample())])
    samples = vae.decode(torch.randn(8 * 16, vae.latent_dim, device=device)).view(8, 16, -1)
    titles = {"reconstructions": f"{len(x)} test images and their reconstructions", "samples": "samples from the prior"}
    for (name, title), grid in zip(titles.items(), (pairs, samples), strict=True):
        height, width = images.shape
        tiles = nn.functional.pad(grid.view(*grid.shape[:2], height, width), (1, 1, 1, 1), value=0.5)
        picture = tiles.permute(0, 2, 1, 3).reshape(grid.shape[0] * (height + 2), -1).cpu().numpy()
        fig, ax = plt.subplots(figsize=(9, 9 * picture.shape[0] / picture.shape[1] + 0.4), layout="constrained")
        ax.imshow(picture, cmap="gray_r", vmin=0, vmax=1)
        ax.set_title(title)
        ax.set_axis_off()
        fig.savefig(folder / f"{name}.png", dpi=120)
        plt.close(fig)


def draw_training(results: Sequence[Result], path: Path) -> None:
    """Draws the training loss of several runs against the epoch and against seconds."""
    plt = pyplot()
    colours = dict(zip(FLOWS, ("#000000", "#56B4E9", "#D55E00", "#009E73"), strict=True))
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
    for ax, key, label in zip(axes, ("epoch", "seconds"), ("epoch", "training time (s)"), strict=True):
        for result in results:
            rows = [row for row in result.history if row["kl_weight"] >= 1] or result.history
            name = result.config.flow
            again = name in ax.get_legend_handles_labels()[1]
            ax.plot(
                [r[key] for r in rows], [r["loss"] for r in rows], color=colours[name], label=None if again else name
            )
        ax.set_xlabel(label)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("training -ELBO (nats per image)")
    axes[0].legend(title="posterior")
    fig.savefig(path, dpi=120)
    plt.close(fig)


def _save_history(result: Result, path: Path) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(result.history[0]))
        writer.writeheader()
        writer.writerows(result.history)


def _finished(folder: Path, config: Config) -> Result | None:
    """The result of an earlier run with the same settings, if there is one."""
    try:
        stored = json.loads((folder / "result.json").read_text())
        result = Result(**{**stored, "config": Config(**stored["config"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return result if result.config == config else None


def _at_least_0(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, but got {value}")
    return value


def _rate(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be positive and finite, but got {value}")
    return value


def _device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise argparse.ArgumentTypeError(f"{name!r} cannot be used: {error}") from error


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m pyro_hollow.experiments.vae", description=(__doc__ or "").split("\n\n")[0]
    )
    add = parser.add_argument
    add("--flow", nargs="+", choices=FLOWS, default=["hollow"], help="posteriors to train (default: hollow)")
    add("--data", choices=DATASETS, default="digits", help="data set (default: digits, which needs no download)")
    add("--data-dir", type=Path, help="folder with the four IDX files of MNIST; without it they are downloaded")
    add("--seed", nargs="+", type=_at_least_0, default=[0], help="seeds (default: 0)")
    add("--epochs", type=positive, help="epochs (default: 100 for digits, 20 for mnist)")
    add(
        "--warmup",
        type=_at_least_0,
        help="epochs over which the KL weight rises to 1 (default: a quarter of the epochs)",
    )
    add("--latent-dim", type=positive, help="dimension of the latent variable (default: 16 for digits, 64 for mnist)")
    add("--hidden-dim", type=positive, help="width of encoder and decoder (default: 128 for digits, 512 for mnist)")
    add("--batch-size", type=positive, help="images a batch (default: 64 for digits, 128 for mnist)")
    add("--lr", type=_rate, default=2e-3, help="learning rate of Adamax (default: 2e-3)")
    add("--num-samples", type=positive, default=100, metavar="K", help="importance samples an image (default: 100)")
    add("--output", type=Path, default=Path("results/vae"), help="folder for models and figures (default: results/vae)")
    add("--force", action="store_true", help="train anew where the output folder has the result of the same settings")
    add("--device", type=_device, default="cpu", help="cpu, cuda, ... (default: cpu)")
    return parser


_DEFAULTS = {
    "digits": {"epochs": 100, "latent_dim": 16, "hidden_dim": 128, "batch_size": 64},
    "mnist": {"epochs": 20, "latent_dim": 64, "hidden_dim": 512, "batch_size": 128},
}


def _config(args: argparse.Namespace, flow: str, seed: int) -> Config:
    given: dict[str, Any] = {key: value for key, value in vars(args).items() if value is not None}
    settings = {**_DEFAULTS[args.data], **given, "flow": flow, "seed": seed}
    settings.setdefault("warmup", max(1, settings["epochs"] // 4))
    return Config(**{name: settings[name] for name in Config.__dataclass_fields__})


def main(argv: Sequence[str] | None = None) -> list[Result]:
    """Runs the experiment; see ``--help``."""
    parser = make_parser()
    args = parser.parse_args(argv)
    results = []
    try:
        images = load_images(args.data, args.data_dir)
        for seed in args.seed:
            for flow in args.flow:
                config = _config(args, flow, seed)
                folder = args.output / args.data / f"{flow}-{seed}"
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "history.csv").touch()  # fails now rather than after the training
                result = None if args.force else _finished(folder, config)
                if result is None:
                    _, result = run(config, images, folder, args.device)
                else:
                    print(f"{folder} is complete: its result is used again (--force trains anew)", file=sys.stderr)
                results.append(result)
    except (DataError, OSError) as error:
        parser.error(str(error))
    draw_training(results, args.output / args.data / "training.png")
    print(f"{args.data}, test images, nats per image (lower is better):\n\n{format_table(results)}\n")
    print(f"Models and figures are in {args.output / args.data}.", file=sys.stderr)
    return results


if __name__ == "__main__":
    main()
