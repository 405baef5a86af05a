# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""The cache of all transforms here: the latest input and output, together with their log-determinant."""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter, is_, is_not
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from pyro.distributions import constraints
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.distributions import Transform
from torch.distributions.transforms import _InverseTransform
from typing_extensions import Self

__all__ = ["CachedTransform", "Pair", "PairCache", "breaks_graph", "module_tensors"]

_P = ParamSpec("_P")
_T = TypeVar("_T")

# Generators and comprehensions are avoided where a cache is asked: each of their items is a call of Python.
_STATE = attrgetter("_version", "requires_grad", "dtype", "device")
_IS_SOMETHING: Any = functools.partial(is_not, None)


def breaks_graph(method: Callable[_P, _T]) -> Callable[_P, _T]:
    """Has torch.compile break its graph around a method and run that as it is: the steps depend on values."""
    # torch.compiler.disable would import torch._dynamo at once, which takes longer than all else that is imported.
    disabled = _disable_dynamo(method)

    @functools.wraps(method)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        return disabled(*args, **kwargs) if torch.compiler.is_dynamo_compiling() else method(*args, **kwargs)

    return call


def module_tensors(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers, in a fraction of the time that Module takes to name them."""
    tensors: list[Tensor] = []
    modules = [module]
    for each in modules:
        tensors += filter(_IS_SOMETHING, each._parameters.values())
        tensors += filter(_IS_SOMETHING, each._buffers.values())
        modules += filter(_IS_SOMETHING, each._modules.values())
    return tensors


def _states(tensors: Sequence[Tensor]) -> list[tuple[Any, ...]]:
    """Version, requires_grad, type and device of each: Module.to() changes the last two without a new version."""
    try:
        return list(map(_STATE, tensors))
    except RuntimeError:  # tensors made in inference mode have no version
        return [(-1 if t.is_inference() else t._version, t.requires_grad, t.dtype, t.device) for t in tensors]


class Pair(NamedTuple):
    """
    Input and output of a transform, and all that must not change for them to stay a pair.

    :ivar results: the log-determinant, or that from which it is computed, and what else the same evaluation gave.
    :ivar from_inverse: True if x was computed from y.
    :ivar tensors: the tensors on which the results depend, x and y among them.
    :ivar states: the state of each of them.
    :ivar settings: grad mode, and settings of the transform.
    :ivar reusable: False if changes of the tensors cannot be noticed, if the results must not leave a transform of
        torch.func, and after a backward pass.
    """

    x: Tensor
    y: Tensor
    results: tuple[Tensor, ...]
    from_inverse: bool
    tensors: list[Tensor]
    states: list[tuple[Any, ...]]
    settings: tuple[Any, ...]
    reusable: bool

    def depends_on(self, tensors: Sequence[Tensor]) -> bool:
        """True if the results depend on these tensors besides x and y, and none has changed."""
        now = [*tensors, self.x, self.y]
        return self.states == _states(now) and all(map(is_, self.tensors, now))


class PairCache:
    """
    Holds the latest pair of a transform until it is cleared, replaced, or spent by a backward pass.

    :param bool keeps_all: True to keep pairs that are not reusable, too.
    """

    def __init__(self, keeps_all: bool = False) -> None:
        self._keeps_all = keeps_all
        self.latest: Pair | None = None

    def store(self, pair: Pair) -> None:
        """Keeps a pair in place of the latest one."""
        given, made = (pair.y, pair.x) if pair.from_inverse else (pair.x, pair.y)
        level = torch._C._functorch.maybe_current_level()
        if level is not None and torch._C._functorch.maybe_get_level(given) != level:
            # Within a transform of torch.func results are wrapped, even for an input that outlives it.
            pair = pair._replace(reusable=False)
        self.latest = pair if pair.reusable or self._keeps_all else None
        # A second backward pass through the pair's graph would fail. The hook must not keep the cache alive.
        reference = weakref.ref(self)

        def spend(gradients: tuple[Tensor, ...]) -> None:
            if (cache := reference()) is not None:
                cache.spend()

        # Hooks of nodes cost less than those of tensors, and results of one node need but one.
        for node in {tensor.grad_fn for tensor in (made, *pair.results)}:
            if node is not None:
                node.register_prehook(spend)

    def spend(self) -> None:
        """Forgets the latest pair, whose graph a backward pass has freed, or marks it."""
        kept = self.latest if self._keeps_all else None
        self.latest = kept and kept._replace(reusable=False)

    def clear(self) -> None:
        """Forgets the latest pair."""
        self.latest = None


class _CachedInverse(_InverseTransform):
    """The inverse of a transform with a cache, which gives value and log-determinant together, too."""

    def call_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """
        Value and log-determinant of the inverse together.

        :param Tensor y: the input with shape ``(*, d)``.
        :returns: x with shape ``(*, d)`` and the log-determinant of its Jacobian with shape ``(*,)``.
        """
        assert isinstance(self._inv, CachedTransform)
        x, ladj = self._inv._inverse_and_ladj(y)
        return x, -ladj


class CachedTransform(Transform):
    """
    A transform of vectors that keeps its latest pair of input and output together with the log-determinant. A subclass
    says in :meth:`_transform`, :meth:`_invert` and :meth:`_ladj` what these are, in :meth:`_tensors` and
    :meth:`_settings` what they depend on.

    A pair is used only if x or y is the very tensor, and nothing that decides the result has changed: tensors by
    assignment, in place, in type, device or ``requires_grad``; settings; grad mode. It is dropped when it has been
    scored as data, after a backward pass, and in copies. Inference tensors are not used again, as their changes go
    unnoticed, and results of a transform of torch.func do not leave it.

    :param int cache_size: 0 or 1.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True
    _keeps_all = False

    def __init__(self, cache_size: int = 1) -> None:
        super().__init__(cache_size=cache_size)
        self._cache = PairCache(self._keeps_all)

    def _transform(self, x: Tensor) -> Sequence[Tensor]:
        """The value, and what :meth:`_ladj` takes of its evaluation; past the cache."""
        raise NotImplementedError

    def _invert(self, y: Tensor) -> Sequence[Tensor]:
        """The input that leads to y, and what :meth:`_ladj` takes of the map from there to y; past the cache."""
        raise NotImplementedError

    def _ladj(self, x: Tensor, results: Sequence[Tensor]) -> Tensor:
        """The log-determinant at x, given the results of its evaluation; by default it is the first of them."""
        return results[0]

    def _tensors(self) -> Sequence[Tensor]:
        """Tensors that decide the result besides the input."""
        raise NotImplementedError

    def _settings(self) -> tuple[Any, ...]:
        """Settings that decide the result besides tensors; they are told apart by identity."""
        return ()

    @property
    def sign(self) -> int:
        """The sign of the Jacobian determinant."""
        return +1

    @property
    def inv(self) -> _CachedInverse:
        """The inverse. Made anew each time: a stored one would form a cycle that keeps graphs alive."""
        return _CachedInverse(self)

    def __call__(self, x: Tensor) -> Tensor:
        return self._evaluate(x)[0]

    def _inv_call(self, y: Tensor) -> Tensor:
        return self._evaluate_inverse(y)[0]

    @breaks_graph
    def _evaluate(self, x: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """The value and its results, by the cache."""
        if (pair := self._lookup(x=x)) is not None:
            return pair.y, pair.results
        y, *results = self._transform(x)
        self._store(x, y, results)
        return y, results

    @breaks_graph
    def _evaluate_inverse(self, y: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """The input that leads to y and its results, by the cache."""
        if (pair := self._lookup(y=y)) is not None:
            return pair.x, pair.results
        x, *results = self._invert(y)
        self._store(x, y, results, from_inverse=True)
        return x, results

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """
        Value and log-determinant together.

        :param Tensor x: the input with shape ``(*, d)``.
        :returns: y with shape ``(*, d)`` and the log-determinant of its Jacobian with shape ``(*,)``.
        """
        y, results = self._evaluate(x)
        return y, self._ladj(x, results)

    def _inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """The input that leads to y, and the log-determinant of the map from there to y."""
        x, results = self._evaluate_inverse(y)
        return x, self._ladj(x, results)

    @breaks_graph
    def _call(self, x: Tensor) -> Tensor:
        """
        :param x: the input into the bijection
        :type x: torch.Tensor

        Invokes the bijection x=>y, past the cache.
        """
        return self._transform(x)[0]

    @breaks_graph
    def _inverse(self, y: Tensor) -> Tensor:
        """
        :param y: the output of the bijection
        :type y: torch.Tensor

        Inverts y => x, past the cache.
        """
        return self._invert(y)[0]

    @breaks_graph
    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """
        Calculates the logarithm of the absolute value of the determinant of the Jacobian, at no cost for the pair of
        the latest call and by a new evaluation for any other.

        :param Tensor x: the input with shape ``(*, d)``.
        :param Tensor y: the output for that input.
        :returns: the log-determinant with shape ``(*,)``.
        """
        if (pair := self._lookup(x=x, y=y)) is None:
            return self._ladj(x, self._transform(x)[1:])
        if pair.from_inverse:
            # log_prob has all it needs. When it scores the same data again, parameters may have changed unseen.
            self.clear_cache()
        return self._ladj(x, pair.results)

    def _lookup(self, x: Tensor | None = None, y: Tensor | None = None) -> Pair | None:
        """The latest pair, if the given tensors are its own and nothing that decides it has changed."""
        pair = self._cache.latest
        if pair is None or (x is not None and x is not pair.x) or (y is not None and y is not pair.y):
            return None
        if not (pair.reusable and pair.depends_on(self._tensors())):
            return None
        return pair if all(map(is_, pair.settings, (torch.is_grad_enabled(), *self._settings()))) else None

    def _store(self, x: Tensor, y: Tensor, results: Iterable[Tensor], from_inverse: bool = False) -> None:
        if not self._cache_size:
            return
        tensors = [*self._tensors(), x, y]
        settings = (torch.is_grad_enabled(), *self._settings())
        counted = not any(map(Tensor.is_inference, tensors))
        self._cache.store(Pair(x, y, tuple(results), from_inverse, tensors, _states(tensors), settings, counted))

    def clear_cache(self) -> None:
        """Forgets the latest pair."""
        self._cache.clear()

    def with_cache(self, cache_size: int = 1) -> Self:
        """
        A transform that shares the network.

        :param int cache_size: 0 or 1.
        :raises ValueError: for any other size.
        """
        if cache_size not in (0, 1):
            raise ValueError(f"cache_size must be 0 or 1, but got {cache_size}")
        if cache_size == self._cache_size:
            return self
        sibling = copy.copy(self)
        for name in ("_modules", "_parameters", "_buffers"):  # of a Module, whose registers would be shared
            if name in sibling.__dict__:
                sibling.__dict__[name] = sibling.__dict__[name].copy()
        sibling._cache_size = cache_size
        return sibling

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_cache": PairCache(self._keeps_all), "_inv": None}
