"""The graph of a network: traced, cleaned, and classified by what each operation depends on."""

import contextlib
import copy
import functools
import gc
import linecache
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ddpm_fast.engine.ambient import Ambient
from ddpm_fast.engine.call import output_of as output_among
from ddpm_fast.engine.locks import make_lock
from ddpm_fast.validate import line_of

X, T, CONDITION = frozenset("x"), frozenset("t"), frozenset("c")

aten = torch.ops.aten

_CONVOLUTIONS = (
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv2d.padding, aten.conv3d.padding,
    aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input,
)  # fmt: skip
_DROPOUTS = (
    aten.dropout.default, aten.dropout_.default, aten.feature_dropout.default, aten.feature_dropout_.default,
    aten.alpha_dropout.default, aten.alpha_dropout_.default, aten.feature_alpha_dropout.default,
    aten.feature_alpha_dropout_.default,
)  # fmt: skip
# Whose memories (functools.lru_cache) hold nothing of a network.
_LIBRARIES = frozenset((*sys.stdlib_module_names, "torch", "sympy", "numpy", "triton", "packaging", "mpmath"))
# Operations with weights that autocast runs in the lower precision.
_LOWERED = (*_CONVOLUTIONS, aten.linear.default, aten.matmul.default)


_GRADIENT_REGION = torch.ops.higher_order.wrap_with_set_grad_enabled

# Batch sizes to trace with: a prime that divides no other size is a factor of the sizes that belong to the batch.
_PRIMES = (61, 59, 53, 47, 43, 41, 37, 31)
_LARGEST = 2**40  # integers from there on are no sizes; an open end of a slice is 2^63 - 1
KEPT = 4  # traces of a network: a trace keeps its parameters alive
_PLAIN = (bool, int, float, str, type(None))  # values that a trace contains as they were
_LOCK = make_lock()  # torch.export is not made for threads


class HoistError(Exception):
    """An error that says in one line why a network is not hoisted."""


class ExportError(HoistError):
    """An error of torch.export, which another batch size may not have."""


@dataclass(eq=False)
class Table:
    """Results of a network's operations for all timesteps.

    Attributes:
        values: The results, [rows, sum of the sizes].
        seen: What the values were computed from; None before.
    """

    values: Tensor
    seen: Any = None


@dataclass(eq=False)
class Trace:
    """A network's graph, without neutral operations and, under autocast, with the casts of weights.

    Attributes:
        graph: The graph, with placeholders for x, t and the leaves of the keywords.
        root: The module that the graph refers to; its parameters are those of the network.
        batch: The batch size of the graph.
        before: Number of operations as traced, and of the casts of weights.
        neutral: Number of neutral operations that were dropped.
        tables: Results that depend on the timestep alone, shared by all batch sizes as long as anyone reads them.
    """

    graph: fx.Graph
    root: nn.Module
    batch: int
    before: int
    neutral: int
    tables: weakref.WeakValueDictionary[Any, Table] = field(default_factory=weakref.WeakValueDictionary)

    @classmethod
    def of(cls, model: nn.Module, x: Tensor, t: Tensor, kwargs: Mapping[str, Any], ambient: Ambient) -> "Trace":
        """Trace the network and clean the graph; see `trace`."""
        graph, root = trace(model, x, t, kwargs, ambient)
        before = count_operations(graph.nodes)
        drop_neutral(graph)
        neutral = before - count_operations(graph.nodes)
        if ambient.autocast is not None:
            before += cast_weights(graph, root, ambient.autocast)
        return cls(graph, root, len(x), before, neutral)

    def resized(self, batch: int) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
        """Return a copy of the graph for another batch size, and the original of each of its nodes."""
        graph = _rebatched(self.graph, self.batch, batch)
        return graph, dict(zip(graph.nodes, self.graph.nodes, strict=True))


# The traces of every network with a prime batch size, by all that they depended on; None where that failed.
_TRACES: weakref.WeakKeyDictionary[nn.Module, dict[Any, Trace | None]] = weakref.WeakKeyDictionary()


def traces(model: nn.Module, x: Tensor, kwargs: Mapping[str, Any], ambient: Ambient) -> Iterator[Trace]:
    """Yield traces of the network that may do for the batch size of x, to be verified and tried in turn.

    The first serves all batch sizes: sizes that are multiples of the prime batch size that was traced with are taken
    for multiples of the batch size. The second was traced for this batch size alone.

    Raises:
        HoistError: The network cannot be traced, or a call does more than compute its output.
    """
    shared = _shared_trace(model, x, kwargs, ambient)
    if shared is not None:
        yield shared
    yield Trace.of(model, *_resized(x, kwargs, len(x)), ambient)


