# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""
Functions of tensors as graphs of torch's operations: traced through whatever Python calls them, simplified, compiled.

A graph runs the same operations whatever the values, for inputs of the shapes it was traced with.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Untraceable", "capture"]

_aten = torch.ops.aten
#: Operations whose result is their input, for a function without side effects.
_COPIES = {_aten.detach.default, _aten.alias.default, _aten.lift_fresh_copy.default, _aten.lift_fresh.default}
_RESHAPES = {_aten.view.default, _aten.expand.default, _aten._unsafe_view.default, _aten.reshape.default}
#: Operations that take nothing but shape and type from their input.
_LIKE = {_aten.zeros_like.default, _aten.ones_like.default, _aten.full_like.default, _aten.empty_like.default}
_LIKE |= {_aten.new_zeros.default, _aten.new_ones.default, _aten.new_full.default, _aten.new_empty.default}
_TAGS = {
    torch.Tag.nondeterministic_seeded: "draws random numbers",
    torch.Tag.data_dependent_output: "decides by values of latents",
}


class Untraceable(Exception):
    """A function that no graph can stand for; the message says why, as the end of a sentence about the model."""


def capture(function: Callable[..., Any], inputs: Sequence[Tensor]) -> GraphModule:
    """
    Traces a function, functionalized, and simplifies its graph.

    :param function: of tensors, to a tuple of tensors. It may differentiate; it runs any Python there is.
    :param inputs: examples of its inputs, whose shapes the graph is bound to.
    :raises Untraceable: where Python needs the value of a tensor that depends on inputs, and for operations that draw
        random numbers or whose results have shapes that depend on values.
    """
    try:
        root, graph = _record(function, inputs)
        if any(_is_mutable(node) for node in graph.nodes):
            root, graph = _record(torch.func.functionalize(GraphModule(root, graph)), inputs)
            if any(_is_mutable(node) for node in graph.nodes):
                raise Untraceable("writes to tensors that outlive it")
    except Untraceable:
        raise
    except Exception as error:  # whatever a model may raise
        raise Untraceable(f"cannot be traced ({type(error).__name__}: {str(error).splitlines()[0]})") from error
    _check(graph)
    _simplify(root, graph)
    return GraphModule(root, graph)


def _record(function: Callable[..., Any], inputs: Sequence[Tensor]) -> tuple[torch.nn.Module, Graph]:
    inputs = [each.clone() for each in inputs]
    recorder = _Recorder(inputs)
    with recorder:
        results = function(*inputs)
    graph, root = recorder.graph, torch.nn.Module()
    graph.output(tuple([recorder.node_of(each) for each in results]))
    for name, constant in recorder.constants.items():
        root.register_buffer(name, constant.detach())
    return root, graph


