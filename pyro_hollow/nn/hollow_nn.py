# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Hollow networks: vector fields whose divergence is exact and costs almost nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pyro_hollow.ops.arguments import closest_keywords
from pyro_hollow.ops.stepper import Stepper, Tableau, Unsupported
from pyro_hollow.ops.vector_field import VectorField

from .activations import ACTIVATIONS
from .arguments import check_block_dim
from .conditioner import CONDITIONERS, BoundConditioner, Conditioner
from .graph_conditioner import GraphConditioner
from .hollow_stepper import HollowStepper
from .native import NativeStepper
from .transformer import BoundTransformer, ClosedFormTransformer, ModuleTransformer, Transformer

__all__ = ["ConditionalHollowNN", "HollowField", "HollowNN"]


class HollowField(VectorField):
    r"""
    The vector field of a hollow network for one solve,

        :math:`f_i(t, x) = \tau_i(t, x_i, h_i), \qquad h_i = c_i(t, x_{-i})`,

    as :meth:`ConditionalHollowNN.bind` returns it: masked weights and the projected context are computed already.
    It shares the network's parameters as they were when it was bound; bind anew after changing them. Where the
    transformer acts on blocks of coordinates, i counts these.

    :ivar conditioner: maps time and the state to the hidden units h with shape ``(*, d / block_dim, d_h)``.
    :ivar transformer: maps time, the state and the hidden units to f.
    :ivar tensors: the tensors whose gradients determine those of the parameters and of the context, as an adjoint
        method needs them; none of them depends on another.
    """

    def __init__(self, input_dim: int, conditioner: BoundConditioner, transformer: BoundTransformer) -> None:
        self._input_dim = input_dim
        self.conditioner = conditioner
        self.transformer = transformer
        self.block_dim = transformer.block_dim
        distinct = {id(tensor): tensor for tensor in (*conditioner.tensors, *transformer.tensors)}
        self.tensors = tuple([tensor for tensor in distinct.values() if tensor.requires_grad])

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        """See :meth:`VectorField.__call__`."""
        return self.dimwise_derivatives(t, x, 0)[0]

    def dimwise_derivatives(self, t: Tensor, x: Tensor, order: int) -> tuple[Tensor, ...]:
        r"""
        The dimension-wise derivatives :math:`D^k f = (\partial^k f_1 / \partial x_1^k, \dots, \partial^k f_d /
        \partial x_d^k)`. Their gradients, to the conditioner too, are complete.

        :param Tensor t: time, a scalar, or one per sample with a shape that broadcasts to ``(*,)``.
        :param Tensor x: the state with shape ``(*, d)``.
        :param int order: the highest order k.
        :returns: ``(f, D1, ..., Dk)``, each with shape ``(*, d)``.
        :raises ValueError: for a state of another size or a negative order.
        """
        self._check(x)
        if order < 0:
            raise ValueError(f"order must be 0 or more, but got {order}")
        return self.transformer.derivatives(t, x, self.conditioner(t, x), order)

    def with_diagonal(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        r"""
        Field and diagonal of its Jacobian, for the Jacobi-Newton iteration of an implicit
        :class:`~pyro_hollow.ode.Solver`.

        :param Tensor t: time, a scalar, or one per sample with a shape that broadcasts to ``(*,)``.
        :param Tensor x: the state with shape ``(*, d)``.
        :returns: :math:`f(t, x)` and :math:`\partial f_i / \partial x_i`, both with shape ``(*, d)``.
        """
        dx, diagonal = self.dimwise_derivatives(t, x, 1)
        return dx, diagonal

    def with_blocks(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        r"""
        Field and diagonal blocks of its Jacobian, of which the rest is the hollow part.

        :param Tensor t: time, a scalar, or one per sample with a shape that broadcasts to ``(*,)``.
        :param Tensor x: the state with shape ``(*, d)``.
        :returns: :math:`f(t, x)` with shape ``(*, d)``, and :math:`\partial f_k / \partial x_k` for the blocks of b =
            block_dim coordinates, with shape ``(*, d / b, b, b)``.
        :raises ValueError: for a state of another size.
        """
        self._check(x)
        return self.transformer.blocks(t, x, self.conditioner(t, x))

    def _check(self, x: Tensor) -> None:
        if x.dim() == 0 or x.shape[-1] != self._input_dim:
            raise ValueError(f"x must have shape (*, {self._input_dim}), but got {tuple(x.shape)}")

    def stepper(self, tableau: Tableau, state: tuple[Tensor, ...], compile: bool = False) -> tuple[Stepper, str]:
        """See :meth:`VectorField.stepper`."""
        reason = ""
        for executor in (NativeStepper, HollowStepper) if compile else (HollowStepper,):
            try:
                return executor(tableau, self, self.conditioner, self.transformer, state), reason
            except Unsupported as error:
                reason = reason or str(error)
        return super().stepper(tableau, state)[0], reason


class ConditionalHollowNN(nn.Module):
    r"""
    A hollow network that also depends on a context,

        :math:`f_i(t, x; c) = \tau_i(t, x_i, h_i; c), \qquad h_i = c_i(t, x_{-i}; c)`,

    so that :math:`\partial f / \partial x` splits into a diagonal, through the transformer :math:`\tau`, and a hollow
    matrix, through the conditioner. The diagonal, and with it the divergence, costs no more than one more elementwise
    pass, whatever the dimension.

    With ``block_dim=b``, i counts blocks of b neighbouring coordinates, such as the positions of particles:
    :math:`x_i, f_i \in \mathbb{R}^b`, and :math:`h_i` sees all other blocks. The Jacobian splits into its diagonal
    blocks and a rest that is zero there; the divergence is the sum of the traces of the blocks.

    Example usage:

    >>> net = ConditionalHollowNN(input_dim=5, context_dim=3)
    >>> field = net.bind(torch.randn(7, 3))
    >>> dx, divergence = field.with_divergence(torch.tensor(0.), torch.randn(7, 5))
    >>> dx.shape, divergence.shape
    (torch.Size([7, 5]), torch.Size([7]))

    The defaults rest on ``python -m pyro_hollow.experiments.defaults``; its tables are in
    ``tutorials/measurements.md``.

    Which conditioner? "grouped" is the most expressive and costs :math:`O(d^2)` parameters and operations; "masked"
    shares its layers among the coordinates; "leave-one-out" is linear in d. In place of a name, a
    :class:`~pyro_hollow.nn.GraphConditioner` is "grouped" among neighbours on a graph, at the price of its edges.

    :param int input_dim: the number d of coordinates; 1 works (the conditioner then sees time and context alone).
    :param int context_dim: the size of the context.
    :param hidden_dims: widths of the conditioner's layers, the last one being the number :math:`d_h` of hidden units
        that each coordinate receives; of each coordinate's own layers for "grouped" and "leave-one-out", of the shared
        layers for "masked". Defaults to [32, 32], and to [max(4 * input_dim, 64), 32] for "masked".
    :param conditioner: "grouped", "masked", "leave-one-out", or a :class:`~pyro_hollow.nn.Conditioner` of your own.
    :param transformer: None for the closed form, or a module that maps ``(*, block_dim + 1 + d_h)``, holding
        :math:`[x_i, t, h_i]`, to ``(*, block_dim)``; see :class:`~pyro_hollow.nn.ModuleTransformer`. Or a
        :class:`~pyro_hollow.nn.Transformer`.
    :param int transformer_dim: the number of units per block of the closed-form transformer. Defaults to 16.
    :param activation: "tanh", "softplus" or "silu"; or two of them, that of the conditioner and the transformer's.
    :param float max_rate: a bound on the rate at which the closed form's affine part expands and contracts, see
        :class:`~pyro_hollow.nn.ClosedFormTransformer`; None for no bound.
    :param int block_dim: the number b of coordinates of a block, which divides input_dim. More than 1 needs the
        conditioner "grouped" or "leave-one-out", or one of your own with this block_dim.
    :raises ValueError: for sizes and names that do not fit, for settings that would have no effect, and if h_i depends
        on x_i in a conditioner of your own.

    References:

    [1] Ricky T. Q. Chen, David Duvenaud. Neural Networks with Cheap Differential Operators. [arXiv:1912.03579]
    """

    @closest_keywords()
    def __init__(
        self,
        input_dim: int,
        context_dim: int,
        hidden_dims: Sequence[int] | None = None,
        *,
        conditioner: str | Conditioner = "grouped",
        transformer: nn.Module | None = None,
        transformer_dim: int | None = None,
        activation: str | tuple[str, str] = "tanh",
        max_rate: float | None = None,
        block_dim: int = 1,
    ) -> None:
        super().__init__()
        pair = (activation, activation) if isinstance(activation, str) else activation
        if not (isinstance(pair, Sequence) and len(pair) == 2):
            raise ValueError(
                f"activation must be one of {sorted(ACTIVATIONS)}, or two of them, the conditioner's and the "
                f"transformer's, but got {activation!r}"
            )
        if input_dim < 1:
            raise ValueError(f"input_dim must be at least 1, but got {input_dim}")
        if context_dim < 0:
            raise ValueError(f"context_dim must not be negative, but got {context_dim}")
        self.input_dim = input_dim
        self.context_dim = context_dim
        self.block_dim = check_block_dim(block_dim, input_dim)
        if isinstance(conditioner, Conditioner):
            if hidden_dims is not None:
                raise ValueError("hidden_dims has no effect on a conditioner of your own: leave one of them out")
            _check_conditioner(conditioner, input_dim, context_dim, self.block_dim)
            self.conditioner = conditioner
        else:
            self.conditioner = _make_conditioner(
                conditioner, input_dim, context_dim, hidden_dims, pair[0], self.block_dim
            )
        sizes = (input_dim, self.conditioner.hidden_dim, context_dim)
        self.transformer: Transformer
        if transformer is None:
            width = 16 if transformer_dim is None else transformer_dim
            self.transformer = ClosedFormTransformer(
                *sizes, width=width, activation=pair[1], max_rate=max_rate, block_dim=self.block_dim
            )
        elif transformer_dim is not None or max_rate is not None:
            name = "transformer_dim" if transformer_dim is not None else "max_rate"
            raise ValueError(f"{name} has no effect on a transformer of your own: leave one of them out")
        elif isinstance(transformer, Transformer):
            own = (transformer.input_dim, transformer.hidden_dim, transformer.context_dim)
            if own != sizes:
                raise ValueError(
                    f"transformer was made for input_dim, hidden_dim, context_dim = {own}, but the network has {sizes}"
                )
            if transformer.block_dim != self.block_dim:
                raise ValueError(
                    f"transformer was made for block_dim={transformer.block_dim}, but the network has "
                    f"block_dim={self.block_dim}"
                )
            self.transformer = transformer
        else:
            self.transformer = ModuleTransformer(transformer, *sizes, self.block_dim)

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        """
        The field without its divergence; within a solve, :meth:`bind` once and call the result.

        :param Tensor t: time, a scalar, or one per sample with a shape that broadcasts to ``(*,)``.
        :param Tensor x: the state with shape ``(*, d)``.
        :param Tensor context: the context with shape ``(*, context_dim)``, broadcast against x's batch.
        """
        return self.bind(context)(t, x)

    def bind(self, context: Tensor | None = None) -> HollowField:
        """
        Does what depends on neither time nor state - masked weights, projected context - once per solve.

        :param Tensor context: the context with shape ``(*, context_dim)``; its batch broadcasts against the state's.
        :returns: the field.
        :raises ValueError: if the context is missing, not expected, or of the wrong size.
        """
        if self.context_dim == 0:
            if context is not None:
                raise ValueError("context was given, but this network takes none; use ConditionalHollowNN for one")
        elif context is None:
            raise ValueError(f"context is missing: this network needs one of shape (*, {self.context_dim})")
        elif context.dim() == 0 or context.shape[-1] != self.context_dim:
            raise ValueError(f"context must have shape (*, {self.context_dim}), but got {tuple(context.shape)}")
        return HollowField(self.input_dim, self.conditioner.bind(context), self.transformer.bind(context))


class HollowNN(ConditionalHollowNN):
    r"""
    A hollow network,

        :math:`f_i(t, x) = \tau_i(t, x_i, h_i), \qquad h_i = c_i(t, x_{-i})`,

    whose Jacobian splits into a diagonal and a hollow matrix: its divergence, and all its dimension-wise derivatives,
    are exact at the price of an elementwise pass.

    Example usage:

    >>> net = HollowNN(input_dim=5)
    >>> dx, divergence = net.bind().with_divergence(torch.tensor(0.), torch.randn(7, 5))
    >>> dx.shape, divergence.shape
    (torch.Size([7, 5]), torch.Size([7]))

    :param int input_dim: the number d of coordinates; 1 works (the conditioner then sees time alone).
    :param hidden_dims: widths of the conditioner's layers; see :class:`~pyro_hollow.nn.ConditionalHollowNN`.
    :param kwargs: conditioner, transformer, transformer_dim, activation, max_rate and block_dim, as for
        :class:`~pyro_hollow.nn.ConditionalHollowNN`.

    References:

    [1] Ricky T. Q. Chen, David Duvenaud. Neural Networks with Cheap Differential Operators. [arXiv:1912.03579]
    """

    @closest_keywords()
    def __init__(
        self,
        input_dim: int,
        hidden_dims: Sequence[int] | None = None,
        *,
        conditioner: str | Conditioner = "grouped",
        transformer: nn.Module | None = None,
        transformer_dim: int | None = None,
        activation: str | tuple[str, str] = "tanh",
        max_rate: float | None = None,
        block_dim: int = 1,
    ) -> None:
        super().__init__(
            input_dim,
            0,
            hidden_dims,
            conditioner=conditioner,
            transformer=transformer,
            transformer_dim=transformer_dim,
            activation=activation,
            max_rate=max_rate,
            block_dim=block_dim,
        )


def _make_conditioner(
    name: str, input_dim: int, context_dim: int, hidden_dims: Sequence[int] | None, activation: str, block_dim: int
) -> Conditioner:
    if name == "graph":
        raise ValueError(
            f"conditioner 'graph' needs a graph: give GraphConditioner({input_dim}, [32, 32], adjacency=...); "
            "AutoHollowCNF alone finds one"
        )
    if not isinstance(name, str) or name not in CONDITIONERS:
        raise ValueError(f"conditioner must be one of {sorted(CONDITIONERS)} or a Conditioner, but got {name!r}")
    if hidden_dims is None:
        hidden_dims = [max(4 * input_dim, 64), 32] if name == "masked" else [32, 32]
    if block_dim == 1:
        return CONDITIONERS[name](input_dim, hidden_dims, context_dim, activation=activation)
    if name == "masked":
        raise ValueError(f"block_dim={block_dim} needs the conditioner 'grouped' or 'leave-one-out', but got 'masked'")
    return CONDITIONERS[name](input_dim, hidden_dims, context_dim, activation=activation, block_dim=block_dim)


def _check_conditioner(conditioner: Conditioner, input_dim: int, context_dim: int, block_dim: int) -> None:
    """
    Checks sizes, and on random inputs that h_i is free of x_i, for the first and the last i and some between: a leak
    would make every divergence wrong. With blocks, i counts these.
    """
    sizes = (conditioner.input_dim, conditioner.context_dim)
    if sizes != (input_dim, context_dim):
        raise ValueError(
            f"conditioner was made for input_dim, context_dim = {sizes}, but the network has {(input_dim, context_dim)}"
        )
    if conditioner.block_dim != block_dim:
        raise ValueError(
            f"conditioner was made for block_dim={conditioner.block_dim}, but the network has block_dim={block_dim}: "
            "give both the same; 'grouped', 'leave-one-out' and conditioners of your own can have more than 1"
        )
    if type(conditioner) in (*CONDITIONERS.values(), GraphConditioner):
        return
    generator = torch.Generator().manual_seed(0)  # leaves the global one alone
    like = next((p for p in conditioner.parameters() if p.is_floating_point()), torch.empty(()))
    # Sample k asks for block i_k alone, so one backward pass tests them all; a few do for many coordinates.
    groups = input_dim // block_dim
    chosen = sorted({0, groups - 1, *torch.randperm(groups, generator=generator)[:64].tolist()})
    training = conditioner.training
    conditioner.eval()
    with torch.enable_grad(), _zeros_replaced(conditioner, generator):
        x = torch.randn(len(chosen), input_dim, generator=generator).to(like).requires_grad_()
        context = torch.randn(context_dim, generator=generator).to(like) if context_dim else None
        h = conditioner(x.new_tensor(0.3), x, context)
        if h.shape != (len(chosen), groups, conditioner.hidden_dim):
            raise ValueError(
                f"conditioner must map (*, {input_dim}) to (*, {groups}, {conditioner.hidden_dim}), "
                f"but mapped {tuple(x.shape)} to {tuple(h.shape)}"
            )
        own = torch.stack([h[k, i] for k, i in enumerate(chosen)])
        own = (own * torch.randn(own.shape, generator=generator).to(own)).sum()
        gradient = torch.autograd.grad(own, x, allow_unused=True)[0] if own.requires_grad else None
    conditioner.train(training)
    leaks = []
    if gradient is not None:
        gradient = gradient.unflatten(-1, (groups, block_dim))
        leaks = [i for k, i in enumerate(chosen) if gradient[k, i].any()]
    if leaks:
        blocks = "" if block_dim == 1 else f" (blocks of {block_dim} coordinates)"
        raise ValueError(f"conditioner is not hollow: h_i depends on x_i for i in {leaks}{blocks}")


@contextmanager
def _zeros_replaced(module: nn.Module, generator: torch.Generator) -> Iterator[None]:
    """Random numbers in place of parameters that are zero, behind which nothing could be seen."""
    zeros = [p for p in module.parameters() if p.is_floating_point() and not bool(p.any())]
    with torch.no_grad():
        for parameter in zeros:
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter in zeros:
                parameter.zero_()