def _shared_trace(model: nn.Module, x: Tensor, kwargs: Mapping[str, Any], ambient: Ambient) -> Trace | None:
    """Return the trace that serves all batch sizes, made on first use; None where there is none."""
    key = _key(model, x, kwargs, ambient)
    if key is None:
        return None
    known = _TRACES.setdefault(model, {})
    for other in [other for other in known if other[0] != key[0]]:  # their parameters were replaced
        del known[other]
    if key not in known:
        while len(known) >= KEPT:
            del known[next(iter(known))]  # the oldest one
        known[key] = None
        sizes = {size for tensor in (*model.parameters(), *model.buffers(), *_tensors(kwargs)) for size in tensor.shape}
        sizes |= set(x.shape[1:])
        prime = next((prime for prime in _PRIMES if not any(size % prime == 0 for size in sizes if size)), None)
        if prime is not None:
            with contextlib.suppress(ExportError, torch.OutOfMemoryError):
                known[key] = Trace.of(model, *_resized(x, kwargs, prime), ambient)
    return known[key]


class _Output(nn.Module):
    """A network that returns its output alone, by the rule of `engine.call.output_of`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        output: Tensor = output_among(self.model(x, t, **kwargs))
        return output


def trace(
    model: nn.Module, x: Tensor, t: Tensor, kwargs: Mapping[str, Any], ambient: Ambient
) -> tuple[fx.Graph, nn.Module]:
    """Return the network's graph, and a module of the tensors and subgraphs that the graph refers to.

    The graph has placeholders for x, t and the leaves of kwargs. What is traced is a copy of the module with the same
    parameters, so that other threads may go on calling the module. Writes into activations are functionalised.

    Raises:
        ExportError: The network cannot be traced.
        HoistError: A call does more than compute its output.
    """
    try:
        with _LOCK:
            exported = _in_a_thread(lambda: _export(model, x, t, kwargs, ambient))
    except HoistError:
        raise
    except Exception as error:
        raise ExportError(f"torch.export cannot trace it: {line_of(error)}") from None
    graph, root = fx.Graph(), nn.Module()
    graph.output(_copy(exported, graph, root, {}))
    expected = len(pytree.tree_leaves(((x, t), dict(kwargs))))
    found = [node for node in graph.nodes if node.op == "placeholder"]
    if len(found) != expected:
        raise HoistError(f"its trace has {len(found)} inputs instead of {expected}")
    return graph, root


def _copy(module: Any, graph: fx.Graph, root: nn.Module, copied: dict[Any, Any]) -> Any:
    """Append the operations of a traced module to the graph, and its tensors to the root; return its result.

    Regions under no_grad or enable_grad are taken in: no gradient is recorded in a walk.

    Args:
        module: A GraphModule.
        graph, root: What is appended to.
        copied: What stands in the graph for nodes of the module: its inputs, if the graph has them.

    Raises:
        HoistError: The trace calls a module.
    """
    for node in module.graph.nodes:
        if node in copied or node.target is aten._assert_tensor_metadata.default:
            continue
        if node.op == "output":
            return fx.node.map_arg(node.args[0], copied.__getitem__)
        if node.op == "call_module":
            if node.users:
                raise HoistError(f"its trace calls a module, {node.target}")
            continue  # checks of the input's shape
        if node.target is _GRADIENT_REGION:
            _, region, *given = node.args
            inside = attribute_of(module, region.target)
            inputs = (each for each in inside.graph.nodes if each.op == "placeholder")
            values = fx.node.map_arg(given, copied.__getitem__)
            results = _copy(inside, graph, root, dict(zip(inputs, values, strict=True)))
            for user in node.users:
                copied[user] = results[user.args[1]]
            continue
        value = attribute_of(module, node.target) if node.op == "get_attr" else None
        if isinstance(value, fx.GraphModule) and all(user.target is _GRADIENT_REGION for user in node.users):
            continue
        copied[node] = graph.node_copy(node, copied.__getitem__)
        if node.op == "get_attr":
            name = str(node.target).replace(".", "_")
            while hasattr(root, name) and attribute_of(root, name) is not value:
                name += "_"
            setattr(root, name, value)
            copied[node].target = name
    raise AssertionError("a graph has an output")


def _export(model: nn.Module, x: Tensor, t: Tensor, kwargs: Mapping[str, Any], ambient: Ambient) -> nn.Module:
    """Return torch's trace of the network, or raise HoistError where a call does more than compute its output."""
    memories = _memories()
    before = {memory: memory.cache_info().currsize for memory in memories}
    sources = _sources()
    try:
        with torch.enable_grad(), ambient.precision():
            copied = _Output(_structure_of(model))
            program = torch.export.export(copied, (x, t), dict(kwargs), strict=False)
            _refuse_random(program.graph_module)
            if any(operation._schema.is_mutable for _, operation in _operations(program.graph_module)):
                program = program.run_decompositions({})
            exported: nn.Module = program.module()
        for node, operation in _operations(exported):  # writes into activations are functionalised by now
            if operation._schema.is_mutable and not (operation is aten.copy_.default and _is_x(node.args[0])):
                raise HoistError(f"it writes into a tensor ({operation})")
        return exported
    finally:
        for memory in _memories():  # they may hold tensors of the trace
            if memory.cache_info().currsize != before.get(memory, 0):
                memory.cache_clear()
        for table, names in zip(_source_tables(), sources, strict=True):
            for name in table.keys() - names:
                del table[name]


