# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Training of a variational autoencoder by Lightning, and its evaluation by importance sampling."""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler, TensorDataset

from pyro_hollow.experiments.data import Images
from pyro_hollow.experiments.harness import Progress, extra, write_csv
from pyro_hollow.experiments.vae_models import PATH_GRADIENT, VAE, exact, make_flow, make_inner
from pyro_hollow.ode import Solver, SolverStats
from pyro_hollow.transforms import ConditionalCNF

with extra():
    import lightning as L
    from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
    from lightning.pytorch.loggers import TensorBoardLogger


@dataclass(frozen=True)
class Config:
    """All that decides what a training run results in."""

    flow: str
    data: str
    source: str  #: what exactly the images are, in words, lest runs on a stand-in be mixed with those on the original.
    binarization: str
    network: str
    seed: int
    epochs: int
    warmup: int  #: epochs over which the weight of the KL divergence rises to 1.
    patience: int  #: epochs without a better validation -ELBO, after the warm-up, that end the training; 0 never to.
    latent_dim: int
    hidden_dim: int
    batch_size: int
    lr: float
    schedule: str  #: of the learning rate: "cosine", from ``lr`` to 0, or "constant".
    tolerance: float  #: rtol and atol of the continuous flows' solver, dopri5.
    adjoint: bool  #: whether their gradients come by the adjoint method.


def make_vae(config: Config, pixels: int) -> VAE:
    """The model of images with that number of pixels before training; its parameters are drawn by the seed."""
    torch.manual_seed(config.seed)
    solver = Solver("dopri5", rtol=config.tolerance, atol=config.tolerance, adjoint=config.adjoint)
    sizes = (config.latent_dim, config.hidden_dim)
    flow, inner = make_flow(config.flow, *sizes, solver), make_inner(config.flow, *sizes, solver)
    return VAE(pixels, *sizes, flow, config.network, config.flow in PATH_GRADIENT, inner)


class BatchSampler(Sampler[Tensor]):
    """
    Indices of the batches of an epoch, in an order that the seed and the epoch decide. Of ``world_size`` processes each
    takes every ``world_size``-th image of a batch, so that together they see the batches that one process would.

    :param int size: images in all
    :param int batch_size: images a batch, over all processes; those left over at the end of an epoch are a smaller one
    :param seed: for shuffling; None to keep the order
    :param int rank: number of the process
    :param int world_size: number of processes
    :raises ValueError: if a batch has fewer images than there are processes.
    """

    def __init__(
        self, size: int, batch_size: int, seed: int | None = None, *, rank: int = 0, world_size: int = 1
    ) -> None:
        if batch_size < world_size:
            raise ValueError(f"batch_size must be at least the number of processes, {world_size}, but got {batch_size}")
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        # Where the last batch has an image for some processes only, none of them takes it: they have to step together.
        return math.ceil(self.size / self.batch_size) - (0 < self.size % self.batch_size < self.world_size)

    def __iter__(self) -> Iterator[Tensor]:
        if self.seed is None:
            order = torch.arange(self.size)
        else:
            order = torch.from_numpy(np.random.default_rng([self.seed, self.epoch]).permutation(self.size))
        for batch in order.split(self.batch_size)[: len(self)]:
            yield batch[self.rank :: self.world_size]