class _Recorder(TorchDispatchMode):
    """
    Records every operation of torch that runs, below automatic differentiation.

    torch's own ``make_fx`` does the same, but importing and running it takes several times as long as the fit of a
    small model.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or the first operation would import all of it, which takes seconds

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.graph = Graph()
        self.constants: dict[str, Tensor] = {}
        # Tensors are kept, as another one might get the identity of one that is gone.
        self._known: dict[int, tuple[Tensor, Node, bool]] = {}
        self._aliases: dict[int, set[int]] = {}  # the tensors that share a memory
        for k, each in enumerate(inputs):
            self._add(each, self.graph.placeholder(f"input_{k}"), True)

    def _add(self, tensor: Tensor, node: Node, depends: bool) -> None:
        node.meta["like"] = tensor.shape, tensor.dtype, tensor.device
        self._known[id(tensor)] = tensor, node, depends
        self._aliases.setdefault(tensor.untyped_storage().data_ptr(), set()).add(id(tensor))

    def node_of(self, tensor: Tensor) -> Node:
        """The node of a tensor, a constant if no operation has made it."""
        if id(tensor) not in self._known:
            if tensor.requires_grad:
                raise Untraceable(
                    f"uses a tensor of shape {tuple(tensor.shape)} that has gradients and that a graph would freeze"
                )
            name = f"constant_{len(self.constants)}"
            self.constants[name] = tensor.clone()  # before the model writes to it
            self._add(tensor, self.graph.get_attr(name), False)
        return self._known[id(tensor)][1]

    def _nodes(self, each: Any) -> Any:
        """Arguments of an operation, with nodes for tensors."""
        if isinstance(each, Tensor):
            return self.node_of(each)
        if isinstance(each, dict):
            return {name: self._nodes(value) for name, value in each.items()}
        return type(each)(map(self._nodes, each)) if isinstance(each, (tuple, list)) else each

    def _depends(self, tensor: Any) -> bool:
        return isinstance(tensor, Tensor) and id(tensor) in self._known and self._known[id(tensor)][2]

    def _functional(self, func: Any, args: Any) -> Any:
        """For an operation in place on what nothing else shares, the one that makes a new tensor."""
        name, alone = func.overloadpacket.__name__, False
        if func._schema.is_mutable and name.endswith("_") and func.namespace == "aten":
            alone = len(self._aliases[args[0].untyped_storage().data_ptr()]) == 1
        packet = getattr(_aten, name[:-1], None) if alone else None
        return getattr(packet, func._overloadname, func)

    def _poison(self, info: Tensor) -> None:
        """
        Sets results of linear algebra to NaN where their info tells of a failure, for which torch would raise an error.
        A batch then loses one particle. Nothing is done while tracing, at whose values there may be a failure.
        """
        node = self.node_of(info)
        failed = self.graph.call_function(_aten.ne.Scalar, (node, 0))
        for tensor, own, depends in list(self._known.values()):
            if own.target is operator.getitem and own.args[0] is node.args[0] and tensor.is_floating_point():
                shape = [*info.shape, *(1,) * (tensor.dim() - info.dim())]
                mask = self.graph.call_function(_aten.view.default, (failed, shape))
                self._add(tensor, self.graph.call_function(_aten.masked_fill.Scalar, (own, mask, math.nan)), depends)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        depends = any(map(self._depends, _tensors((args, kwargs))))
        if depends and torch.Tag.data_dependent_output in func.tags:
            raise Untraceable(f"decides by values of latents ({func})")
        if torch.Tag.dynamic_output_shape in func.tags and any(map(self._depends, _selectors(func, args))):
            raise Untraceable(f"has tensors whose shapes depend on values of latents ({func})")
        if func is _aten._linalg_check_errors.default:
            return self._poison(args[0])
        if func is _aten.log_sigmoid_backward.default and args[0].shape != args[1].shape:
            # Its result is as large as the first one, which torch.vmap leaves without the batch where it is constant.
            args = self.__torch_dispatch__(_aten.expand.default, types, (args[0], list(args[1].shape))), *args[1:]
        nodes = self._nodes(args), self._nodes(kwargs)
        result = func(*args, **kwargs)
        node = self.graph.call_function(self._functional(func, args), *nodes)
        if isinstance(result, Tensor):
            self._add(result, node, depends)
        elif isinstance(result, (tuple, list)):
            for k, each in enumerate(result):
                if isinstance(each, Tensor):
                    self._add(each, self.graph.call_function(operator.getitem, (node, k)), depends)
        return result


def _tensors(each: Any) -> Iterator[Tensor]:
    """All tensors among the arguments of an operation."""
    if isinstance(each, Tensor):
        yield each
    elif isinstance(each, (tuple, list, dict)):
        for part in each.values() if isinstance(each, dict) else each:
            yield from _tensors(part)


def _selectors(func: Any, args: Any) -> list[Any]:
    """The arguments on whose values the shape of a result depends."""
    if func is _aten.index.Tensor:
        return [each for each in args[1] if each is not None and each.dtype in (torch.bool, torch.uint8)]
    return [args[1]] if func is _aten.masked_select.default else list(_tensors(args))


def _is_mutable(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and schema.is_mutable


def _is_kept(node: Node) -> bool:
    return node.op in ("placeholder", "output")


def _check(graph: Graph) -> None:
    graph.eliminate_dead_code(_is_kept)
    for node in graph.nodes:
        for tag in getattr(node.target, "tags", ()) if node.op == "call_function" else ():
            if tag in _TAGS:
                raise Untraceable(f"{_TAGS[tag]} ({node.target})")


def _like(node: Any) -> Any:
    """Shape, type and device of a node's result; None for what is no tensor."""
    return node.meta.get("like") if isinstance(node, Node) else None


def _is_neutral(node: Node) -> bool:
    """True if a node's result is its first argument."""
    if node.op != "call_function":
        return False
    if node.target in _COPIES:
        return True
    if _like(node) is None or _like(node) != _like(node.args[0]):
        return False
    if node.target in _RESHAPES:
        return True
    if node.target is _aten.permute.default:
        return list(node.args[1]) == list(range(len(node.args[1])))  # type: ignore[arg-type]
    other = node.args[1] if len(node.args) == 2 and not node.kwargs else None
    return (node.target, other) in ((_aten.mul.Tensor, 1), (_aten.add.Tensor, 0), (_aten.pow.Tensor_Scalar, 1))


def _simplify(root: torch.nn.Module, graph: Graph) -> None:
    """Removes operations without effect, and computes those that depend on no input."""
    for node in list(graph.nodes):
        if _is_neutral(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target is _aten.view.default:  # of what may no longer be contiguous
            node.target = _aten.reshape.default
    graph.eliminate_dead_code(_is_kept)
    _fold(root, graph)
    _merge(graph)
    graph.eliminate_dead_code(_is_kept)


def _fold(root: torch.nn.Module, graph: Graph) -> None:
    known: dict[Node, Any] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            known[node] = getattr(root, node.target)
            continue
        if node.op != "call_function":
            continue
        if node.target in _LIKE and _like(node.args[0]) is not None:
            shape, dtype, device = _like(node.args[0])
            like = torch.zeros(shape, dtype=dtype, device=device)
            known[node] = node.target(like, *node.args[1:], **node.kwargs)
        elif all(each in known for each in node.all_input_nodes):
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda each: known[each])
            known[node] = node.target(*args, **kwargs)
    for node, value in known.items():
        if node.op == "get_attr" or not isinstance(value, Tensor) or all(user in known for user in node.users):
            continue
        name = f"_constant_{node.name}"
        root.register_buffer(name, value.detach().clone())
        with graph.inserting_before(node):
            constant = graph.get_attr(name)
        node.replace_all_uses_with(constant)


def _merge(graph: Graph) -> None:
    """Computes equal operations once."""
    seen: dict[Any, Node] = {}
    for node in list(graph.nodes):
        if node.op not in ("call_function", "get_attr"):
            continue
        key = repr((node.op, node.target, node.args, sorted(node.kwargs.items())))
        if key in seen:
            node.replace_all_uses_with(seen[key])
            graph.erase_node(node)
        else:
            seen[key] = node
