# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Flows in the units of the data that they are fitted to."""

from __future__ import annotations

from typing import Any

from pyro.distributions import TransformModule, constraints
from pyro.distributions.conditional import ConditionalTransform, ConditionalTransformModule
from pyro.distributions.util import copy_docs_from
from torch import Tensor
from torch.distributions import Transform
from typing_extensions import Self

from pyro_hollow.nn.standardization import Standardization, location_and_scale

from .cache import CachedTransform, breaks_graph, module_tensors

__all__ = [
    "ConditionalStandardizedFlow",
    "ConditionedStandardizedFlow",
    "StandardizedFlow",
    "standardized",
]


class ConditionedStandardizedFlow(CachedTransform):
    r"""
    A flow behind which a fixed affine map goes from standard units to those of the data,

        :math:`\mathbf{y} = \mathbf{l} + \mathbf{s} \odot T(\mathbf{x}), \qquad \log\left|\det\frac{\partial\mathbf{y}}
        {\partial\mathbf{x}}\right| = \log\left|\det\frac{\partial T}{\partial\mathbf{x}}\right| + \sum_i \log s_i`

    with its context, if any, fixed, as :meth:`ConditionalStandardizedFlow.condition` returns it. It costs no more
    solves than the flow, and keeps no results but the latest pair of output and standardised output, for the flow to
    recognise in its own cache.

    :param flow: the transform T of vectors.
    :param Standardization units: the location l and the scale s.
    """

    def __init__(self, flow: Transform, units: Standardization) -> None:
        super().__init__(cache_size=getattr(flow, "_cache_size", 0))
        self.flow: Any = flow
        self.units = units

    @property
    def sign(self) -> int:
        """The sign of the flow's Jacobian determinant."""
        return self.flow.sign

    def __call__(self, x: Tensor) -> Tensor:
        return self._to_y(self.flow(x))

    def _inv_call(self, y: Tensor) -> Tensor:
        return self.flow.inv(self._to_z(y))

    def _inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        x, ladj = self.flow.inv.call_and_ladj(self._to_z(y))
        return x, self.units.log_scale() - ladj

    def _call(self, x: Tensor) -> Tensor:
        """
        :param x: the input into the bijection
        :type x: torch.Tensor

        Invokes the bijection x=>y, past the cache.
        """
        return self.units.inverse(self.flow._call(x))

    def _inverse(self, y: Tensor) -> Tensor:
        """
        :param y: the output of the bijection
        :type y: torch.Tensor

        Inverts y => x, past the cache.
        """
        return self.flow._inverse(self.units(self._checked(y)))

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """
        Calculates the logarithm of the absolute value of the determinant of the Jacobian, as the flow does.

        :param Tensor x: the input with shape ``(*, d)``.
        :param Tensor y: the output for that input, in the units of the data.
        :returns: the log-determinant with shape ``(*,)``.
        """
        z = self._to_z(y)
        return self.flow.log_abs_det_jacobian(x, z) + self.units.log_scale()

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """
        Value and log-determinant together.

        :param Tensor x: the input with shape ``(*, d)``.
        :returns: y with shape ``(*, d)``, in the units of the data, and the log-determinant with shape ``(*,)``.
        """
        both = getattr(self.flow, "call_and_ladj", None)
        z, ladj = both(x) if both else (z := self.flow(x), self.flow.log_abs_det_jacobian(x, z))
        return self._to_y(z), ladj + self.units.log_scale()

    def call_and_score(self, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r"""
        Value, log-determinant and score together, where the flow has this method.

        :param Tensor x: the input with shape ``(*, d)``.
        :param Tensor score: the gradient of the log-density of x, with shape ``(*, d)``.
        :returns: y, the log-determinant, and the gradient of the log-density of y at y, which has no gradient itself.
        """
        z, ladj, score = self.flow.call_and_score(x, score)
        return self._to_y(z), ladj + self.units.log_scale(), score / self.units.scale

    def clear_cache(self) -> None:
        """Forgets the latest pair, and the flow's."""
        super().clear_cache()
        self.flow.clear_cache()

    def with_cache(self, cache_size: int = 1) -> Self:
        """
        A transform that shares flow and units.

        :param int cache_size: 0 or 1.
        """
        flow = self.flow.with_cache(cache_size)
        return self if flow is self.flow else type(self)(flow, self.units)

    def _checked(self, y: Tensor) -> Tensor:
        if y.dtype != self.units.loc.dtype or y.device != self.units.loc.device:
            raise ValueError(
                f"input is {y.dtype} on {y.device}, but the flow's units are {self.units.loc.dtype} on "
                f"{self.units.loc.device}; convert one of them with .to()"
            )
        return y

    # The pairs of the cache are those of the affine map alone, of z = T(x) and y.

    @breaks_graph
    def _to_y(self, z: Tensor) -> Tensor:
        if (pair := self._lookup(x=z)) is not None:
            return pair.y
        y = self.units.inverse(z)
        self._store(z, y, ())
        return y

    @breaks_graph
    def _to_z(self, y: Tensor) -> Tensor:
        if (pair := self._lookup(y=y)) is not None:
            return pair.x
        z = self.units(self._checked(y))
        self._store(z, y, (), from_inverse=True)
        return z

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.units.loc, self.units.scale


@copy_docs_from(TransformModule)
class StandardizedFlow(ConditionedStandardizedFlow, TransformModule):
    r"""
    A flow in the units of the data that it is fitted to; :func:`standardized` makes one from the data, this class from
    location and scale. They are buffers: saved with the state, moved and converted with the module, and not trained.

    Example usage, with the state of a flow whose data are not at hand:

    >>> x = 1e-4 * torch.randn(100, 2)
    >>> state = standardized(hollow_cnf(2), x).state_dict()
    >>> flow = StandardizedFlow(hollow_cnf(2), torch.zeros(2), torch.ones(2))
    >>> flow.load_state_dict(state)
    <All keys matched successfully>

    :param flow: a transform of vectors, which is a module; any of this package, or of Pyro.
    :param Tensor loc: the location of the data, with shape ``(d,)``.
    :param Tensor scale: the scale of the data, with shape ``(d,)``.
    :raises ValueError: for a flow that waits for its context, other shapes or types, values that are not finite, and
        scales that are not positive.
    """

    def __init__(self, flow: TransformModule, loc: Tensor, scale: Tensor) -> None:
        if isinstance(flow, ConditionalTransform):
            raise ValueError("flow must take no context; ConditionalStandardizedFlow is for one that does")
        super().__init__(flow, _units(flow, "", "input_dim", loc, scale))

    def with_cache(self, cache_size: int = 1) -> Self:
        """
        A transform that shares flow and units.

        :param int cache_size: 0 or 1.
        """
        flow = self.flow.with_cache(cache_size)
        if flow is self.flow:
            return self
        sibling = type(self)(flow, self.units.loc, self.units.scale)
        sibling.units = self.units
        return sibling


@copy_docs_from(ConditionalTransformModule)
class ConditionalStandardizedFlow(ConditionalTransformModule):
    r"""
    A flow with context in the units of the data and of the context that it is fitted to,

        :math:`\mathbf{y} = \mathbf{l} + \mathbf{s} \odot T\!\left(\mathbf{x}; \frac{\mathbf{c} - \mathbf{l}_c}
        {\mathbf{s}_c}\right)`

    see :class:`StandardizedFlow`. :func:`standardized` makes one from the data.

    :param flow: a conditional transform of vectors; any of this package, or of Pyro.
    :param Tensor loc: the location of the data, with shape ``(d,)``.
    :param Tensor scale: the scale of the data, with shape ``(d,)``.
    :param Tensor context_loc: the location of the context, with shape ``(context_dim,)``; None to leave the context as
        it is.
    :param Tensor context_scale: the scale of the context, likewise.
    :raises ValueError: for a flow without context, other shapes or types, values that are not finite, scales that are
        not positive, and a location of the context without its scale.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(
        self,
        flow: ConditionalTransformModule,
        loc: Tensor,
        scale: Tensor,
        context_loc: Tensor | None = None,
        context_scale: Tensor | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(flow, ConditionalTransform):
            raise ValueError("flow must take a context; StandardizedFlow is for one that does not")
        if (context_loc is None) != (context_scale is None):
            raise ValueError("context_loc and context_scale must both be given, or neither")
        self.flow = flow
        self.units = _units(flow, "", "input_dim", loc, scale)
        self.context_units = (
            None
            if context_loc is None or context_scale is None
            else _units(flow, "context_", "context_dim", context_loc, context_scale)
        )

    def condition(self, context: Tensor) -> ConditionedStandardizedFlow:
        """
        Conditions on a context variable, returning a non-conditional transform.

        :param Tensor context: the context with shape ``(*, context_dim)``, in its own units.
        :raises ValueError: if the context has another size or type.
        """
        if self.context_units is not None:
            loc = self.context_units.loc
            if context.dim() == 0 or context.shape[-1] != len(loc):
                raise ValueError(f"context must have shape (*, {len(loc)}), but got {tuple(context.shape)}")
            if context.dtype != loc.dtype:
                raise ValueError(
                    f"context is {context.dtype}, but the flow {loc.dtype}; convert one of them with .to()"
                )
            context = self.context_units(context)
        return ConditionedStandardizedFlow(self.flow.condition(context), self.units)


def _check(flow: Any, name: str, size: str, value: Tensor) -> None:
    """Refuses what does not fit the flow, whose size is an attribute of its own or of its network, if any."""
    expected = getattr(flow, size, getattr(getattr(flow, "nn", None), size, None))
    if isinstance(expected, int) and value.shape[-1] != expected:
        raise ValueError(
            f"{name} must have a last dimension of size {expected} as the flow has, but got {value.shape[-1]}"
        )
    floating = next((p for p in module_tensors(flow) if p.is_floating_point()), value)
    if (floating.dtype, floating.device) != (value.dtype, value.device):
        raise ValueError(
            f"{name} is {value.dtype} on {value.device}, but the flow {floating.dtype} on {floating.device}; convert "
            "one of them with .to()"
        )


def _units(flow: Any, prefix: str, size: str, loc: Tensor, scale: Tensor) -> Standardization:
    if loc.dim() != 1 or not loc.is_floating_point():
        raise ValueError(
            f"{prefix}loc must be of a floating-point type with shape (d,), but got {loc.dtype}, {tuple(loc.shape)}"
        )
    _check(flow, f"{prefix}loc", size, loc)
    units = Standardization(loc)
    units.set(loc, scale)
    return units


def standardized(
    flow: TransformModule | ConditionalTransformModule, x: Tensor, context: Tensor | None = None
) -> StandardizedFlow | ConditionalStandardizedFlow:
    """
    A flow in the units of the data that it is fitted to: it standardises data and context by mean and standard
    deviation of each column, whatever their scales and origins, so that fits of x and of :math:`c x + b` are the same
    fit and their log-densities differ by :math:`d \\log c`.

    The result takes the place of the flow, in distributions and for optimizers. It shares the flow's parameters, and
    what is set on the flow, such as its solver, holds for both.

    Example usage:

    >>> x = torch.randn(1000, 2) * 1e-4 + 3.
    >>> flow = standardized(hollow_cnf(2), x)
    >>> flow_dist = dist.TransformedDistribution(dist.Normal(torch.zeros(2), 1.).to_event(1), [flow])
    >>> flow_dist.log_prob(x).mean() > 10
    tensor(True)
    >>> context = torch.randn(1000, 3) * torch.tensor([1., 1e6, 1e-6])
    >>> flow = standardized(conditional_hollow_cnf(2, 3), x, context)
    >>> base_dist = dist.Normal(torch.zeros(1000, 2), 1.).to_event(1)
    >>> dist.ConditionalTransformedDistribution(base_dist, [flow]).condition(context).log_prob(x).shape
    torch.Size([1000])

    :param flow: a transform of vectors, which is a module, or a conditional one; any of this package, or of Pyro.
    :param Tensor x: the data with shape ``(n, d)``, or more batch dimensions.
    :param Tensor context: the contexts with shape ``(m, context_dim)``, for a conditional flow alone. A column that is
        constant is centred. Use :class:`ConditionalStandardizedFlow` to leave the context as it is, such as one that an
        encoder learns.
    :raises ValueError: for a missing context or one too many, integers, other shapes or types than the flow's, no
        samples, values that are not finite, and a column of x that is constant, which has no density.
    """
    conditional = isinstance(flow, ConditionalTransform)
    if conditional and context is None:
        raise ValueError(
            "context is missing for a flow that takes one; to leave it as it is, use ConditionalStandardizedFlow"
        )
    if not conditional and context is not None:
        raise ValueError("context is given, but the flow takes none")
    units = location_and_scale("x", x)
    _check(flow, "x", "input_dim", x)
    if context is None:
        return StandardizedFlow(flow, *units)
    context_units = location_and_scale("context", context, allow_constant=True)
    _check(flow, "context", "context_dim", context)
    return ConditionalStandardizedFlow(flow, *units, *context_units)