def _in_a_thread(function: Callable[[], Any]) -> Any:
    """Return what the function returns in a thread of its own.

    A new thread has torch's modes as torch sets them: autocast, gradients, inference, default device, function modes.
    Torch's tracer keeps frames alive, which would keep the caller's buffers.
    """
    result: list[Any] = []

    def run() -> None:
        try:
            result.append((function(), None))
        except BaseException as error:
            result.append((None, error.with_traceback(None)))

    thread = threading.Thread(target=run, name="ddpm_fast trace", daemon=True)
    thread.start()
    thread.join()
    value, error = result.pop()
    if error is not None:
        raise error
    return value


def _memories() -> list[Any]:
    """Return the functions under functools.lru_cache that are not torch's own or Python's."""
    kind = type(functools.lru_cache(len))
    found = [each for each in gc.get_objects() if type(each) is kind]
    return [each for each in found if str(each.__module__).partition(".")[0] not in _LIBRARIES]


def _source_tables() -> list[dict[str, Any]]:
    """Return the tables in which torch.fx keeps the sources that it generates, for ever."""
    loader = getattr(fx.graph_module, "_loader", None)
    return [linecache.cache, getattr(loader, "eval_cache", {})]


def _sources() -> list[set[str]]:
    return [set(table) for table in _source_tables()]


def _operations(module: Any) -> Iterator[tuple[fx.Node, Any]]:
    """Yield the operations of a trace and of its subgraphs: of no_grad, autocast, cond."""
    for each in module.modules():
        for node in each.graph.nodes if isinstance(each, fx.GraphModule) else ():
            if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
                yield node, node.target


def _is_x(node: Any) -> bool:
    """Return whether the node is the network's first input: each call gets a fresh one, so that writes are harmless."""
    first = next(each for each in node.graph.nodes if each.op == "placeholder")
    return node is first


def _structure_of(model: nn.Module) -> nn.Module:
    """Return a copy of the module that shares every tensor with the module."""
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _tensors(kwargs: Mapping[str, Any]) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(kwargs) if isinstance(leaf, Tensor)]


def _key(model: nn.Module, x: Tensor, kwargs: Mapping[str, Any], ambient: Ambient) -> tuple[Any, ...] | None:
    """Return what a trace depends on besides the batch size, first the tensors; None where nobody can tell."""
    leaves, structure = pytree.tree_flatten(dict(kwargs))
    if not all(isinstance(leaf, (Tensor, *_PLAIN)) for leaf in leaves):
        return None
    signature = tuple(
        (leaf.shape[:1] == x.shape[:1], leaf.shape[leaf.shape[:1] == x.shape[:1] :], leaf.dtype)
        if isinstance(leaf, Tensor)
        else (type(leaf), leaf)
        for leaf in leaves
    )  # fmt: skip
    tensors = tuple((id(t), t.dtype, t.device) for t in (*model.parameters(), *model.buffers()))
    modules = tuple((type(module), _settings(module)) for module in model.modules())
    return tensors, modules, x.shape[1:], x.dtype, x.device, signature, structure, ambient


