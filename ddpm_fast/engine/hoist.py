"""Hoisting: what does not depend on x leaves the loop: time embeddings, class embeddings, keys and values of a prompt.

A network is traced once (torch.export). Each operation depends on the timestep t, on the condition (the tensors among
the keywords), on both, or on x. Operations of the first three kinds are evaluated ahead of the run: operations of t
once for every timestep, operations of the condition once, operations of both once for every timestep and distinct
condition. Where such a result enters an operation on x, the rest of the network reads the result from a table.
"""

import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ddpm_fast.engine.ambient import Ambient
from ddpm_fast.engine.call import output_of as output_among
from ddpm_fast.engine.device import Model
from ddpm_fast.engine.fuse import Fuser, Fusion
from ddpm_fast.engine.trace import (
    CONDITION,
    HoistError,
    T,
    Table,
    Trace,
    attribute_of,
    classify,
    count_operations,
    dismantle,
    frontier_of,
    function_of,
    lay_out_weights,
    needed_by,
    output_of,
    traces,
)
from ddpm_fast.validate import line_of

_PIECE = 2**18  # elements of a tensor that are summed at once
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Differences by rounding, relative to the output: two orders of summation in a network of some hundred layers.
ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
MEMORY = 2**30  # bytes, at most, for the tables of one network


@dataclass(frozen=True)
class Counts:
    """Numbers of operations in one call of a network, views included.

    Attributes:
        before: Operations as traced; under autocast with the casts of weights.
        neutral: Operations that were dropped: dropout that is off, division and multiplication by 1, casts to the same
            dtype.
        of_t, of_condition, of_both: Operations that are evaluated ahead. An operation that depends on parameters alone
            counts as of_condition.
        after: Operations that stay in the loop.
        tables: Results that the rest of the network reads from a table over t.
        table_bytes: Size of the tables.
    """

    before: int
    neutral: int
    of_t: int
    of_condition: int
    of_both: int
    after: int
    tables: int
    table_bytes: int


@dataclass
class _Bank:
    """A table of results of one dtype over the same index, side by side, so that one gather reads all of them.

    Attributes:
        nodes: The operations with these results.
        evaluate: A function that computes the results, each [B, ...].
        conditional: Whether the results also depend on the condition.
        shapes: Shapes of one sample's results.
        table: The results, with a row for each timestep, or each timestep and distinct condition.
        views: Results for a batch that is all in one row, by row.
    """

    nodes: list[fx.Node]
    evaluate: Callable[..., Any]
    conditional: bool
    shapes: list[torch.Size]
    table: Table
    views: dict[int, list[Tensor]] = field(default_factory=dict)

    @property
    def sizes(self) -> list[int]:
        """Numbers of elements of one sample's results."""
        return [shape.numel() for shape in self.shapes]


