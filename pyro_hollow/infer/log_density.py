# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""The log joint density of a Pyro model as a fast function of flat unconstrained latents."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.fx import GraphModule

from .capture import Untraceable, capture
from .compiling import Compilation
from .model_density import ModelDensity

__all__ = ["LogDensity"]

# The particles of a batch for up to so many latents, and for more. With few latents a call costs more in Python than in
# arithmetic, so that particles are cheap.
_FEW, _BATCH_SIZES = 200, (64, 32)
_MAX_ELEMENTS = 500_000  # of latents and data in a larger batch than this
# Seconds of evaluation after which a compiled graph is worth loading, and worth the processor that compiles it.
_WORTH_LOADING = 0.5
_WORTH_COMPILING = 3.0
# The call that is compared with a particle alone; the next one comes after twice as many calls.
_FIRST_CHECK = 64
_CHECKED = 4  # particles that `check` compares
_ROUNDING = 4  # by how many units in the last place latents are moved to see how a density is conditioned
_TOLERANCE = 1e-3  # of densities and gradients, relative and absolute
# The points of the checks: how many, how far from the start, and how often that is halved until densities are finite.
_POINTS = 2
_SPREAD = 0.1
_TRIALS = 8
# What a model raises far from its posterior.
_ERRORS = (ArithmeticError, RuntimeError, ValueError)


def _default_batch_size(dim: int, elements: int) -> int:
    """The particles of a batch for a number of latents, and of elements of the model's sites."""
    many, few = _BATCH_SIZES
    return many if dim <= _FEW and many * elements <= _MAX_ELEMENTS else few


