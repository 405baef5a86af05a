# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""The base class of vector fields, with derivatives by automatic differentiation."""

from __future__ import annotations

from torch import Tensor, nn

from .operators import field_derivatives
from .stepper import AutogradStepper, Stepper, Tableau

__all__ = ["VectorField"]


class VectorField:
    r"""
    A vector field :math:`f(t, x)` for one solve.

    A subclass defines :meth:`__call__`. Its derivatives come by automatic differentiation, at a cost that grows with d;
    a subclass that knows better overrides :meth:`dimwise_derivatives`, :meth:`with_divergence` or :meth:`stepper`.

    :ivar tensors: the tensors besides the state that gradients must reach; none of them depends on another.
    """

    tensors: tuple[Tensor, ...] = ()
    #: The number b of coordinates of a block, if the field gives the blocks of its Jacobian away by a method
    #: ``with_blocks(t, x)``; see :class:`~pyro_hollow.nn.HollowField`.
    block_dim = 1
    #: The module whose parameters an error of a solver may name, if known.
    network: nn.Module | None = None

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        """
        :param Tensor t: time, a scalar, or one per sample with a shape that broadcasts to ``(*,)``.
        :param Tensor x: the state with shape ``(*, d)``.
        :returns: :math:`f(t, x)` with shape ``(*, d)``.
        """
        raise NotImplementedError

    def dimwise_derivatives(self, t: Tensor, x: Tensor, order: int) -> tuple[Tensor, ...]:
        r"""
        The dimension-wise derivatives :math:`D^k f = (\partial^k f_1 / \partial x_1^k, \dots, \partial^k f_d /
        \partial x_d^k)`.

        :param Tensor t: time, a scalar, or one per sample with a shape that broadcasts to ``(*,)``.
        :param Tensor x: the state with shape ``(*, d)``.
        :param int order: the highest order k.
        :returns: ``(f, D1, ..., Dk)``, each with shape ``(*, d)``.
        """
        return field_derivatives(self.__call__, t, x, order)

    def with_divergence(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        r"""
        Field and divergence, for the log-determinant of a flow.

        :param Tensor t: time, a scalar, or one per sample with a shape that broadcasts to ``(*,)``.
        :param Tensor x: the state with shape ``(*, d)``.
        :returns: :math:`f(t, x)` with shape ``(*, d)`` and :math:`\nabla \cdot f = \sum_i \partial f_i / \partial x_i`
            with shape ``(*,)``.
        """
        dx, diagonal = self.dimwise_derivatives(t, x, 1)
        return dx, diagonal.sum(-1)

    def stepper(self, tableau: Tableau, state: tuple[Tensor, ...], compile: bool = False) -> tuple[Stepper, str]:
        r"""
        The fastest executor of Runge-Kutta steps of :math:`(x, \int \nabla \cdot f \, dt)`.

        :param Tableau tableau: the method.
        :param state: the parts of the state at the beginning; see :meth:`initial_state`.
        :param bool compile: whether it may be one of compiled code.
        :returns: the executor, and why it is not a faster one; empty if it is the fastest.
        """
        shapes = [part.shape for part in state]
        return AutogradStepper(tableau, self.augmented, shapes), "there is no derivative by hand for this field"

    def initial_state(self, x: Tensor) -> tuple[Tensor, ...]:
        """The state and zeros, where the integrals begin, for x with shape ``(*, d)``."""
        return x, x.new_zeros(x.shape[:-1])

    def augmented(self, t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """
        The time derivatives of :meth:`initial_state`'s parts: of x, and of the integral of the divergence.

        :param Tensor t: time, a scalar.
        :param state: the parts.
        :raises ValueError: for a field that returns other shapes.
        """
        x = state[0]
        f, divergence = self.with_divergence(t, x)
        if f.shape != x.shape or divergence.shape != x.shape[:-1]:  # which would broadcast
            raise ValueError(
                f"field must return shapes {tuple(x.shape)} and {tuple(x.shape[:-1])} for value and divergence, but "
                f"returned {tuple(f.shape)} and {tuple(divergence.shape)}"
            )
        return f, divergence