class Hoisted:
    """A network whose calls compute only what depends on x.

    Args:
        model: A module that is called as model(x, t, **kwargs). Its parameters are shared, not copied.
        x: An input [B, ...] with the shape, dtype and device of every call.
        timesteps: Timesteps of the run.
        kwargs: Keywords of every call. Their tensors stay the same objects; `refresh` reads new values.
        memory: Bytes for the tables, at most. Results that do not fit stay in the loop.
        ambient: The settings that every call is made with. None takes those in force.

    Attributes:
        counts: Numbers of operations that left the loop.
        fusion: What `fuse` did; None before.

    Raises:
        HoistError: The network cannot be hoisted; says why.
    """

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(
        self,
        model: Model,
        x: Tensor,
        timesteps: Sequence[int],
        kwargs: Mapping[str, Any] | None = None,
        memory: int = MEMORY,
        *,
        ambient: Ambient | None = None,
    ) -> None:
        self.model = _checked(model)
        self.fusion: Fusion | None = None
        self._training = self.model.training
        self._kwargs = dict(kwargs or {})
        self._leaves = pytree.tree_leaves(self._kwargs)
        self._conditions = [leaf for leaf in self._leaves if isinstance(leaf, Tensor)]
        self._batch, self._memory = len(x), memory
        self._timesteps = torch.as_tensor(timesteps, dtype=torch.int64, device=x.device)
        self._position = torch.zeros(int(self._timesteps.max()) + 1, dtype=torch.int64, device=x.device)
        self._position[self._timesteps] = torch.arange(len(self._timesteps), dtype=torch.int64, device=x.device)

        reason: HoistError | None = None
        self._ambient = ambient or Ambient.now(x.device)
        for found in traces(self.model, x, self._kwargs, self._ambient):
            try:
                self._build(found, x)
                return
            except HoistError as error:  # the next trace may do
                reason = error
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                reason = HoistError(f"its trace cannot run: {line_of(error)}")
        assert reason is not None
        raise reason

    def _build(self, found: Trace, x: Tensor) -> None:
        """Divide the trace, fill the tables, and verify both."""
        graph, originals = found.resized(self._batch)
        root = found.root
        output = output_of(graph)
        classes = classify(graph, len(self._leaves))
        self._graph, self._root = graph, root
        weakref.finalize(self, dismantle, graph).atexit = False
        self._firsts, self._which = self._distinct()
        self._stride = torch.tensor(
            len(self._firsts), dtype=torch.int64, device=x.device
        )  # a recorded graph reads the tensor
        self._banks: list[_Bank] = []
        self._tabulate(found, originals, classes)
        self._constants: list[Tensor] = []
        self._rest: Callable[..., Any]
        hoisted = self._split()
        self._seen: tuple[Any, ...] = ()
        self.refresh()
        self._verify(x)

        everything = needed_by([output])
        gone = everything - needed_by([output], hoisted)
        of = [count_operations(node for node in gone if kind(classes[node])) for kind in (T.__eq__, CONDITION.__ge__)]
        self.counts = Counts(
            before=found.before,
            neutral=found.neutral,
            of_t=of[0],
            of_condition=of[1],
            of_both=count_operations(gone) - sum(of),
            after=count_operations(everything) - count_operations(gone),
            tables=sum(len(bank.nodes) for bank in self._banks),
            table_bytes=sum(bank.table.values.nbytes for bank in self._banks),
        )

    def __call__(self, x: Tensor, t: Tensor, row: int | None = None) -> Tensor:
        """Return the network's output.

        Args:
            x: Input [B, ...].
            t: Timesteps of the run, int64 [B].
            row: Number of the step, where all samples are in the same step. Nothing is gathered then.
        """
        values: list[Tensor] = []
        index = None
        for bank in self._banks:
            if row is not None and (len(self._firsts) == 1 or not bank.conditional):
                values += self._views(bank, row)
                continue
            if index is None:
                index = self._position[t]
            place = index * self._stride + self._which if bank.conditional else index
            pieces = bank.table.values.index_select(0, place).split(bank.sizes, dim=1)
            values += [piece.view(-1, *shape) for piece, shape in zip(pieces, bank.shapes, strict=True)]
        output: Tensor = self._rest(x, t, *self._leaves, *values, *self._constants)[0]
        return output

    @torch.inference_mode(False)
    @torch.no_grad()
    def lay_out(self, memory_format: torch.memory_format) -> None:
        """Keep the weights of convolutions in this memory format; weights in another format are copied."""
        lay_out_weights(self._graph, classify(self._graph, len(self._leaves)), memory_format)
        self._relay()

    @torch.inference_mode(False)
    @torch.no_grad()
    def fuse(self, x: Tensor) -> Fusion:
        """Fuse the rest of the network, for inputs in channels_last memory; return what was done.

        Args:
            x: An input like those of the calls.

        Raises:
            HoistError: The fused network gives other numbers. This object is of no use then.
        """
        self.fusion = Fuser(self._graph, len(self._leaves)).run()
        self._relay()
        self._verify(x)
        return self.fusion

    def _relay(self) -> None:
        """Divide the graph again, which has changed, and evaluate what its rest reads."""
        self._split()
        self._constants = [_with_places(value) for value in self._constants_ahead(None, None, *self._leaves)]
        self._seen = self._fingerprints()

    def compile(self) -> Callable[[], None]:
        """Run the rest of the network through torch.compile, on the next call; return a function that undoes this."""
        plain = self._rest
        self._rest = torch.compile(plain, dynamic=False)

        def undo() -> None:
            self._rest = plain

        return undo

    @torch.inference_mode(False)
    @torch.no_grad()
    def refresh(self) -> bool:
        """Evaluate again, before a run, what depends on changed parameters or conditions.

        Returns:
            Whether tensors moved, so that a recorded graph no longer holds.

        Raises:
            HoistError: The network was switched between training and evaluation, or the tables outgrow their memory.
        """
        if self.model.training != self._training:
            raise HoistError("it was switched between training and evaluation since it was traced")
        seen = self._fingerprints()
        if seen == self._seen:
            return False
        parameters, conditions = (not self._seen or a != b for a, b in zip(seen, self._seen or seen, strict=True))
        if conditions:
            self._firsts, which = self._distinct()
            self._which.copy_(which)
            self._stride.fill_(len(self._firsts))
        moved = False
        for bank in self._banks:
            if not (parameters or (conditions and bank.conditional)):
                continue
            rows = len(self._timesteps) * (len(self._firsts) if bank.conditional else 1)
            values = bank.table.values
            if rows > len(values):
                others = sum(other.table.values.nbytes for other in self._banks if other is not bank)
                if others + values[0].nbytes * rows > self._memory:
                    raise HoistError(f"{len(self._firsts)} conditions at every timestep exceed the tables' memory")
                bank.table = Table(values.new_empty(rows, values.shape[1]))
                bank.views.clear()
                moved = True
            if bank.conditional or bank.table.seen != seen[0]:
                self._fill(bank)
                bank.table.seen = seen[0]
        fresh = self._constants_ahead(None, None, *self._leaves)
        if self._constants:
            for held, value in zip(self._constants, fresh, strict=True):
                if held.data_ptr() != value.data_ptr():
                    held.copy_(value)
        else:
            self._constants = [_with_places(value) for value in fresh]
        self._seen = seen
        return moved

    def _split(self) -> list[fx.Node]:
        """Divide the graph into a part that is evaluated ahead and the rest; return the nodes that cross the border."""
        frontier = frontier_of(self._graph, classes := classify(self._graph, len(self._leaves)))
        constants = [node for node in frontier if classes[node] <= CONDITION]
        self._constants_ahead = function_of(self._root, self._graph, constants)
        hoisted = [node for bank in self._banks for node in bank.nodes] + constants
        self._rest = function_of(self._root, self._graph, [output_of(self._graph)], hoisted)
        used = {node.target for node in needed_by(hoisted) if node.op == "get_attr"}
        values = [attribute_of(self._root, name) for name in used]
        self._parameters = [value for value in values if isinstance(value, Tensor)]
        return hoisted

    def _fingerprints(self) -> tuple[Any, ...]:
        return _fingerprint(self._parameters), _fingerprint(self._conditions)

    def _whole(self, index: Tensor) -> Tensor:
        """Return `index` with its last element repeated up to a whole batch."""
        return index[torch.arange(self._batch, dtype=torch.int64, device=index.device).clamp(max=len(index) - 1)]

    def _batch_of(self, rows: Tensor) -> Tensor:
        """Return the timesteps of these rows, the last one repeated up to a whole batch."""
        return self._timesteps[self._whole(rows)]

    def _distinct(self) -> tuple[list[int], Tensor]:
        """Return the first sample of every distinct condition, and the number of every sample's condition."""
        own = [leaf.reshape(self._batch, -1).cpu() for leaf in self._conditions if leaf.shape[:1] == (self._batch,)]
        firsts: dict[tuple[bytes, ...], int] = {}
        which = []
        for sample in range(self._batch):
            key = tuple(leaf[sample].contiguous().view(torch.uint8).numpy().tobytes() for leaf in own)
            firsts.setdefault(key, sample)
            which.append(list(firsts).index(key))
        return list(firsts.values()), torch.tensor(which, dtype=torch.int64, device=self._timesteps.device)

    def _tabulate(
        self, found: Trace, originals: Mapping[fx.Node, fx.Node], classes: Mapping[fx.Node, frozenset[str]]
    ) -> None:
        """Choose the results that are read from tables, and allocate the tables that other batch sizes do not have."""
        graph, root, taken = self._graph, self._root, 0
        frontier = frontier_of(graph, classes)
        for conditional in (False, True):
            wanted = T | CONDITION if conditional else T
            results = [
                node for node in frontier if classes[node] == wanted and node.meta["val"].shape[:1] == (self._batch,)
            ]
            results = self._row_wise(root, graph, results)
            rows = len(self._timesteps) * (len(self._firsts) if conditional else 1)
            for dtype in {node.meta["val"].dtype for node in results}:
                nodes = [node for node in results if node.meta["val"].dtype == dtype]
                shapes = [node.meta["val"].shape[1:] for node in nodes]
                width = sum(shape.numel() for shape in shapes)
                size = rows * width * dtype.itemsize
                if taken + size <= self._memory:
                    taken += size
                    key = tuple(originals[node] for node in nodes), tuple(self._timesteps.tolist())
                    table = None if conditional else found.tables.get(key)
                    if table is None:
                        table = Table(torch.empty(rows, width, dtype=dtype, device=self._timesteps.device))
                    if not conditional:
                        found.tables[key] = table
                    self._banks.append(_Bank(nodes, function_of(root, graph, nodes), conditional, shapes, table))

    def _row_wise(self, root: nn.Module, graph: fx.Graph, nodes: list[fx.Node]) -> list[fx.Node]:
        """Return the nodes whose result for a sample depends on that sample's timestep and condition alone."""
        if self._batch == 1 or not nodes:
            return nodes
        evaluate = function_of(root, graph, nodes)
        rows = torch.arange(self._batch, dtype=torch.int64, device=self._timesteps.device) % len(self._timesteps)
        samples = torch.arange(self._batch, dtype=torch.int64, device=self._timesteps.device)
        mixed = evaluate(None, self._batch_of(rows), *self._leaves)
        kept = [True] * len(nodes)
        for sample in (0, self._batch - 1):
            alike = torch.full_like(samples, sample)
            values = evaluate(None, self._batch_of(rows[alike]), *self._of_samples(alike))
            for number, (value, other) in enumerate(zip(values, mixed, strict=True)):
                expected = other[sample].expand_as(value).float()
                kept[number] &= torch.allclose(value.float(), expected, rtol=1e-3, atol=1e-5)
        return [node for node, row_wise in zip(nodes, kept, strict=True) if row_wise]

    def _of_samples(self, samples: Tensor) -> list[Any]:
        """Return the leaves of the keywords with the conditions of these samples."""
        return [
            leaf[samples] if isinstance(leaf, Tensor) and leaf.shape[:1] == (self._batch,) else leaf
            for leaf in self._leaves
        ]

    def _fill(self, bank: _Bank) -> None:
        """Fill a bank's table: evaluate its results for every row."""
        firsts = torch.tensor(
            self._firsts if bank.conditional else [0], dtype=torch.int64, device=self._timesteps.device
        )
        rows = len(self._timesteps) * len(firsts)
        for start in range(0, rows, self._batch):
            index = torch.arange(start, min(start + self._batch, rows), dtype=torch.int64, device=firsts.device)
            t = self._batch_of(index // len(firsts))
            leaves = self._leaves
            if bank.conditional:
                leaves = self._of_samples(firsts[self._whole(index) % len(firsts)])
            results = bank.evaluate(None, t, *leaves)
            flat = torch.cat([value.reshape(self._batch, -1) for value in results], dim=1)
            bank.table.values[start : start + len(index)] = flat[: len(index)]

    def _views(self, bank: _Bank, row: int) -> list[Tensor]:
        found = bank.views.get(row)
        if found is None:
            pieces = bank.table.values[row : row + 1].split(bank.sizes, dim=1)
            found = [
                piece.view(1, *shape).expand(self._batch, *shape)
                for piece, shape in zip(pieces, bank.shapes, strict=True)
            ]
            bank.views[row] = found
        return found

    def _verify(self, x: Tensor) -> None:
        """Raise HoistError unless both ways of reading the tables give the network's output, from first row to last."""
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), device="cpu", dtype=torch.float32).to(
            x
        )
        samples, last = torch.arange(self._batch, dtype=torch.int64, device=x.device), len(self._timesteps) - 1
        tried: list[tuple[Tensor, int | None]] = [(samples * last // max(self._batch - 1, 1), None)]
        # Two samples reach the first and the last row by themselves.
        tried += [(torch.full_like(samples, row), row) for row in (last // 2, last)[: 2 if self._batch == 1 else 1]]
        for rows, row in tried:
            t = self._timesteps[rows]
            expected = output_among(self.model(noise, t, **self._kwargs))
            try:
                got = self(noise, t, row)
            except Exception as error:
                raise HoistError(f"what is left of it cannot run: {line_of(error)}") from error
            if not same_up_to_rounding(got, expected, self._ambient.autocast):
                raise HoistError("what is left of it gives other numbers")


def same_up_to_rounding(got: Tensor, expected: Tensor, autocast: torch.dtype | None = None) -> bool:
    """Return whether two outputs [B, ...] differ by rounding alone, in every sample.

    The root mean square of the difference is compared with that of the output, by the precision of the arithmetic.
    NaN and infinity must stand in the same places.
    """
    if got.shape != expected.shape or not torch.equal(got.isfinite(), expected.isfinite()):
        return False
    arithmetic = autocast or expected.dtype
    allowed = ROUNDING.get(arithmetic, ROUNDING[torch.bfloat16])
    if arithmetic == torch.float32 and expected.device.type == "cuda":
        allowed = ROUNDING[torch.float16]  # TF32 has as many bits
    a, b = (each.double().nan_to_num(0, 0, 0).flatten(1) for each in (got, expected))
    scale = torch.linalg.vector_norm(b, dim=1) + 1e-6 * b.shape[1] ** 0.5
    return bool((torch.linalg.vector_norm(a - b, dim=1) <= allowed * scale).all())


def _checked(model: Model) -> nn.Module:
    """Return the model if it is a module that can be traced; raise HoistError otherwise."""
    if not isinstance(model, nn.Module):
        raise HoistError(f"it is no torch.nn.Module but a {type(model).__name__}")
    if hasattr(model, "_orig_mod"):
        raise HoistError("it is compiled already")
    for module in model.modules():
        if module._forward_hooks or module._forward_pre_hooks or "_hf_hook" in vars(module):
            raise HoistError(f"its {type(module).__name__} has hooks, which a trace would leave out")
    return model


def _with_places(tensor: Tensor) -> Tensor:
    """Return the tensor, or a copy of an expanded one, so that every element has its own place to be written to."""
    shared = any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.contiguous() if shared else tensor


def _fingerprint(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """Return sums that differ where a value differs or two values change places.

    A write through `.data` leaves no other trace. The sums are of a tensor's bits, with odd weights, modulo 2^64.
    """
    sums = [_weighted_bits(tensor.detach()) for tensor in tensors if tensor.numel()]
    return (*(tensor._version for tensor in tensors), *(torch.stack(sums).tolist() if sums else ()))


def _weighted_bits(tensor: Tensor) -> Tensor:
    """Return a sum over the bits of the tensor, int64."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    flat = tensor.resolve_neg().reshape(-1)
    flat = flat.view(torch.uint8) if flat.dtype == torch.bool else flat.view(_BITS[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for number, piece in enumerate(flat.split(_PIECE)):
        total += (2 * number + 1) * torch.sum(piece.long() * _weights(piece.device)[: len(piece)])
    return total


@functools.lru_cache
def _weights(device: torch.device) -> Tensor:
    """Return odd numbers without a pattern, int64 [_PIECE]."""
    places = torch.arange(_PIECE, dtype=torch.int64, device=device)
    return (places * 0x9E3779B97F4A7C1 ^ (places << 21)) | 1