def _settings(module: nn.Module) -> tuple[Any, ...]:
    """Return the module's own attributes that are numbers, texts, or tuples or lists of those; `training` is one."""
    found = []
    for name, value in vars(module).items():
        values = value if isinstance(value, (tuple, list)) else (value,)
        if all(isinstance(each, _PLAIN) for each in values):
            found.append((name, type(value), *((type(each), each) for each in values)))
    return tuple(found)


def _resized(x: Tensor, kwargs: Mapping[str, Any], batch: int) -> tuple[Tensor, Tensor, Mapping[str, Any]]:
    """Return arguments of another batch size. Their values do not matter; a trace may keep them alive."""

    def resized(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if leaf.shape[:1] != x.shape[:1]:
            return leaf.clone()
        return leaf.new_zeros((batch, *leaf.shape[1:]))

    t = torch.zeros(batch, dtype=torch.int64, device=x.device)
    return resized(x), t, {name: pytree.tree_map(resized, value) for name, value in kwargs.items()}


def _rebatched(graph: fx.Graph, old: int, new: int) -> fx.Graph:
    """Return the graph for another batch size: `old`, a prime, is replaced in every size that has this factor."""

    def replaced(value: Any) -> Any:
        size = isinstance(value, int) and not isinstance(value, bool) and 0 < value < _LARGEST
        return value // old * new if size and value % old == 0 else value

    made = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        copied[node] = twin = made.node_copy(node, copied.__getitem__)
        sizes = _size_arguments(node)
        twin.args = tuple(
            pytree.tree_map(replaced, value) if place in sizes else value for place, value in enumerate(twin.args)
        )
        twin.kwargs = {
            name: pytree.tree_map(replaced, value) if name in sizes else value for name, value in twin.kwargs.items()
        }
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            shape = [replaced(int(size)) for size in value.shape]
            twin.meta["val"] = torch.empty(shape, dtype=value.dtype, device="meta")
    return made


def _size_arguments(node: fx.Node) -> set[int | str]:
    """Return places and names of the arguments that are sizes: other numbers have nothing to do with the batch."""
    found: set[int | str] = set()
    if isinstance(node.target, torch._ops.OpOverload):
        for place, argument in enumerate(node.target._schema.arguments):
            kind = argument.real_type
            while kind.kind() in ("ListType", "OptionalType"):
                kind = kind.getElementType()
            if kind.kind() == "SymIntType" and argument.name != "index":
                found |= {place, argument.name}
    return found


def _refuse_random(module: Any) -> None:
    """Raise HoistError where a trace draws random numbers: that must happen in every call."""
    for node, operation in _operations(module):
        found = {argument.name: argument.default_value for argument in operation._schema.arguments}
        named = dict(zip(found, node.args, strict=False)) | dict(node.kwargs)
        if operation in _DROPOUTS:
            quiet = named["p"] == 0 or not named["train"]
        elif torch.Tag.nondeterministic_seeded in operation.tags:
            quiet = named.get("dropout_p", found.get("dropout_p")) == 0
        else:
            quiet = True
        if not quiet:
            raise HoistError(f"it draws random numbers ({operation})")


def _is_neutral(node: fx.Node) -> bool:
    """Return whether the operation's result is its first argument."""
    if node.target in _DROPOUTS:
        return bool(node.args[1] == 0 or not node.args[2])
    if not node.args or not isinstance(node.args[0], fx.Node):
        return False
    before, after = node.args[0].meta.get("val"), node.meta.get("val")
    if not isinstance(before, Tensor) or not isinstance(after, Tensor) or before.dtype != after.dtype:
        return False
    if node.target in (aten.div.Tensor, aten.mul.Tensor):
        return isinstance(node.args[1], (int, float)) and bool(node.args[1] == 1)
    return node.target is aten.to.dtype and len(node.args) == 2 and not node.kwargs


def drop_neutral(graph: fx.Graph) -> None:
    """Remove the operations whose result is their first argument."""
    for node in list(graph.nodes):
        if node.op == "call_function" and _is_neutral(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    graph.eliminate_dead_code()


def cast_weights(graph: fx.Graph, root: nn.Module, dtype: torch.dtype) -> int:
    """Add to the graph the casts of weights that autocast makes in every call, and return their number.

    The casts depend on parameters alone, so that they leave the loop.
    """
    casts: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.target not in _LOWERED:
            continue
        for source in node.all_input_nodes:
            weight = attribute_of(root, source.target) if source.op == "get_attr" else None
            if not isinstance(weight, Tensor) or weight.dtype != torch.float32:
                continue
            if source.target not in casts:
                with graph.inserting_after(source):
                    casts[source.target] = graph.call_function(aten.to.dtype, (source, dtype))
                casts[source.target].meta["val"] = torch.empty(weight.shape, dtype=dtype, device="meta")
            node.replace_input_with(source, casts[source.target])
    return len(casts)


def lay_out_weights(
    graph: fx.Graph, classes: Mapping[fx.Node, frozenset[str]], memory_format: torch.memory_format
) -> None:
    """Add to the graph copies of convolution weights in `memory_format`, for convolutions of that many dimensions.

    The copies depend on parameters alone, so that they leave the loop.
    """
    flat = memory_format == torch.contiguous_format
    dimensions = {torch.channels_last: 4, torch.channels_last_3d: 5}.get(memory_format)
    for node in list(graph.nodes):
        if node.target not in _CONVOLUTIONS:
            continue
        weight = node.args[1]
        value = weight.meta["val"]
        if weight.target is aten.contiguous.default:
            weight.kwargs = {"memory_format": memory_format}
        elif not classes[weight] and (flat or value.dim() == dimensions):
            with graph.inserting_after(weight):
                laid = graph.call_function(aten.contiguous.default, (weight,), {"memory_format": memory_format})
            laid.meta["val"] = value
            node.replace_input_with(weight, laid)


def classify(graph: fx.Graph, conditions: int) -> dict[fx.Node, frozenset[str]]:
    """Return what every node depends on: a set of "x", "t" and "c" (the condition); empty for parameters."""
    kinds = iter([X, T, *[CONDITION] * conditions])
    classes: dict[fx.Node, frozenset[str]] = {}
    for node in graph.nodes:
        own = next(kinds) if node.op == "placeholder" else frozenset()
        classes[node] = own.union(*(classes[source] for source in node.all_input_nodes))
    return classes


def frontier_of(graph: fx.Graph, classes: Mapping[fx.Node, frozenset[str]]) -> list[fx.Node]:
    """Return the nodes without x whose results operations on x read."""
    return [
        node
        for node in graph.nodes
        if node.op == "call_function"
        and not classes[node] & X
        and isinstance(node.meta.get("val"), Tensor)
        and any(user.op == "output" or classes[user] & X for user in node.users)
    ]


def output_of(graph: fx.Graph) -> fx.Node:
    """Return the node of the network's first output."""
    (output,) = (node for node in graph.nodes if node.op == "output")
    return next(node for node in pytree.tree_leaves(output.args[0]) if isinstance(node, fx.Node))


def needed_by(outputs: Sequence[fx.Node], stops: Iterable[fx.Node] = ()) -> set[fx.Node]:
    """Return all nodes that the outputs need, up to but without the nodes `stops`."""
    stopped, found, open_ = set(stops), set(), list(outputs)
    while open_:
        node = open_.pop()
        if node not in found and node not in stopped:
            found.add(node)
            open_ += node.all_input_nodes
    return found


def function_of(
    root: nn.Module, graph: fx.Graph, outputs: Sequence[fx.Node], given: Sequence[fx.Node] = ()
) -> Callable[..., Any]:
    """Return a function of the graph's placeholders and of the results `given` that returns the list of `outputs`."""
    needed = needed_by(outputs, given)
    made = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            copied[node] = made.placeholder(node.name)
    for node in given:
        copied[node] = made.placeholder(f"hoisted_{node.name}")
    for node in graph.nodes:
        if node in needed and node not in copied:
            copied[node] = made.node_copy(node, copied.__getitem__)
    made.output([copied[node] for node in outputs])
    # Not a GraphModule: torch.fx keeps the source of each of those for ever.
    code = made.python_code("self")
    dismantle(made)
    space = dict(code.globals)
    exec(compile(code.src, "<hoisted network>", "exec"), space)
    return types.MethodType(space.pop("forward"), root)


def dismantle(graph: fx.Graph) -> None:
    """Take apart a graph that nobody needs: it is full of cycles, which would wait for Python's garbage collector."""
    for node in reversed(list(graph.nodes)):
        with contextlib.suppress(RuntimeError):  # of a graph whose change was broken off
            graph.erase_node(node)
    vars(graph).clear()


def count_operations(nodes: Iterable[fx.Node]) -> int:
    """Count the operations among the nodes."""
    return sum(node.op == "call_function" for node in nodes)


def attribute_of(root: nn.Module, name: Any) -> Any:
    """Return the attribute that a dotted name reaches from `root`."""
    found: Any = root
    for part in str(name).split("."):
        found = getattr(found, part)
    return found
