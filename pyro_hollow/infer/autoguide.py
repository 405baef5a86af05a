# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""An automatic guide whose posterior is a Hollow-CNF."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous
from pyro.infer.autoguide.initialization import InitMessenger
from torch import Tensor, nn
from torch.distributions import ComposeTransform, Transform, biject_to

from pyro_hollow.infer.gaussian_mixture import GaussianMixture
from pyro_hollow.infer.gradient_guard import guard_gradients
from pyro_hollow.infer.graph import adjacency_of_trace
from pyro_hollow.infer.guide_posterior import Affine, PathPosterior, Posterior, Stretching, Tails
from pyro_hollow.infer.masked import MaskedElements
from pyro_hollow.infer.model_density import ImproperAtZero
from pyro_hollow.infer.particles import check_independence
from pyro_hollow.infer.plates import plates, subsampled
from pyro_hollow.infer.start import check_data, choose_start, log_density
from pyro_hollow.nn import Conditioner, GraphConditioner
from pyro_hollow.ode import Solver
from pyro_hollow.transforms import HollowCNF, hollow_cnf

__all__ = ["AutoHollowCNF"]

# How much faster the affine map learns than the networks.
_AFFINE_RATE = 3.0
# Up to here every coordinate gets a conditioner of its own; beyond, its d^2 weights become too many.
_MAX_GROUPED = 256
_QUANTILE_SAMPLES = 4096
# The base starts nearly Gaussian, but with tails that can be felt.
_INITIAL_TAIL = 0.05
_SIGNATURE_SIZE = 8
_BASE = (
    "base_log_weights",
    "base_locs",
    "base_scale_trils",
    "base_members",
)  # of a mixture, in the coordinates of the flow
_OTHER_STORE = (
    "Pyro's parameter store has the parameters of a guide for another number of latents or with other settings, or of "
    "another model; before you make a guide anew, call pyro.clear_param_store()"
)