class Task(L.LightningModule):
    """
    Lightning module: Pyro's ELBO of a VAE, by Adamax, with KL warm-up.

    Every epoch begins with random numbers that its number and the seed decide; so a run that is resumed takes the
    same course as one that was never stopped.

    :param VAE vae: the model.
    :param Images images: the data.
    :param Config config: the settings.
    """

    def __init__(self, vae: VAE, images: Images, config: Config) -> None:
        super().__init__()
        self.vae = vae
        self.elbo = Trace_ELBO()(vae.model, vae.guide)
        self.images = images
        self.config = config
        self.history: list[dict[str, float]] = []
        self._total = torch.zeros(())
        self._seconds = 0.0
        self._solves: list[list[SolverStats]] = []

    def configure_optimizers(self) -> Any:
        """Adamax, and a schedule that is stepped with each batch."""
        optimizer = torch.optim.Adamax(self.vae.parameters(), lr=self.config.lr, eps=1e-7)
        if self.config.schedule == "constant":
            return optimizer
        steps = self.config.epochs * len(self._sampler(len(self.images.train)))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _sampler(self, size: int, seed: int | None = None) -> BatchSampler:
        trainer = self._trainer
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
        return BatchSampler(size, self.config.batch_size, seed, rank=rank, world_size=world_size)

    def _loader(self, images: Tensor, seed: int | None) -> DataLoader:
        # A generator of its own: making an iterator draws from it, at another moment in a run that is resumed.
        own = torch.Generator()
        return DataLoader(
            TensorDataset(images), sampler=self._sampler(len(images), seed), batch_size=None, generator=own
        )

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches."""
        return self._loader(self.images.train, self.config.seed)

    def val_dataloader(self) -> DataLoader:
        """Batches in order."""
        return self._loader(self.images.validation, None)

    def _seed(self, *numbers: int) -> None:
        sequence = np.random.SeedSequence([self.config.seed, *numbers, self.global_rank])
        torch.manual_seed(int(sequence.generate_state(1)[0]))

    @property
    def kl_weight(self) -> float:
        """The weight of the KL divergence at this step."""
        steps = self.config.warmup * self.trainer.num_training_batches
        return min(1.0, (self.global_step + 1) / steps) if steps else 1.0

    def on_train_epoch_start(self) -> None:
        """Begins an epoch."""
        self._seed(0, self.current_epoch)
        self._total, self._solves = torch.zeros((), device=self.device), []
        self._begin = time.perf_counter()

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        """The -ELBO of a batch, binarised anew."""
        x = torch.bernoulli(batch[0])
        # Of the whole batch, as losses are averaged over processes whether or not they have as many images.
        size = min(self.config.batch_size, len(self.images.train) - batch_idx * self.config.batch_size)
        loss = self.elbo(x, self.kl_weight) * self.trainer.world_size / size
        self._total += loss.detach()
        self._solves.append(_last_solves(self.vae))  # whose backward evaluations are yet to come
        return loss

    def on_validation_epoch_start(self) -> None:
        """Ends what counts as training time; the same random numbers judge every epoch."""
        self._seconds = time.perf_counter() - self._begin
        self._seed(1)
        self._validation = torch.zeros(2, device=self.device)

    def validation_step(self, batch: tuple[Tensor]) -> None:
        """Adds the -ELBO of a batch."""
        x = batch[0]
        self._validation += torch.tensor([float(self.elbo(x)), len(x)], device=self.device)

    def on_validation_epoch_end(self) -> None:
        """The -ELBO of all images: Lightning's own mean over processes rounds their number."""
        total, count = torch.as_tensor(self.all_gather(self._validation)).view(-1, 2).sum(0)
        self.log("validation", total / count, sync_dist=True)

    def on_train_epoch_end(self) -> None:
        """Keeps what the epoch measured."""
        before = self.history[-1]["seconds"] if self.history else 0.0
        batches = self.trainer.num_training_batches
        row = {
            "epoch": float(self.current_epoch + 1),
            "loss": float(torch.as_tensor(self.all_gather(self._total)).mean()) / batches,
            "validation": float(self.trainer.callback_metrics["validation"]),
            "kl_weight": self.kl_weight,
            "seconds": before + self._seconds,
            "nfe": _mean([sum(solve.nfe for solve in solves) for solves in self._solves]),
            "nfe_backward": _mean([sum(solve.nfe_backward for solve in solves) for solves in self._solves]),
        }
        self.history.append(row)
        self.log_dict({name: row[name] for name in ("loss", "kl_weight", "seconds", "nfe", "nfe_backward")})
        if self.trainer.is_global_zero:
            write_csv(Path(self.trainer.default_root_dir) / "history.csv", self.history)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the history."""
        checkpoint["history"] = list(self.history)
        checkpoint["config"] = asdict(self.config)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes up the history."""
        self.history = list(checkpoint["history"])


def _mean(values: list[int]) -> float:
    return sum(values) / len(values) if values else 0.0


def _last_solves(vae: VAE) -> list[SolverStats]:
    """Latest solves of the flows that are differential equations."""
    flows = [flow for flow in (*vae.inner, vae.flow) if isinstance(flow, ConditionalCNF)]
    return [flow.last_solve for flow in flows if flow.last_solve is not None]


class _Patience(EarlyStopping):
    """Early stopping that waits until the warm-up is over."""

    def __init__(self, start: int, patience: int) -> None:
        super().__init__("validation", patience=patience)
        self._start = start

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Lightning does not keep that a run that is resumed has been stopped.
        if self.wait_count >= self.patience:
            trainer.should_stop = True

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch >= self._start:
            super().on_train_epoch_end(trainer, pl_module)