class LogDensity:
    r"""
    The log joint density of a Pyro model and its data,

        :math:`\log p(\mathbf{x}, T(\mathbf{z})) + \log |\det \partial T / \partial \mathbf{z}|,`

    as a function of flat unconstrained latents :math:`\mathbf{z} \in \mathbb{R}^d`, which the bijections T of torch's
    ``biject_to`` map to the supports of the model's sites.

    A batch of points is evaluated at once; its rows are called particles. The model is run once through Pyro's
    handlers, with the particles in a plate outside of its own plates. Its torch operations and those of the gradient
    are recorded as a graph, which then runs without Pyro. The graph is compiled in another process once that is
    worthwhile, while it already runs, and the compiled graph is kept on disk. Sites that are marked for parallel
    enumeration are summed out. The indices of subsampled plates are drawn anew for each call. Elements of latents that
    the model masks, and on which nothing in it depends, are left out.

    At the beginning, and after ever more calls, the graph is compared with Pyro's handlers at fresh points, and a row
    of a batch with the same particle alone. A model that cannot run with particles in a plate (one that indexes
    ``theta[group]`` in place of ``theta[..., group]``, say) is mapped by ``torch.vmap``, or else run one particle at a
    time, which is many times slower. Latents indexed by an enumerated site need Pyro's ``Vindex``, as
    ``Vindex(theta.unsqueeze(-2))[..., k]``. A model that cannot be recorded as a graph is run by the handlers: its
    control flow depends on values, it draws random numbers, or it has parameters. :attr:`backend` and :attr:`reason`
    tell.

    Example usage:

    >>> def model(x):
    ...     scale = pyro.sample("scale", dist.LogNormal(0., 1.))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("x", dist.Normal(0., scale), obs=x)
    >>> log_density = LogDensity(model, torch.tensor([0.5, -1.5]))
    >>> value, gradient = log_density.value_and_gradient(torch.zeros(7, 1))
    >>> value.shape, gradient.shape, log_density.backend
    (torch.Size([7]), torch.Size([7, 1]), 'graph')

    NUTS with this density; :meth:`constrain` maps its draws back to the supports of the sites::

        nuts = NUTS(potential_fn=log_density.potential)
        mcmc = MCMC(nuts, num_samples=1000, initial_params={"z": log_density.start})
        mcmc.run()
        draws = log_density.constrain(mcmc.get_samples()["z"])

    :ivar int dim: the number d of latents.
    :ivar Tensor start: a point of finite density to start from, usually the prior's median, with shape ``(d,)``.
    :ivar str backend: the way in which the latest call was evaluated: "compiled", "graph" or "handlers".
    :ivar str particles: the way in which a batch is evaluated: "plate", "vmap" or "one by one".

    :param callable model: a Pyro model with continuous latents, or with discrete ones that are enumerated.
    :param args: positional arguments of the model.
    :param compile: "auto" to compile once the evaluations have taken some seconds; True to do it now, and to wait for
        it; False for no compilation.
    :param batch_size: how many particles are evaluated at a time, by default 64 with up to 200 latents, and 32 with
        more or many data; batches of other sizes are divided and filled up.
        A single particle is evaluated alone.
    :param kwargs: keyword arguments of the model; pass arguments with one of the names above by position.
    :raises ValueError: for a model without continuous latents, with discrete ones that are not marked for enumeration,
        with data that are not finite or outside of their support, and where the support of a site depends on other
        latents or has no bijection.
    :raises NotImplementedError: for latents in a subsampled plate.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *args: Any,
        compile: bool | str = "auto",
        batch_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        if compile not in (True, False, "auto"):
            raise ValueError(f"compile must be True, False or 'auto', but got {compile!r}")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, but got {batch_size}")
        self._density = ModelDensity(model, args, kwargs)
        self.dim, self.start = self._density.dim, self._density.start
        self._dtype, self._device = self.start.dtype, self.start.device
        self._compile, self._spread = compile, _SPREAD
        self._runners: dict[int, Callable[..., tuple[Tensor, Tensor]]] = {}
        self._distrusted = False  # a graph was found wrong
        self.backend = "handlers"
        self._reasons: list[str] = []
        self._calls, self._next_check = 0, _FIRST_CHECK
        with torch.inference_mode(False), torch.random.fork_rng(devices=[]), pyro.validation_enabled(False):
            self._function: Callable[..., Tensor] = self._density.one_by_one
            self.particles, self._function = self._choose()
            self._size = _default_batch_size(self.dim, self._density.elements) if batch_size is None else batch_size
            self._settle()
        if compile is True and self.backend != "compiled":
            warnings.warn(f"compile=True has no effect, as {self.reason}", stacklevel=2)

    @property
    def reason(self) -> str:
        """The reasons why no faster way of evaluation is possible, as clauses; empty if there are none."""
        failures = {each.failure for each in self._runners.values() if isinstance(each, _Tiered) and each.failure}
        return "; ".join([*self._reasons, *(f"its graph cannot be compiled ({failure})" for failure in failures)])

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The unconstrained parameters of the model, by name."""
        return self._density.parameters

    @property
    def model(self) -> ModelDensity:
        """The model, of whose density this is a faster form."""
        return self._density

    @property
    def subsamples(self) -> dict[str, tuple[int, int]]:
        """The size of each subsampled plate and that of its subsamples, by name."""
        return self._density.subsamples

    @property
    def sites(self) -> list[str]:
        """The names of the latent sites, in the order of their elements."""
        return list(self._density.sites)

    @property
    def observes(self) -> bool:
        """False if the model observes no data, so that its posterior is its prior."""
        return self._density.observes

    @property
    def masks(self) -> bool:
        """True if some elements of the sites are left out, as the model masks them."""
        return bool(self._density.masked)

    def _points(self, count: int) -> Tensor:
        return self.start + self._spread * torch.randn(count, self.dim).to(self.start)

    def _check_supports(self, points: Tensor, subsamples: list[Tensor]) -> None:
        for point in points:
            name = self._density.moving_support(point, *subsamples)
            if name is not None:
                raise ValueError(
                    f"the support of site {name!r} depends on other latents, so that no fixed bijection leads to it; "
                    "sample an element of a fixed support instead and transform it"
                )

    @torch.no_grad()
    def _alone(self, points: Tensor, subsamples: list[Tensor]) -> Tensor:
        """The densities of particles alone, -inf where the model cannot be evaluated."""
        values = []
        for point in points:
            try:
                values.append(self._density.of_one(point, *subsamples))
            except _ERRORS:
                values.append(point.new_full((), -math.inf))
        return torch.stack(values)

    def _choose(self) -> tuple[str, Callable[..., Tensor]]:
        """The fastest way of evaluating a batch that gives each particle the density that it has alone."""
        density, subsamples = self._density, self._density.draw_subsamples()
        for _ in range(_TRIALS):
            points = self._points(_POINTS)
            alone = self._alone(points, subsamples)
            if bool(alone.isfinite().all()):
                break
            self._spread /= 2
        else:
            density.of_one(self.start, *subsamples)  # whose error tells more, if there is one
            self._reasons.append("densities near the start are not finite, so that no faster way could be checked")
            return "one by one", density.one_by_one
        self._check_supports(points, subsamples)
        again, _ = self._differentiate(points, *subsamples)
        if not _agree(again, alone):
            self._reasons.append("the model is random: two evaluations at one point differ")
            return "one by one", density.one_by_one
        ways = {"plate": density.of_particles, "vmap": density.mapped}
        for name, function in ways.items():
            try:
                together = function(points, *subsamples)
            except Exception as error:
                difference = f"{type(error).__name__}: {error}".splitlines()[0]
            else:
                if _agree(together, alone):
                    return name, function
                difference = "particles are mixed: reduce single dimensions, as sum(-1) does"
            if not self._reasons:
                self._reasons.append(f"the model allows no plate of particles ({difference})")
        return "one by one", density.one_by_one

    def _differentiate(self, z: Tensor, *subsamples: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            value = self._function(z, *subsamples)
            (gradient,) = torch.autograd.grad(value.sum(), z)
        usable = value.detach() > -math.inf  # and no NaN
        return value.detach().where(usable, -math.inf), gradient.where(usable.unsqueeze(-1), 0.0)

    def _runner(self, size: int) -> Callable[..., tuple[Tensor, Tensor]]:
        """Evaluates batches of a size: by their graph, which is made at the first use, or by the handlers."""
        if size not in self._runners:
            self._runners[size] = self._differentiate
            if self._distrusted:
                return self._differentiate
            try:
                graph = self._traced(size)
            except Untraceable as error:
                self._fall_back(f"the model {error}")
            else:
                self._runners[size] = graph
                self.backend = graph.backend
        return self._runners[size]

    def _settle(self) -> None:
        """Sets the size of batches, and makes their graph."""
        self.batch_size = 1 if self.particles == "one by one" else self._size
        self._runner(self.batch_size)
        if self.particles == "one by one" and self.backend != "handlers":
            self._map_graph(self._size)

    def _fall_back(self, reason: str) -> None:
        if reason not in self._reasons:
            self._reasons.append(reason)
        self.backend = "handlers"

    def _map_graph(self, size: int) -> None:
        """
        Maps the graph of one particle by ``torch.vmap``, which some of Pyro's handlers do not allow, such as those of
        enumeration. The graph holds none.
        """
        alone, in_dims = self._runners[1], (0, *(None,) * len(self.subsamples))

        def of_row(row: Tensor, *subsamples: Tensor) -> tuple[Tensor, Tensor]:
            value, gradient = alone(row.unsqueeze(0), *subsamples)
            return value.squeeze(0), gradient.squeeze(0)

        try:
            graph = self._traced(size, torch.vmap(of_row, in_dims))
        except Untraceable:
            return
        self._runners[size], self.batch_size = graph, size
        self.particles, self.backend = "vmap", graph.backend

    def _traced(self, size: int, function: Callable[..., tuple[Tensor, Tensor]] | None = None) -> _Tiered:
        if self.parameters:
            raise Untraceable(f"has parameters ({', '.join(self.parameters)}), which a graph would freeze")
        subsamples = self._density.draw_subsamples()
        graph = capture(function or self._differentiate, [self._points(size), *subsamples])
        points = self._points(size)
        try:
            pairs = list(zip(graph(points, *subsamples), self._differentiate(points, *subsamples), strict=True))
        except _ERRORS as error:
            raise Untraceable(f"has a graph that fails at other points ({type(error).__name__})") from error
        if not all(_agree(ours, theirs) for ours, theirs in pairs):
            raise Untraceable(
                "has a graph that is wrong at other points, as its control flow depends on values or on random numbers"
            )
        if not bool(pairs[0][0].isfinite().any()):
            raise Untraceable("has no finite density near the start, at which its graph could be checked")
        return _Tiered(graph, [points, *subsamples], self._compile)

    def __call__(self, z: Tensor) -> Tensor:
        """
        Evaluates the log density. It can be differentiated once.

        :param Tensor z: with shape ``(*, d)``.
        :return: with shape ``(*,)``; -inf where the model cannot be evaluated.
        """
        if self.parameters and torch.is_grad_enabled():  # which have gradients, too
            rows = self._rows(z)
            with pyro.validation_enabled(False):
                return self._function(rows, *self._density.draw_subsamples()).view(z.shape[:-1])
        return _WithGradient.apply(z, self)

    def value_and_gradient(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """
        Evaluates the log density and its gradient.

        :param Tensor z: with shape ``(*, d)``.
        :return: the log density with shape ``(*,)``, and its gradient with shape ``(*, d)``, without gradients of their
            own. Where the model cannot be evaluated they are -inf and zero.
        """
        rows = self._rows(z.detach())
        subsamples = self._density.draw_subsamples()
        value, gradient = self._evaluate_all(rows, subsamples)
        self._calls += 1
        if self._calls == self._next_check and len(rows):
            self._next_check *= 2
            if not self._compare(rows, value, 1, subsamples):
                value, gradient = self._evaluate_all(rows, subsamples)
        return (value, gradient) if z.dim() == 2 else (value.view(z.shape[:-1]), gradient.view(z.shape))

    def _evaluate_all(self, rows: Tensor, subsamples: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Evaluates any number of particles, in batches that are filled up."""
        if len(rows) in (1, self.batch_size):
            return self._evaluate(rows, subsamples)
        if len(rows) == 0:
            return rows.new_zeros(0), rows
        padding = rows[:1].expand(-len(rows) % self.batch_size, -1)
        parts = torch.cat([rows, padding]).split(self.batch_size)
        results = zip(*(self._evaluate(part, subsamples) for part in parts), strict=True)
        value, gradient = (torch.cat(each)[: len(rows)] for each in results)
        return value, gradient

    def check(self, z: Tensor) -> bool:
        """
        Compares the densities of a few particles of a batch with those of the same particles alone, by Pyro's handlers.
        If they differ, all further calls go a slower way, with a warning; :attr:`reason` tells. The start alone cannot
        show a model whose control flow depends on the values of all particles.

        :param Tensor z: with shape ``(*, d)``.
        :return: True if they agree.
        """
        rows, subsamples = self._rows(z.detach()), self._density.draw_subsamples()
        if not len(rows):
            return True
        value, _ = self._evaluate_all(rows, subsamples)
        return self._compare(rows, value, _CHECKED, subsamples)

    def fault(self, z: Tensor) -> str:
        """
        Tells in a clause what is not finite at a point.

        :param Tensor z: with shape ``(d,)``, where the density or its gradient is not finite.
        """
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]), pyro.validation_enabled(False):
                names = self._density.infinite_sites(z, *self._density.draw_subsamples())
        except _ERRORS as error:
            return f"the model raises {type(error).__name__} ({str(error).splitlines()[0] if str(error) else ''})"
        sites = ", ".join(map(repr, names))
        return f"log_prob of site {sites} is not finite" if names else "the gradient is not finite"

    def _rows(self, z: Tensor) -> Tensor:
        if z.dim() == 0 or z.shape[-1] != self.dim:
            raise ValueError(f"z must have shape (*, {self.dim}), but got {tuple(z.shape)}")
        if z.dtype != self._dtype or z.device != self._device:
            raise ValueError(
                f"z must be {self._dtype} on {self._device}, as the latents of the model are, but got "
                f"{z.dtype} on {z.device}; convert it with .to(log_density.start)"
            )
        return (z if z.dim() == 2 else z.reshape(-1, self.dim)).contiguous()

    def _evaluate(self, rows: Tensor, subsamples: list[Tensor]) -> tuple[Tensor, Tensor]:
        runner = self._runners.get(len(rows)) or self._prepared(len(rows))
        try:
            if isinstance(runner, _Tiered):
                value, gradient = runner(rows, *subsamples)
                self.backend = runner.backend
            else:
                self.backend = "handlers"
                with torch.inference_mode(False), pyro.validation_enabled(False):
                    value, gradient = runner(rows.clone(), *subsamples)
            return value, gradient
        except _ERRORS:
            if len(rows) == 1:
                return torch.full_like(rows[:, 0], -math.inf), torch.zeros_like(rows)
            values, gradients = zip(*(self._evaluate(row, subsamples) for row in rows.split(1)), strict=True)
            return torch.cat(values), torch.cat(gradients)

    def _prepared(self, size: int) -> Callable[..., tuple[Tensor, Tensor]]:
        with torch.inference_mode(False), torch.random.fork_rng(devices=[]), pyro.validation_enabled(False):
            return self._runner(size)

    def _compare(self, rows: Tensor, values: Tensor, count: int, subsamples: list[Tensor]) -> bool:
        """Compares results of the first particles with Pyro's handlers for each alone; falls back if they differ."""
        if self.backend == "handlers" and self.particles != "plate":
            return True
        values = values[:count]
        with torch.no_grad(), torch.random.fork_rng(devices=[]), pyro.validation_enabled(False):
            alone = self._alone(rows[:count], subsamples)
            if _agree(values, alone) or self._is_rounding(values, rows[:count], alone, subsamples):
                return True
            mixed = self.particles == "plate" and not self._agree_together(rows, alone, subsamples)
        if mixed:
            reason = "the density of a particle depends on those next to it, by control flow or a reduction over all"
            self.separate(reason)
            way = "with particles by vmap" if self.particles == "vmap" else "one particle at a time"
        else:
            k = int((values - alone).abs().nan_to_num(math.inf).argmax())
            reason = f"after {self._calls} calls its graph gave {values[k]:.6g} for a density of {alone[k]:.6g}"
            self._runners, self._distrusted = {}, True
            self._fall_back(reason)
            way = "by Pyro's handlers"
        warnings.warn(f"LogDensity goes on {way}: {reason}", stacklevel=3)
        return False

    def _is_rounding(self, values: Tensor, rows: Tensor, alone: Tensor, subsamples: list[Tensor]) -> bool:
        """True if rounding of the latents by some units in the last place changes densities as much."""
        moved = self._alone(rows * (1 - _ROUNDING * torch.finfo(rows.dtype).eps), subsamples)
        near = (values - alone).abs() <= 10 * (moved - alone).abs()
        return bool((near | (values == alone)).all())

    def _agree_together(self, rows: Tensor, alone: Tensor, subsamples: list[Tensor]) -> bool:
        try:
            return _agree(self._function(rows[: self.batch_size], *subsamples)[: len(alone)], alone)
        except _ERRORS:
            return True  # of another particle: nothing is known

    def separate(self, reason: str) -> None:
        """
        Gives up the plate of particles: from now on they are evaluated one by one, or by ``torch.vmap`` if a particle
        alone can be recorded as a graph.

        :param str reason: the reason, as a clause.
        """
        self._reasons.append(reason)
        self.particles, self._function, self._runners = "one by one", self._density.one_by_one, {}
        with torch.inference_mode(False), torch.random.fork_rng(devices=[]), pyro.validation_enabled(False):
            self._settle()

    def potential(self, params: Mapping[str, Tensor]) -> Tensor:
        """
        The negative log density, as the argument ``potential_fn`` of Pyro's HMC and NUTS.

        :param params: the latents with shape ``(d,)``, under the name "z".
        """
        return -self(params["z"])

    def constrain(self, z: Tensor) -> dict[str, Tensor]:
        """
        Maps latents to the supports of their sites. Elements that the model masks keep their values at
        :attr:`start`.

        :param Tensor z: with shape ``(*, d)``.
        :return: values by site, with the shapes of the sites after ``*``.
        """
        batch = z.shape[:-1]
        values, _ = self._density.unpack(self._rows(z))
        sites = self._density.sites
        return {name: value.reshape(batch + sites[name]["value"].shape) for name, value in values.items()}

    def unconstrain(self, values: Mapping[str, Tensor]) -> Tensor:
        """
        The inverse of :meth:`constrain`.

        :param values: by site, with the shapes of the sites after those of a batch.
        :return: with shape ``(*, d)``.
        """
        return self._density.pack(values)


class _WithGradient(torch.autograd.Function):
    """The density with the gradient that was computed along with it."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, log_density: LogDensity) -> Tensor:
        value, gradient = log_density.value_and_gradient(z)
        ctx.save_for_backward(gradient)
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, bar: Tensor) -> tuple[Tensor, None]:
        return bar.unsqueeze(-1) * ctx.saved_tensors[0], None


class _Tiered:
    """A graph that is replaced by a compiled one once that is worthwhile and there is one."""

    def __init__(self, graph: GraphModule, inputs: list[Tensor], compile: bool | str) -> None:
        self._graph, self._inputs = graph, inputs
        self._function: Callable[..., Any] = graph
        self._seconds = 0.0
        self.backend, self.failure = "graph", ""
        self._compilation = Compilation(graph, inputs) if compile else None
        if compile is True:
            self._replace(wait=True)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        if self._compilation is None:
            value, gradient = self._function(*inputs)
            return value, gradient
        begin = time.perf_counter()
        value, gradient = self._function(*inputs)
        self._seconds += time.perf_counter() - begin
        if self._seconds > _WORTH_LOADING:
            self._replace()
        return value, gradient

    def _replace(self, wait: bool = False) -> None:
        compilation = self._compilation
        assert compilation is not None
        worthwhile = wait or self._seconds > _WORTH_COMPILING
        if not compilation.started and worthwhile and not compilation.exists:
            compilation.start(nice=not wait)
        function = compilation.result(wait)
        if function is not None:
            with torch.no_grad():
                pairs = zip(function(*self._inputs), self._graph(*self._inputs), strict=True)
                if all(_agree(ours, theirs) for ours, theirs in pairs):
                    self._function, self.backend = function, "compiled"
                else:
                    compilation.failure = "the compiled graph gives other results"
        if function is not None or compilation.failure:
            self.failure = compilation.failure
            self._compilation = None


def _agree(ours: Tensor, theirs: Tensor) -> bool:
    """True for results that are equal up to rounding, and finite at the same places."""
    finite = theirs.isfinite()
    if not torch.equal(ours.isfinite(), finite):
        return False
    size = theirs[finite].abs().max() if bool(finite.any()) else 0.0
    return torch.allclose(ours[finite], theirs[finite], _TOLERANCE, _TOLERANCE * float(1.0 + size))