class AutoHollowCNF(AutoContinuous):
    r"""
    This implementation of :class:`~pyro.infer.autoguide.AutoContinuous` uses a standard Normal distribution transformed
    via :class:`~pyro_hollow.transforms.HollowCNF` and a learnable affine map,

        :math:`\mathbf{x} = \boldsymbol{\mu} + L \, \mathrm{flow}(\mathbf{z}), \qquad \mathbf{z} \sim
        \mathcal{N}(0, I),`

    to construct a guide over the entire latent space. The guide does not depend on the model's ``*args, **kwargs``.

    Usage::

        guide = AutoHollowCNF(model)
        svi = SVI(model, guide, Adam({"lr": 0.01}), Trace_ELBO(num_particles=32, vectorize_particles=True))

    The flow starts at the identity, :math:`\mu` where ``init_loc_fn`` says and L at ``init_scale`` times the identity,
    so the guide starts as :class:`~pyro.infer.autoguide.AutoNormal` does. In its first ``warm_up`` calls with gradients
    the affine map learns alone, as in :class:`~pyro.infer.autoguide.AutoMultivariateNormal` and as fast; a flow that
    learns while location and scale are far off ends in dynamics that are expensive to integrate.

    The flow is integrated with error control, at the price of more evaluations where it needs them; with a fixed step
    the ELBO would profit from errors of integration. Vectorised particles are spread
    evenly over the base distribution (randomised quasi-Monte Carlo; Buchholz et al., 2018), for gradients of less
    noise. See
    ``python -m pyro_hollow.experiments.posteriors`` for the guide beside others and for what its defaults rest on.

    All latents share one joint distribution, so local latents in a subsampled plate are refused. For those write a
    guide with an amortised flow, whose context comes from the data, and combine the two in an
    :class:`~pyro.infer.autoguide.AutoGuideList`::

        flow = conditional_hollow_cnf(input_dim=2, context_dim=16)

        guide = AutoGuideList(model, create_plates=lambda data: pyro.plate("data", len(data), subsample_size=100))

        def local_guide(data):
            pyro.module("encoder", encoder)
            pyro.module("flow", flow)
            with guide.plates["data"] as batch:
                base = dist.Normal(torch.zeros(2), 1.0).expand([len(batch), 2]).to_event(1)
                posterior = dist.TransformedDistribution(base, [flow.condition(encoder(data[batch]))])
                pyro.sample("z", posterior)

        guide.append(AutoHollowCNF(poutine.block(model, hide=["z"])))
        guide.append(local_guide)

    :class:`~pyro.infer.JitTrace_ELBO` is refused. A trained guide with a solver of fixed step can be exported by
    ``torch.jit.trace_module(guide.requires_grad_(False), {"call": args})``.

    Elements of latents that the model masks, and on which nothing in it depends, are no part of the joint density: they
    are sampled from the prior. Steps in which a gradient is not finite change no parameter of the guide, with one
    warning. The first step with vectorised particles checks that the model keeps them apart.

    :param callable model: a Pyro model with continuous latents.
    :param hidden_dims: widths of the conditioner's layers; see :class:`~pyro_hollow.nn.HollowNN`.
    :param int num_transforms: the number of flows, one after the other.
    :param callable init_loc_fn: a per-site initialization function; see Pyro's section on autoguide initialization.
        None for the prior's median, or, where the joint density is not finite or very small there, for the zero of the
        unconstrained space or the best of a few random points.
    :param float init_scale: the initial standard deviation of each unconstrained latent.
    :param Solver solver: how to integrate; None for "dopri5" at tolerances of 1e-3. To evaluate a fitted guide more
        precisely, set :attr:`solver`. A name stands for the solver of that method.
    :param int warm_up: the number of training calls in which the affine map learns alone; a step makes one call, and
        as many as there are particles if they are not vectorised. The optimizer meets the flow's parameters after it,
        and with them begins what :class:`~pyro.optim.lr_scheduler.PyroLRScheduler` schedules for each parameter.
        0 under torch's DistributedDataParallel, which wants gradients for all parameters in every step.
    :param str affine: "full" for a Cholesky factor L, "diagonal" for a diagonal one (for thousands of latents).
    :param float penalty: the weight, in nats, of the kinetic energy and the squared Jacobian norm of the flow
        (:class:`~pyro_hollow.transforms.Regularization`) that the ELBO then pays for; dynamics become cheaper to
        integrate, but an evaluation in training costs more.
    :param bool path_gradient: the gradient of the log-density of a sample through the sample alone (Roeder et al.,
        2017; for a CNF, Vaitl et al., 2022). It has the right mean for the ELBO, and a variance that vanishes as the
        guide becomes exact, so it ends closer to the posterior; but only with a learning rate that decays: at a
        constant one it is less stable than the default. It is biased for objectives that are not linear in the
        log-density, such as :class:`~pyro.infer.RenyiELBO`, and off with a penalty.
    :param float overdispersion: with the path gradient, train the tails: in training after the warm-up the coordinates
        of base samples are stretched, each by a factor drawn evenly from 1 to this one (2 is a good choice), so that
        the flow learns about places that it would hardly ever sample. The path gradient allows it, for where a guide is
        exact that of every sample is zero. As a rule importance weights become lighter, for an ELBO that can be a
        little lower; with dozens of latents there is less to gain: compare :func:`diagnose`. No sample has more
        influence than its score, and the largest factor recedes by itself while too many samples would. For
        :class:`~pyro.infer.Trace_ELBO` and its like, all the data in every step, and this as the whole guide:
        parameters of the model and of other guides would get a biased gradient, what ``svi.step`` returns is not the
        negative ELBO, and samples for other purposes are to be drawn without gradients or after ``guide.eval()``.
    :param tails: True for a base whose tails can learn to be heavier than Gaussian ones, up to exponential, on either
        side of each coordinate; they learn from the first call. None for such a base with overdispersion alone.
    :param bool compile: solve in compiled code where there is some, as ``Solver(compile=True)``. With 32 particles on
        one core a step takes 0.6 of the time, for 10 latents as for 100
        (``python -m pyro_hollow.experiments.speed --table svi``). The first call compiles, which takes some seconds
        once on a machine.
    :param create_plates: as for :class:`~pyro.infer.autoguide.AutoNormal`, for models that subsample their data.
    :param kwargs: further arguments of :func:`~pyro_hollow.transforms.hollow_cnf`. The conditioner defaults to
        "grouped" up to 256 latents, and to "leave-one-out" beyond; with "graph" the first call finds the graph of the
        model, as :func:`latent_adjacency` does, for a :class:`~pyro_hollow.nn.GraphConditioner`. The activation
        defaults to ("silu", "tanh"), that of the conditioner (unless it is your own) and the transformer's.
        ``activation="tanh"`` fits several separate modes better. With "silu" and ``max_rate=None`` the flow need not
        exist far from the posterior.
    :raises ValueError: for arguments out of range, when a state of another model or with other settings is loaded, and
        on the first call for overdispersion with subsampled data, observed values that are not finite, improper priors
        without data, and a model that mixes vectorised particles.
    :raises NotImplementedError: on the first call, for local latents in a subsampled plate.
    :raises RuntimeError: on the first call, for compile=True without a C compiler.
    """

    progress: Tensor
    affine: nn.Parameter
    base_log_weights: Any
    base_locs: Any
    base_scale_trils: Any
    base_members: Any
    prototype_trace: Any

    def __init__(
        self,
        model: Callable[..., Any],
        hidden_dims: Sequence[int] | None = None,
        num_transforms: int = 1,
        init_loc_fn: Callable[..., Any] | None = None,
        init_scale: float = 0.1,
        solver: Solver | str | None = None,
        *,
        warm_up: int = 300,
        affine: str = "full",
        penalty: float = 0.0,
        path_gradient: bool = False,
        overdispersion: float = 1.0,
        tails: bool | None = None,
        compile: bool = False,
        create_plates: Callable[..., Any] | None = None,
        **kwargs: Any,
    ) -> None:
        _check_settings(num_transforms, affine, init_scale, warm_up, penalty, overdispersion)
        if overdispersion > 1 and (penalty or not path_gradient):
            raise ValueError("overdispersion needs path_gradient=True and no penalty")
        if penalty and kwargs.get("cache_size") == 0:
            raise ValueError("penalty needs cache_size=1")
        if kwargs.get("transformer") is not None:
            raise ValueError("transformer must be the built-in one, with which the flow can start at the identity")
        super().__init__(model)
        self._model = (model,)  # without the start, which is chosen at set-up
        solver = Solver(rtol=1e-3, atol=1e-3) if solver is None else Solver.of(solver)
        self.create_plates = create_plates
        self._init_loc_fn = init_loc_fn
        self._init_scale = init_scale
        self._full = affine == "full"
        self._warm_up = warm_up
        self._masked: Any = None
        self._checked = False
        #: The least and the largest of all latents at which the model is known to be defined.
        self._range: tuple[Tensor, Tensor] | None = None
        #: The progress in Pyro's store.
        self._entry: tuple[Any] = (None,)
        self._penalty = penalty
        self._path_gradient = path_gradient and not penalty
        self._stretching = Stretching(overdispersion) if overdispersion > 1 else None
        self._has_tails = overdispersion > 1 if tails is None else tails
        self._num_transforms = num_transforms
        self._settings = {
            "hidden_dims": hidden_dims,
            "solver": dataclasses.replace(solver, compile=True) if compile else solver,
            "regularize": penalty > 0,
            "activation": ("silu", "tanh"),
            **kwargs,
        }
        #: The edges between latents, once they are known, for the conditioner "graph".
        self._adjacency: Tensor | None = None
        self._check_flow_settings()
        #: What is saved besides parameters: the number of calls, the stretching, and whose parameters they are.
        self.register_buffer("progress", torch.zeros(2 + _SIGNATURE_SIZE))
        for name in _BASE:
            self.register_buffer(name, None)
        self._placed = self.progress.dtype, self.progress.device

    def _check_flow_settings(self) -> None:
        """Makes a small flow, so that settings that make none are refused at once."""
        conditioner = self._settings.get("conditioner")
        dim = conditioner.input_dim if isinstance(conditioner, Conditioner) else 2
        if conditioner is None or conditioner == "graph":  # of which nothing is known yet
            conditioner = "grouped"
        with torch.random.fork_rng(devices=[]):
            hollow_cnf(dim, **{**self._settings, "conditioner": copy.deepcopy(conditioner)})

    def setup(self, *args: Any, **kwargs: Any) -> AutoHollowCNF:
        """
        Sets the guide up as its first call would, so that it has parameters to move, to load or to give to an
        optimizer.

        :param args: positional arguments of the model.
        :param kwargs: keyword arguments of the model.
        :return: the guide itself.
        """
        if self.prototype_trace is None:
            with torch.inference_mode(False), torch.no_grad():  # parameters made in inference mode could not learn
                self._setup_prototype(*args, **kwargs)
        return self

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """
        The parameters, of which there are none before the guide is set up.

        :raises RuntimeError: before the guide is set up, by its first call, a state or :meth:`setup`.
        """
        if not hasattr(self, "flows") and self._model is not None:  # Pyro asks without a model, for a copy
            raise RuntimeError(
                "the guide has no parameters before it has seen the model: call guide.setup(*args, **kwargs) with the "
                "model's arguments first"
            )
        return super().parameters(recurse)

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        # A guide that goes on from a saved state must see the random numbers that an uninterrupted one sees.
        saved = hasattr(self, "flows") or self._stored()
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        with torch.random.fork_rng(devices) if saved else nullcontext():
            self._set_up(*args, **kwargs)

    def _set_up(self, *args: Any, **kwargs: Any) -> None:
        model, start = self.model, self._init_loc_fn
        proper = ImproperAtZero()(model) if start is None else model
        with torch.random.fork_rng(devices=[]):
            check_data(proper, args, kwargs)
            if start is None:
                start = choose_start(proper, self._init_scale, args, kwargs)
        try:
            self._model = (InitMessenger(start)(proper),)
            super()._setup_prototype(*args, **kwargs)
            self._model = (model,)
            self._masked = MaskedElements(model, args, kwargs, self.prototype_trace)
            self.latent_dim = len(self._masked.index)
            if self.latent_dim == 0:
                raise ValueError("the model masks all of its latents, so that there is no density to approximate")
            self._check_prototype_frames()
            self._check_subsampling(*args, **kwargs)
            if not hasattr(self, "flows"):
                self._find_graph(args, kwargs)
                if self._stored():
                    self._make_from_store()
                else:
                    self._make(self._init_loc())
            elif len(self.affine) != self.latent_dim:
                raise ValueError(
                    f"the state was saved for {len(self.affine)} latents, but the model has {self.latent_dim}"
                )
            self._check_signature()
        except Exception:
            self.prototype_trace = None  # or the next call would go on without parameters
            raise
        finally:
            self._model = (model,)

    def _find_graph(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._settings.get("conditioner") == "graph":
            with torch.random.fork_rng(devices=[]):
                adjacency = adjacency_of_trace(self.model, args, kwargs, self.prototype_trace)
            index = self._masked.index
            self._adjacency = adjacency[index][:, index]

    def _check_prototype_frames(self) -> None:
        for frame in subsampled(self._prototype_frames.values()):
            raise NotImplementedError(
                f"plate {frame.name!r} holds latents, but subsamples {frame.size} of {frame.full_size}: one joint "
                "distribution cannot cover them. Use all the data, or an amortised guide for these latents "
                "(conditional_hollow_cnf) and an AutoHollowCNF for the others, in an AutoGuideList"
            )

    def _check_subsampling(self, *args: Any, **kwargs: Any) -> None:
        if self._stretching is None:
            return
        # The prototype does not show where data are observed.
        trace = poutine.block(poutine.trace(self.model).get_trace)(*args, **kwargs)
        for frame in subsampled(plates(trace)):
            raise ValueError(
                "overdispersion must be 1 for subsampled data, whose noise outweighs what the tails can teach, but "
                f"plate {frame.name!r} subsamples {frame.size} of {frame.full_size}"
            )

    def _stored(self) -> bool:
        """True if Pyro's parameter store has parameters of this guide's name, as after loading it."""
        if not self._uses_store():
            return False
        names = (self._pyro_get_fullname("affine"), self._pyro_get_fullname("flows") + "$$$")
        return any(key.startswith(names) for key in pyro.get_param_store())

    def _uses_store(self) -> bool:
        return self._pyro_context.active and not pyro.settings.get("module_local_params")

    def _make_from_store(self) -> None:
        """Takes the flows from the store; other parameters come by themselves."""
        self._check_tails(self._pyro_get_fullname("tails") in pyro.get_param_store())
        loc = self._init_loc()
        flows = self._make_flows(loc)
        self._check_store(flows, len(loc))
        self._make(loc, flows)
        pyro.module(self._pyro_get_fullname("flows"), self._modules["flows"], update_module_params=True)
        self._synchronize()

    def _check_store(self, flows: nn.ModuleList, d: int) -> None:
        """Refuses a store that has other parameters than those of these flows and of an affine map."""
        store, name = pyro.get_param_store(), self._pyro_get_fullname("flows")
        own = {f"{name}$$${key}": parameter.shape for key, parameter in flows.named_parameters()}
        own[self._pyro_get_fullname("affine")] = torch.Size([d, 1 + (d if self._full else 1)])
        known = {key: store[key].shape for key in store if key in own or key.startswith(f"{name}$$$")}
        if known != own:
            raise ValueError(_OTHER_STORE)

    def _signature(self) -> Tensor:
        """A digest of what parameters mean: the sites and shapes of latents, and the settings."""
        sites = [
            (site["name"], tuple(self._unconstrained_shapes[site["name"]]), type(site["fn"].support).__name__)
            for _, site in self.prototype_trace.iter_stochastic_nodes()
        ]
        flows = self._modules["flows"]
        shapes = [(name, tuple(parameter.shape)) for name, parameter in flows.named_parameters()]
        settings = {name: self._settings.get(name) for name in ("activation", "max_rate", "time")}
        named = {name: getattr(value, "__name__", repr(value)) for name, value in settings.items()}
        conditioners = [type(flow.nn.conditioner).__name__ for flow in flows]
        conditioners += [str(edges.tolist()) for name, edges in flows.named_buffers() if name.endswith(".edges")]
        affine = self._full and self.latent_dim > 1
        content = (sites, self._masked.index.tolist(), shapes, named, conditioners, affine, not self._has_tails)
        digest = hashlib.sha256(repr(content).encode()).digest()
        # Three bytes each, which even float32 holds exactly.
        return torch.tensor([int.from_bytes(digest[3 * i : 3 * i + 3], "big") for i in range(_SIGNATURE_SIZE)])

    def _check_signature(self) -> None:
        """Refuses a state that is another guide's, by its signature if it has one."""
        signature = self._signature().to(self.progress)
        if bool(self.progress[2:].any()) and not torch.equal(self.progress[2:], signature):
            raise ValueError("the state was saved for a guide of another model or with other settings")
        self.progress[2:] = signature

    def _synchronize(self) -> None:
        """
        Keeps the progress in Pyro's store, in the same memory as in this module; what was loaded into the store wins,
        as for parameters. With it are all parameters from the first call on, hidden from optimizers until they learn.
        """
        if not self._uses_store():
            return
        store, name = pyro.get_param_store()._params, self._pyro_get_fullname("progress")
        entry = store.get(name)
        if entry is None or entry is not self._entry[0]:
            if entry is not None:
                signature = self._signature().to(entry)
                if entry.shape != self.progress.shape or not torch.equal(entry.detach()[2:], signature):
                    raise ValueError(_OTHER_STORE)
                self.progress.copy_(entry.detach())
            with poutine.block():
                _ = self.affine, self.flows, getattr(self, "tails", None)
        elif entry.data_ptr() == self.progress.data_ptr():
            return
        pyro.get_param_store()[name] = self.progress.detach()  # in the same memory
        self._entry = (store[name],)

    def _init_loc(self) -> Tensor:
        return self._masked.start[self._masked.index]

    def _make(self, loc: Tensor, flows: nn.ModuleList | None = None) -> None:
        """Makes the parameters: the affine map, location in the first column, and the flows unless there are any."""
        d = len(loc)
        if (self.progress.dtype, self.progress.device) != self._placed:  # the guide was moved before it was made
            loc = loc.to(self.progress)
        self.progress = self.progress.to(loc)
        affine = torch.zeros(d, 1 + (d if self._full else 1)).to(loc)
        affine[:, 0] = loc
        log_scale = affine[:, 1:].diagonal() if self._full else affine[:, 1]
        log_scale.fill_(math.log(self._init_scale))
        self.affine = nn.Parameter(affine / _AFFINE_RATE)
        if self._stretching is not None:
            self._stretching.to(loc)
            self.progress[1] = self._stretching.excess
        if self._has_tails:
            self.tails = nn.Parameter(torch.full((d, 2), math.log(_INITIAL_TAIL) / _AFFINE_RATE).to(loc))
        self.flows = self._make_flows(loc) if flows is None else flows

    def _make_flows(self, loc: Tensor) -> nn.ModuleList:
        d = len(loc)
        settings = {"conditioner": "grouped" if d <= _MAX_GROUPED else "leave-one-out", **self._settings}
        flows = [self._make_flow(d, settings).to(loc) for _ in range(self._num_transforms)]
        for flow in flows:
            flow.nn.transformer.reset_to_zero()
        if self.solver.compile and not self._penalty:
            with torch.no_grad():  # where nothing can be compiled, it should fail before the warm-up
                flows[0](loc.new_zeros(1, d))
            flows[0].clear_cache()
        return nn.ModuleList(flows)

    def _make_flow(self, d: int, settings: dict[str, Any]) -> HollowCNF:
        # A copy each: a conditioner of the user's own must not be shared.
        settings = {**settings, "conditioner": copy.deepcopy(settings["conditioner"])}
        if settings["conditioner"] == "graph" and self._adjacency is not None:
            widths, activation = settings.pop("hidden_dims"), settings["activation"]
            settings["conditioner"] = GraphConditioner(
                d,
                [32, 32] if widths is None else widths,
                adjacency=self._adjacency,
                activation=activation if isinstance(activation, str) else activation[0],
            )
        return hollow_cnf(d, **settings)

    @property
    def solver(self) -> Solver:
        """Solver of the flows. Set it to train and to evaluate with different tolerances."""
        return self._settings["solver"]

    @solver.setter
    def solver(self, solver: Solver) -> None:
        self._settings["solver"] = solver
        for flow in getattr(self, "flows", ()):
            flow.solver = solver

    def _transforms(self, flows: Iterable[Any]) -> list[Transform]:
        """The tails of the base if it has any, the given flows, and the affine map."""
        tails = [] if not self._has_tails else [Tails((self.tails * _AFFINE_RATE).exp())]
        affine = self.affine * _AFFINE_RATE
        loc, raw = affine[:, 0], affine[:, 1:]
        last = Affine(loc, raw.diagonal(), raw.tril(-1)) if self._full else Affine(loc, raw[:, 0], None)
        return [*tails, *flows, last]

    @torch.no_grad()
    def set_affine(self, loc: Tensor, scale_tril: Tensor) -> None:
        r"""
        Sets the affine map, so that a guide whose flow is still the identity is the Gaussian
        :math:`\mathcal{N}(\mu, L L^T)`, but for tails. A diagonal map takes the scales at which its own ELBO is best.

        :param Tensor loc: :math:`\mu`, with shape ``(d,)``.
        :param Tensor scale_tril: L, lower triangular with a positive diagonal and shape ``(d, d)``.
        :raises ValueError: for other shapes.
        """
        d = self.latent_dim
        if loc.shape != (d,) or scale_tril.shape != (d, d):
            raise ValueError(
                f"loc and scale_tril must have shapes ({d},) and ({d}, {d}), but got {tuple(loc.shape)} and "
                f"{tuple(scale_tril.shape)}"
            )
        if self._full:
            scale = scale_tril.diagonal()
            raw = (scale_tril / scale.unsqueeze(-1)).tril(-1) + scale.log().diag()
        else:
            raw = -0.5 * torch.cholesky_inverse(scale_tril).diagonal().log().unsqueeze(-1)
        self.affine.copy_(torch.cat([loc.unsqueeze(-1), raw], -1) / _AFFINE_RATE)

    @torch.no_grad()
    def set_mixture(self, mixture: GaussianMixture) -> None:
        r"""
        Makes a mixture of Gaussians the base of the flow, behind an affine map to its mean and covariance, so that a
        guide whose flow is still the identity is that mixture, but for tails. The flow then need not tear a single
        Gaussian apart, and keeps modes that it would lose.

        The base is not trained. It is a part of the guide's state, but not of Pyro's parameter store.

        :param GaussianMixture mixture: of all unconstrained latents.
        :raises ValueError: for another number of latents.
        """
        if mixture.event_shape != (self.latent_dim,):
            raise ValueError(f"mixture must be of {self.latent_dim} latents, but it is of {mixture.event_shape[0]}")
        loc, scale_tril = mixture.moments()
        if not self._full:
            scale_tril = scale_tril.square().sum(-1).sqrt().diag()
        self.set_affine(loc, scale_tril)
        base = mixture.affine(loc, scale_tril)
        for name in _BASE:
            setattr(self, name, getattr(base, name.removeprefix("base_")))

    def is_fresh(self) -> bool:
        """Tells that nothing was trained yet: the flows are the identity, and no call had gradients."""
        flows = self._modules.get("flows") or ()
        return self.progress[0].item() == 0 and all(flow.nn.transformer.is_zero() for flow in flows)

    def get_base_dist(self) -> dist.Distribution:
        """A standard Normal distribution, or the mixture of Gaussians of :meth:`set_mixture`."""
        if self.base_locs is not None:
            return GaussianMixture(self.base_log_weights, self.base_locs, self.base_scale_trils, self.base_members)
        zero = self.affine.new_zeros(())
        return dist.Normal(zero, torch.ones_like(zero)).expand([self.latent_dim]).to_event(1)

    def get_transform(self, *args: Any, **kwargs: Any) -> Transform:
        """The tails of the base if it has any, the flows, and the affine map."""
        return ComposeTransform(self._transforms(self.flows))

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """
        Samples all latents of the model. Elements that the model masks, and on which nothing in it depends, are samples
        of the prior without a density.

        :return: A dict mapping sample site name to sampled value.
        """
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        with self._masked.uncounted() if self._masked else nullcontext():
            return super().forward(*args, **kwargs)

    def _unpack_latent(self, latent: Tensor) -> Iterator[tuple[Any, Tensor]]:
        if self._masked and latent.shape[-1] == self.latent_dim:
            latent = self._masked.fill(latent, self._masked.start.to(latent))
        return super()._unpack_latent(latent)

    def _values(self, latent: Tensor) -> dict[str, Tensor]:
        """The latents in their supports, by site."""
        return {site["name"]: biject_to(site["fn"].support)(value) for site, value in self._unpack_latent(latent)}

    def _with_masked(self, latent: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Latents with samples of the elements that the model masks."""
        drawn = self._masked.draw(self.model, args, kwargs, self._values(latent.detach()), latent.shape[:-1])
        return self._masked.fill(latent, drawn)

    def sample_latent(self, *args: Any, **kwargs: Any) -> Tensor:
        """Samples an encoded latent."""
        if torch.jit.is_tracing() and self.affine.requires_grad:
            raise RuntimeError(
                "a guide that learns cannot be traced, as JitTrace_ELBO would: use Trace_ELBO, and compile=True for "
                "speed. To export a trained guide with torch.jit.trace_module, take a solver of fixed step, call "
                "guide.requires_grad_(False), and trace its method 'call'"
            )
        if self._stretching is not None and self._stretching.excess.data_ptr() != self.progress[1].data_ptr():
            self.progress[1] = self._stretching.excess  # a copy, or a guide that was moved
            self._stretching.excess = self.progress[1]
        self._synchronize()
        learns = self.training and torch.is_grad_enabled()
        flows: list[Any] = [] if self._warms_up() else list(self.flows)
        transforms = self._transforms(flows)
        if self._path_gradient:
            posterior = PathPosterior(self.get_base_dist(), transforms)
            if self._stretching is not None and flows and self.training:
                posterior.stretching = self._stretching
                # A guide from a pickle has no model.
                posterior.is_valid = None if self._model is None else partial(self._evaluates, args, kwargs)
        else:
            posterior = Posterior(self.get_base_dist(), transforms)
        latent = pyro.sample(f"_{self._pyro_name}_latent", posterior, infer={"is_auxiliary": True})
        if not bool(latent.detach().isfinite().all()):
            self._check_parameters()
        if learns:
            guard_gradients(latent, self)
            self._check_particles(latent.detach(), args, kwargs)
        if self._masked:
            latent = self._with_masked(latent, args, kwargs)
            self._masked.latents = {site["name"]: (site["fn"], value) for site, value in self._unpack_latent(latent)}
        if self._penalty and flows and torch.is_grad_enabled():
            penalty = torch.stack([flow.regularization.penalty() for flow in flows]).sum(0)
            # In a guide, whose log-density the ELBO subtracts.
            pyro.factor(f"_{self._pyro_name}_penalty", self._penalty * penalty, has_rsample=True)
        return latent

    def _check_parameters(self) -> None:
        """Names parameters that are not finite, before the model or a solver is blamed."""
        bad = [name for name, parameter in self.named_parameters() if not bool(parameter.isfinite().all())]
        if bad:
            raise ArithmeticError(
                f"parameters of the guide are not finite: {', '.join(bad)}; restore an earlier state, or call "
                "pyro.clear_param_store() and train a new guide with a lower learning rate"
            )

    def _check_particles(self, latent: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Once, refuses a model that mixes vectorised particles, whose gradients would be wrong."""
        vectorized = latent.dim() >= 2 and len(latent) >= 2 and latent.shape[1:-1].numel() == 1
        if self._checked or self._model is None or not vectorized:
            return
        values = self._values(latent[:2])
        check_independence(self.model, args, kwargs, values, latent.dim() - 2, "vectorize_particles=False")
        self._checked = True

    @torch.no_grad()
    def _evaluates(self, args: tuple[Any, ...], kwargs: dict[str, Any], latents: Tensor) -> bool:
        """
        False if the model raises an error for one of the stretched samples.

        Only those are tried that lie outside the range of all earlier ones: soon there are few.
        """
        rows = latents.reshape(-1, latents.shape[-1])
        if self._range is None:
            self._range = torch.full_like(rows[0], math.inf), torch.full_like(rows[0], -math.inf)
        low, high = (bound.to(rows) for bound in self._range)  # the guide may have been moved
        for row in rows[((rows < low) | (rows > high)).any(-1)]:
            try:
                log_density(self.model, args, kwargs, self._values(row))
            except (ArithmeticError, RuntimeError, ValueError):
                return False
            low, high = torch.minimum(low, row), torch.maximum(high, row)
            self._range = low, high
        return True

    def _warms_up(self) -> bool:
        """True if the flows sit this call out; only while they are the identity, so that no result depends on it."""
        learns = self.training and torch.is_grad_enabled() and not torch.jit.is_tracing()
        if not (learns and self.progress[0] < self._warm_up):
            return False
        # Not as an attribute, which would show their parameters to the optimizer.
        fresh = all(flow.nn.transformer.is_zero() for flow in self._modules["flows"])
        self.progress[0] = self.progress[0] + 1 if fresh else self._warm_up
        return fresh

    @torch.no_grad()
    def _marginal_quantiles(
        self, probabilities: Sequence[float] | Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        """The quantiles of the unconstrained latents, with shape ``(len(probabilities), n)``."""
        z = _normal_samples(self.latent_dim).to(self.affine)
        base = self.get_base_dist()
        if isinstance(base, GaussianMixture):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                z = base.place(z, base.stratify(len(z)))
        transform = self.get_transform()
        samples = torch.cat([transform(part) for part in z.split(max(1, 2**18 // self.latent_dim))])
        if self._masked:
            nesting = max((-frame.dim for frame in self._prototype_frames.values()), default=0)
            with torch.random.fork_rng(devices=[]):
                particles = samples.reshape(len(samples), *(1,) * nesting, -1)
                samples = self._with_masked(particles, args, kwargs).reshape(len(samples), -1)
        levels = torch.as_tensor(probabilities).to(samples)
        # torch.quantile takes 2^24 elements at most.
        return torch.cat([torch.quantile(part, levels, dim=0) for part in samples.split(2**11, dim=-1)], dim=-1)

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """
        Returns the posterior median value of each latent variable: the image, in the support, of the medians of the
        unconstrained latents, from quasi-random samples that do not vary.

        :return: A dict mapping sample site name to median tensor.
        """
        return {name: values[0] for name, values in self.quantiles([0.5], *args, **kwargs).items()}

    @torch.no_grad()
    def quantiles(self, quantiles: Sequence[float] | Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """
        Returns posterior quantiles of each latent variable: the image, in the support, of the quantiles of the
        unconstrained latents, from quasi-random samples that do not vary. Example::

            print(guide.quantiles([0.05, 0.5, 0.95]))

        :param quantiles: A list of requested quantiles between 0 and 1.
        :param args: arguments of the model, by which one that was not called yet is set up, and elements that the model
            masks are sampled; and so kwargs.
        :return: A dict mapping sample site name to a tensor of quantile values, stacked in the first dimension.
        """
        self.setup(*args, **kwargs)
        result: dict[str, list[Tensor]] = {}
        for latent in self._marginal_quantiles(quantiles, args, kwargs):
            for name, value in self._values(latent).items():
                result.setdefault(name, []).append(value)
        return {name: torch.stack(values) for name, values in result.items()}

    def _check_tails(self, saved: bool) -> None:
        if saved != self._has_tails:
            raise ValueError("the state is that of a guide with another setting of overdispersion or tails")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        affine = state_dict.get(f"{prefix}affine")
        if affine is not None and not hasattr(self, "flows"):
            if (affine.shape[1] == len(affine) + 1) != self._full and len(affine) > 1:
                raise ValueError("the state is that of a guide with another setting of affine")
            self._check_tails(f"{prefix}tails" in state_dict)
            edges = state_dict.get(f"{prefix}flows.0.nn.conditioner.edges")
            if edges is not None:
                self._adjacency = torch.zeros(len(affine), len(affine), dtype=torch.bool)
                self._adjacency[edges.cpu().unbind()] = True
            self._make(affine[:, 0].detach().clone())
        for name in _BASE:
            saved = state_dict.get(f"{prefix}{name}")
            setattr(self, name, None if saved is None else torch.empty_like(saved, device=self.progress.device))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self) -> dict[str, Any]:
        # Pyro's takes the model, which may not be picklable, and the master from the guide itself, too.
        model, master = self.__dict__["_model"], self.__dict__["master"]
        try:
            return {**super().__getstate__(), "_entry": (None,)}
        finally:
            self._model, self.master = model, master

    def __deepcopy__(self, memo: dict[int, Any]) -> AutoHollowCNF:
        clone = type(self).__new__(type(self))
        memo[id(self)] = clone
        clone.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        clone._model = self._model
        return clone


def _normal_samples(dim: int) -> Tensor:
    """Standard normal samples that are the same every time, with shape ``(_QUANTILE_SAMPLES, dim)``."""
    if dim > torch.quasirandom.SobolEngine.MAXDIM:
        half = torch.randn(_QUANTILE_SAMPLES // 2, dim, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
        return torch.cat([half, -half])
    engine = torch.quasirandom.SobolEngine(dim, scramble=True, seed=0)
    half = torch.special.ndtri(engine.draw(_QUANTILE_SAMPLES // 2, dtype=torch.float64).clamp(1e-9, 1 - 1e-9))
    return torch.cat([half, -half])  # the median of an affine map is exactly its location


def _check_settings(
    num_transforms: int, affine: str, init_scale: float, warm_up: int, penalty: float, overdispersion: float
) -> None:
    if num_transforms < 1:
        raise ValueError(f"num_transforms must be at least 1, but got {num_transforms}")
    if affine not in ("full", "diagonal"):
        raise ValueError(f"affine must be 'full' or 'diagonal', but got {affine!r}")
    if not (init_scale > 0 and math.isfinite(init_scale)):
        raise ValueError(f"init_scale must be positive and finite, but got {init_scale}")
    if not (warm_up >= 0 and math.isfinite(warm_up)):
        raise ValueError(f"warm_up must be 0 or more and finite, but got {warm_up}")
    if not (penalty >= 0 and math.isfinite(penalty)):
        raise ValueError(f"penalty must be 0 or more and finite, but got {penalty}")
    if not (overdispersion >= 1 and math.isfinite(overdispersion)):
        raise ValueError(f"overdispersion must be 1 or more and finite, but got {overdispersion}")