class _Bar(L.Callback):
    """A progress bar over all epochs, so that it shows the time that is left."""

    def __init__(self, label: str) -> None:
        self._label = label

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._bar = Progress(
            desc=self._label, total=trainer.estimated_stepping_batches, initial=trainer.global_step,
            disable=not trainer.is_global_zero,
        )  # fmt: skip

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._bar.update()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._bar.close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if hasattr(self, "_bar"):
            self._bar.close()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's notes on hardware and on numbers of workers."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        for message in (".*does not have many workers.*", ".*Checkpoint directory.*", ".*isinstance.treespec.*"):
            warnings.filterwarnings("ignore", message)
        try:
            for logger in loggers:
                logger.setLevel(logging.WARNING)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def fit(config: Config, images: Images, folder: Path, **options: Any) -> Task:
    """
    Trains a model; or goes on where an earlier call was stopped, from the end of its last complete epoch, to the same
    result. Writes best.ckpt, by the validation -ELBO, last.ckpt, history.csv and logs for TensorBoard.

    :param Config config: the settings.
    :param Images images: the data.
    :param ~pathlib.Path folder: for what is written.
    :param options: for :class:`lightning.Trainer`: accelerator, devices, num_nodes, strategy, precision, ...;
        ``enable_progress_bar`` is about one bar for the whole training.
    :returns: the task, with the trained model as it is at the end.
    """
    task = Task(make_vae(config, images.train.shape[1]), images, config)
    folder.mkdir(parents=True, exist_ok=True)
    callbacks: list[L.Callback] = [
        ModelCheckpoint(
            folder, "best", monitor="validation", save_on_train_epoch_end=True, enable_version_counter=False,
        ),
        ModelCheckpoint(folder, "last", save_on_train_epoch_end=True, enable_version_counter=False),
    ]  # fmt: skip
    if config.patience:
        callbacks.append(_Patience(config.warmup, config.patience))
    if options.pop("enable_progress_bar", True):
        callbacks.append(_Bar(f"{config.flow}, seed {config.seed}"))
    last = folder / "last.ckpt"
    with _quiet():
        trainer = L.Trainer(
            max_epochs=config.epochs, callbacks=callbacks, gradient_clip_val=100.0, num_sanity_val_steps=0,
            logger=TensorBoardLogger(folder, name="", version="logs"), enable_model_summary=False,
            use_distributed_sampler=False, log_every_n_steps=1, default_root_dir=folder, enable_progress_bar=False,
            **options,
        )  # fmt: skip
        trainer.fit(task, ckpt_path=last if last.exists() else None)
    return task


@dataclass(frozen=True)
class Estimate:
    """Bounds of a model on test images, in nats per image; the standard errors are those over the images."""

    elbo: float  #: -ELBO.
    elbo_error: float
    nll: float  #: negative log-likelihood by importance sampling.
    nll_error: float
    nll_images: int  #: the images it is taken over, chosen at random once for all.
    num_samples: int  #: the samples an image for it.
    nfe: float  #: evaluations per solve, the mean.


@torch.no_grad()
def estimate(
    vae: VAE, images: Tensor, *, num_samples: int = 100, nll_images: int | None = None, chunk: int = 1000, seed: int = 0
) -> Estimate:
    r"""
    The -ELBO by one sample an image, and the negative log-likelihood
    :math:`-\log \frac{1}{K} \sum_k p(x, z_k) / q(z_k | x)`. Continuous flows are judged with their exact trace and a
    tight solver, whatever they were trained with.

    :param VAE vae: the model.
    :param Tensor images: binary images with shape ``(n, pixels)``.
    :param int num_samples: the number K of samples an image.
    :param nll_images: as many images are enough for the likelihood; None for all, 0 for none.
    :param int chunk: samples that are in memory at a time.
    :param int seed: for the samples, and the choice of images.
    """
    trained = vae.inner, vae.flow
    vae.inner, vae.flow = nn.ModuleList(exact(part) for part in vae.inner), exact(vae.flow)  # type: ignore[misc]
    solves: list[int] = []

    def log_weights(x: Tensor, count: int) -> Tensor:
        log_w = vae.log_weights(x, count)
        solves.append(sum(solve.nfe for solve in _last_solves(vae)))
        return log_w

    try:
        with torch.random.fork_rng(devices=[images.device] if images.is_cuda else []):
            torch.manual_seed(seed)
            choice = torch.randperm(len(images))[:nll_images].to(images.device)
            elbo = torch.cat([log_weights(x, 1)[0] for x in Progress(images.split(chunk), desc="-ELBO", unit="batch")])
            counts = [min(chunk, num_samples - i) for i in range(0, num_samples, chunk)]
            likelihood = []
            batches = images[choice].split(max(1, chunk // num_samples)) if len(choice) else ()
            for x in Progress(batches, desc=f"NLL, K = {num_samples}", unit="batch"):
                log_w = torch.cat([log_weights(x, count) for count in counts])
                likelihood.append(log_w.logsumexp(0) - math.log(num_samples))
    finally:
        vae.inner, vae.flow = trained
    return Estimate(
        *_mean_and_error(-elbo),
        *_mean_and_error(-torch.cat(likelihood) if likelihood else elbo[:0]),
        len(choice),
        num_samples,
        _mean(solves),
    )


def expected_seconds(
    config: Config, images: Images, device: torch.device, num_samples: int = 100, nll_images: int | None = None
) -> tuple[float, float]:
    """
    Seconds that the training of a run will take on this machine and seconds that its test will, with the arguments of
    :func:`estimate`, from a few batches of each. The solves of continuous flows become longer while they learn, so
    theirs is a lower estimate.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        task = Task(make_vae(config, images.train.shape[1]), images, config).to(device)
        optimizer = torch.optim.Adamax(task.parameters(), lr=0.0)
        x = torch.bernoulli(images.train[: config.batch_size]).to(device)

        def step() -> None:
            optimizer.zero_grad()
            task.elbo(x, 1.0).backward()
            optimizer.step()

        training = _seconds(step)
        with torch.no_grad():
            validation = _seconds(lambda: task.elbo(x, 1.0))
        per_batch, count = 1000, len(images.test)
        if nll_images != 0:
            per_batch, count = max(1, 1000 // num_samples), min(count, nll_images or count)
        batch = images.test[:per_batch].to(device)
        test = _seconds(lambda: estimate(task.vae, batch, num_samples=num_samples, nll_images=nll_images), 1)
    batches = (math.ceil(len(part) / config.batch_size) for part in (images.train, images.validation))
    epoch = sum(seconds * n for seconds, n in zip((training, validation), batches, strict=True))
    return config.epochs * epoch, math.ceil(count / per_batch) * test


def _seconds(function: Callable[[], object], repeats: int = 3) -> float:
    """The mean time of a call, after one that does not count."""
    for turn in range(repeats + 1):
        if turn <= 1:
            begin = time.perf_counter()
        function()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) / repeats


def _mean_and_error(values: Tensor) -> tuple[float, float]:
    if len(values) < 2:
        return (values.item() if len(values) else math.nan), math.nan
    return values.mean(dtype=torch.float64).item(), values.double().std().item() / math.sqrt(len(values))


def gradient_variance(vae: VAE, x: Tensor, repeats: int = 50, seed: int = 0) -> tuple[float, float]:
    """
    The variance of the gradient of the -ELBO with respect to a continuous flow's parameters, summed over them: over new
    samples of the posterior, and over solves from one and the same sample of its base, where a stochastic trace is the
    only source of noise.

    :param VAE vae: the model.
    :param Tensor x: a batch of binary images with shape ``(n, pixels)``.
    :param int repeats: gradients that are taken for either of the two.
    :param int seed: for the random numbers.
    """
    torch.manual_seed(seed)
    noise = torch.randn(repeats, len(x), vae.latent_dim, dtype=x.dtype, device=x.device)
    anew, same = (
        torch.stack([_flow_gradient(vae, x, noise[i * step]) for i in range(repeats)]).var(0).sum().item()
        for step in (1, 0)
    )
    return anew, same


def _flow_gradient(vae: VAE, x: Tensor, noise: Tensor) -> Tensor:
    posterior = vae.posterior(x)
    normal = posterior.base_dist.base_dist
    # The sample of the base is given; the probe of a stochastic trace is not.
    normal.rsample = lambda sample_shape=(): normal.loc + normal.scale * noise
    z = posterior.rsample()
    log_q = posterior.log_prob(z)
    log_p = dist.Normal(0.0, 1.0).log_prob(z).sum(-1) + dist.Bernoulli(logits=vae.logits(z)).log_prob(x).sum(-1)
    parameters = [parameter for flow in (*vae.inner, vae.flow) if flow is not None for parameter in flow.parameters()]
    gradients = torch.autograd.grad((log_q - log_p).mean(), parameters, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in gradients])
