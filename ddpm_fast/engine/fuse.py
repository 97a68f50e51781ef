"""Fusion of a network's graph: every convolution or linear layer with the operations around it becomes one operation.

The pattern is algebra, not the names of modules. Backwards from a product: zeros around the image, nearest enlargement,
SiLU, modulation, group norm, concat. Forwards: a vector per sample, a residual, a factor; a residual that is a 1×1
convolution is appended to the product. What no pattern covers stays as it is.

Tensors keep the logical shape [B, C, H, W] in channels_last memory, so that any other operation can read them.
"""

import dataclasses
import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from ddpm_fast.engine import tf32
from ddpm_fast.engine.places import COPIES, RESHAPES, Place, as_image, shaped
from ddpm_fast.engine.trace import X, classify
from ddpm_fast.kernels.conv_fused import (
    DTYPES,
    Affine,
    GroupNorm,
    Window,
    channel_stats,
    conv_fused,
    norm_affine,
    pack_weight,
)

aten = torch.ops.aten

TICKETS = 4096  # a batch of more samples needs more: the kernel makes them up
_CASTS = (aten.to.dtype, aten._to_copy.default)
_PRODUCTS = (aten.conv2d.default, aten.conv1d.default, aten.linear.default)


@dataclass(eq=False)
class Layer:
    """A layer to be fused.

    Attributes:
        product: The convolution or linear operation.
        last: The place that the layer's output replaces.
        sources: What the layer reads, side by side.
        window: The pixels of a tap.
        norm: The group norm before the product; None without.
        gain, shift: Modulation after the norm.
        silu: Whether SiLU stands before the product.
        vectors: Tensors without x, a number per sample and channel, that are added.
        residual: The tensor that is added; None without.
        shortcut: The 1×1 layer that is added; None without.
        scale: A factor for the whole.
        merged: Layers of the same sources whose outputs stand behind this one's.
    """

    product: Any
    last: Place
    sources: list[Place]
    window: Window
    norm: Any = None
    gain: Any = None
    shift: Any = None
    silu: bool = False
    vectors: list[fx.Node] = field(default_factory=list)
    residual: Place | None = None
    shortcut: "Layer | None" = None
    scale: float = 1.0
    merged: "list[Layer]" = field(default_factory=list)

    @property
    def plain(self) -> bool:
        """Whether the layer is a 1×1 product of what it reads, and nothing else."""
        bare = self.norm is None and not self.silu and self.window == Window()
        return bare and self.last.node is self.product and not self.merged

    @property
    def weight(self) -> Any:
        """The node of the weight."""
        return self.product.args[1]

    @property
    def bias(self) -> Any:
        """The node of the bias; None without."""
        return self.product.args[2] if len(self.product.args) > 2 else None

    @property
    def outputs(self) -> int:
        """Number of output channels, without what is merged."""
        return len(self.weight.meta["val"])


@dataclass(frozen=True)
class Shape:
    """The sizes of a fused layer, and what it computes.

    Attributes:
        batch, height, width: Number and size of the images that it reads.
        channels: Channels of the sources.
        outputs: Output channels.
        window: The pixels of a tap.
        shortcut: Channels of the shortcut's sources.
        normed, silu, vector, residual: Whether that is part of the layer.
        statistics: Whether the statistics of the output are computed.
    """

    batch: int
    height: int
    width: int
    channels: tuple[int, ...]
    outputs: int
    window: Window
    shortcut: tuple[int, ...]
    normed: bool
    silu: bool
    vector: bool
    residual: bool
    statistics: bool

    @property
    def pixels(self) -> int:
        """Number of output pixels."""
        rows, columns = self.window.output_size(self.height, self.width)
        return rows * columns

    @property
    def multiply_adds(self) -> int:
        """Number of multiplications and additions, in pairs."""
        depth = sum(self.channels) * self.window.size**2 + sum(self.shortcut)
        return self.batch * self.pixels * self.outputs * depth


@dataclass(frozen=True)
class Fusion:
    """What a fusion did.

    Attributes:
        before, after: Operations on x, but for views of memory.
        shapes: The fused layers, in their order.
        left: The other operations, by name, with their numbers.
        reasons: The products that were not fused, each with the reason.
    """

    before: int
    after: int
    shapes: tuple[Shape, ...]
    left: Mapping[str, int]
    reasons: Mapping[str, str]

    @property
    def layers(self) -> int:
        """Number of fused layers."""
        return len(self.shapes)

    def __str__(self) -> str:
        left = ", ".join(f"{count} {name}" for name, count in self.left.items()) or "nothing else"
        words = f"{self.before} operations on x became {self.after}: {self.layers} fused layers, {left}"
        return words + "".join(f"; {name} is not fused, {reason}" for name, reason in self.reasons.items())


class Fuser:
    """A pass over a graph that finds layers and writes them into the graph.

    Args:
        graph: The graph of a network, with its shapes and dtypes in `meta["val"]`. It is changed.
        conditions: Number of leaves of the network's keywords.
    """

    def __init__(self, graph: fx.Graph, conditions: int) -> None:
        self.graph, self.conditions = graph, conditions
        self._classes = classify(graph, conditions)
        self._reasons: dict[str, str] = {}
        self._summed: set[fx.Node] = set()  # sums that are in a layer

    def run(self) -> Fusion:
        """Fuse; return what was done."""
        graph = self.graph
        before = len(self._operations())
        for node in graph.nodes:
            if node.target is aten.view.default:
                node.target = aten.reshape.default  # in channels_last memory some views are copies
        products = [node for node in graph.nodes if node.target in _PRODUCTS and self._of_x(node)]
        layers = [layer for node in products if (layer := self._layer(node)) is not None]
        taken: set[Layer] = set()
        for layer in sorted(layers, key=lambda each: each.plain):  # a plain one may be the shortcut of another layer
            if layer not in taken:
                free = {each.product: each for each in layers if each not in taken and each is not layer}
                self._extend(layer, free, taken)
        layers = _merged([layer for layer in layers if layer not in taken])
        shapes = _Writer(graph, layers, self._classes).write()
        graph.eliminate_dead_code()
        self._classes = classify(graph, self.conditions)
        left = self._operations()
        names = Counter(_name(node) for node in left if node.target is not run_layer)
        return Fusion(before, len(left), shapes, names, self._reasons)

    def _of_x(self, node: Any) -> bool:
        return isinstance(node, fx.Node) and bool(self._classes.get(node, X) & X)

    def _operations(self) -> list[fx.Node]:
        """Return the operations on x that launch kernels: views of memory and the parts of results do not."""
        views = {*RESHAPES, *COPIES[2:], aten.transpose.int, aten.permute.default, aten.unsqueeze.default,
                 aten.squeeze.dim, aten.unflatten.int, aten.slice.Tensor, aten.chunk.default, aten.split.Tensor,
                 aten.unbind.int, aten.select.int, aten.expand.default, aten.expand_as.default, operator.getitem,
                 as_image, shaped, side_vector, described_norm}  # fmt: skip
        calls = [node for node in self.graph.nodes if node.op == "call_function" and self._of_x(node)]
        return [node for node in calls if node.target not in views]

    def _layer(self, node: Any) -> Layer | None:
        """Return the layer of a product with all that stands before it; None, with a reason, where there is none."""
        reason = self._unfit(node)
        if reason is None:
            window = Window()
            if node.target is aten.conv2d.default:
                stride, (rows, columns), *_ = _options_of(node)
                window = Window(node.args[1].meta["val"].shape[-1], stride[0], rows, columns, rows, columns)
            dim = -1 if node.target is aten.linear.default else 1
            layer = Layer(node, Place(node, dim), [Place(node.args[0], dim)], window)
            self._look_back(layer)
            if all(place.value.dtype == node.meta["val"].dtype for place in layer.sources):
                return layer
            reason = "its inputs have another dtype"
        self._reasons[node.name] = reason
        return None

    def _unfit(self, node: Any) -> str | None:
        """Return why a product cannot be fused, if so."""
        value, weight = node.meta["val"], node.args[1]
        if self._of_x(weight):
            return "its weight depends on x"
        shape, dtype = weight.meta["val"].shape, weight.meta["val"].dtype
        if len(shape) < 2:
            return "its weight is a vector"
        if dtype not in DTYPES or value.dtype != dtype:
            return f"its output is {value.dtype} and its weight {dtype}"
        if node.target is aten.linear.default:
            return None if value.dim() >= 3 else "it is a linear layer of vectors"
        if value.dim() != len(shape):
            return "its input has no batch dimension"
        stride, padding, dilation, groups = _options_of(node)
        if groups != 1:
            return f"it has {groups} groups"
        if any(each != 1 for each in dilation):
            return "it is dilated"
        if len({*shape[2:]}) != 1 or shape[2] not in (1, 3):
            return f"its kernel is {' x '.join(map(str, shape[2:]))}"
        if len({*stride}) != 1 or stride[0] not in (1, 2):
            return f"its stride is {stride}"
        if node.target is aten.conv1d.default and (shape[2], stride[0], padding[0]) != (1, 1, 0):
            return "it is one-dimensional and more than a product"
        return None

    def _look_back(self, layer: Layer) -> None:
        """Walk backwards from the product and take in what the kernel does on the way to it."""
        stage, place = 0, layer.sources[0]
        dtype = layer.last.value.dtype
        spatial = layer.window != Window()
        while place.node.op == "call_function":
            target = place.node.target
            if stage < 1 and (window := _padded(layer.window, place)) is not None:
                layer.window, stage, spatial = window, 1, True
            elif stage < 2 and (window := _enlarged(layer.window, place)) is not None:
                layer.window, stage, spatial = window, 2, True
            elif stage < 3 and target is aten.silu.default:
                layer.silu, stage = True, 3
            elif stage < 4 and (found := self._modulated(place)) is not None:
                normed, layer.gain, layer.shift = found
                place, stage = Place(normed, place.dim), 4
                continue
            elif stage < 5 and target is aten.group_norm.default and place.dim == 1:
                layer.norm, stage = place.node, 5
            elif target in _CASTS and place.args[0].meta["val"].dtype in (dtype, torch.float32, torch.float64):
                pass  # norms in float32 between halves: the kernel computes there in float32, too
            elif (before := place.before(keep_size=spatial)) is not None:
                place = before
                continue
            elif (parts := _parts(place)) is not None:
                roots = [part.root(keep_size=spatial) for part in parts]
                alike = roots[0].size == roots[1].size
                layer.sources = roots if alike else [part.root(keep_size=True) for part in parts]
                return
            else:
                break
            place = Place(place.args[0], place.dim)
        layer.sources = [place]

    def _modulated(self, place: Place) -> tuple[Any, Any, Any] | None:
        """Return norm, factor and summand of norm · factor + summand, all per sample and channel; None for others."""
        node: Any = place.node
        factor: Any = None
        if place.dim != 1 or node.kwargs:
            return None
        if node.target is aten.addcmul.default:
            summand, normed, factor = node.args
            if not self._of_x(normed):
                normed, factor = factor, normed
        elif node.target is aten.add.Tensor:
            normed, summand = node.args if self._of_x(node.args[0]) else node.args[::-1]
            if getattr(normed, "target", None) is aten.mul.Tensor:
                normed, factor = normed.args if self._of_x(normed.args[0]) else normed.args[::-1]
        elif node.target is aten.mul.Tensor:
            normed, factor = node.args if self._of_x(node.args[0]) else node.args[::-1]
            summand = None
        else:
            return None
        if getattr(normed, "target", None) is not aten.group_norm.default:
            return None
        given = [each for each in (factor, summand) if each is not None]
        return (normed, factor, summand) if all(self._is_vector(each, place) for each in given) else None

    def _is_vector(self, node: Any, place: Place) -> bool:
        """Return whether a node without x holds a number for each channel of `place`, or each sample and channel."""
        if not isinstance(node, fx.Node) or self._of_x(node) or not isinstance(node.meta.get("val"), Tensor):
            return False
        expected, own = list(place.value.shape), list(node.meta["val"].shape)
        shape, dim = [1] * (len(expected) - len(own)) + own, place.dim % len(expected)
        return (
            len(shape) == len(expected)
            and shape[0] in (1, expected[0])
            and shape[dim] == expected[dim]
            and all(size == 1 for number, size in enumerate(shape) if number not in (0, dim))
        )

    def _extend(self, layer: Layer, others: Mapping[Any, Layer], taken: set[Layer]) -> None:
        """Walk forwards from the product and take in what the kernel does after it.

        Args:
            layer: The layer.
            others: The other layers, by their products.
            taken: Layers that another one has taken in; one may be added.
        """
        if layer.plain and self._is_shortcut(layer, others):
            return  # another layer will take it in
        place = layer.last
        while len(place.node.users) == 1:
            user: Any = next(iter(place.node.users))
            if (after := place.after(user)) is not None:
                place = after
                continue
            value = user.meta.get("val")
            if user.kwargs or not isinstance(value, Tensor) or value.dtype != place.value.dtype:
                return
            if user.target in (aten.mul.Tensor, aten.div.Tensor) and user.args[0] is place.node:
                factor = user.args[1]
                if isinstance(factor, (int, float)) and factor != 0:
                    layer.scale = factor if user.target is aten.mul.Tensor else 1 / factor
                    layer.last = Place(user, place.dim)
                return  # a later summand would not be scaled
            if user.target is not aten.add.Tensor or value.shape != place.value.shape or user in self._summed:
                return
            other = user.args[1] if user.args[0] is place.node else user.args[0]
            if not isinstance(other, fx.Node) or other is place.node:
                return
            if self._is_vector(other, place):
                layer.vectors.append(other)
            elif layer.residual is None and layer.shortcut is None and self._is_residual(other, place):
                shortcut = _at_root(others, Place(other, place.dim))
                if shortcut is not None and _fits(layer, shortcut):
                    layer.shortcut = shortcut
                    taken.add(shortcut)
                else:
                    layer.residual = Place(other, place.dim)
            else:
                return
            self._summed.add(user)
            place = layer.last = Place(user, place.dim)

    def _is_residual(self, node: fx.Node, place: Place) -> bool:
        value = node.meta["val"]
        return self._of_x(node) and value.shape == place.value.shape and value.dtype == place.value.dtype

    def _is_shortcut(self, layer: Layer, others: Mapping[Any, Layer]) -> bool:
        """Return whether the sum that reads a plain layer's output adds another layer, which can take this one in."""
        users = list(layer.product.users)
        if len(users) != 1 or users[0].target is not aten.add.Tensor:
            return False
        summands = [each for each in users[0].args if isinstance(each, fx.Node) and each is not layer.product]
        found = [_at_root(others, Place(each, layer.last.dim)) for each in summands]
        return any(other is not None and not other.plain for other in found)


class _Writer:
    """A writer of layers into a graph, in the order of their outputs."""

    def __init__(self, graph: fx.Graph, layers: Sequence[Layer], classes: dict[fx.Node, frozenset[str]]) -> None:
        self.graph, self.layers, self.classes = graph, layers, classes
        self._made: dict[Place, Any] = {}  # of what replaces a layer's last place: the layer's operation
        self._statistics: dict[Place, fx.Node] = {}  # of a source: those of its channels
        self._affine: dict[Any, fx.Node] = {}  # of a norm with its modulation: the affine map
        self._prepared: dict[Any, fx.Node] = {}
        self._first_weight: fx.Node | None = None

    def write(self) -> tuple[Shape, ...]:
        """Write all layers; return their shapes."""
        nodes = [node for node in self.graph.nodes if node.op != "placeholder"]
        of_x = [node for node in nodes if self.classes[node] & X]
        for node in nodes:  # what does not depend on x is there before the first layer
            if not self.classes[node] & X:
                of_x[0].prepend(node)
        order = {node: number for number, node in enumerate(self.graph.nodes)}
        written: list[tuple[Layer, list[Layer], Any]] = []
        for layer in sorted(self.layers, key=lambda each: order[each.last.node]):
            together = [layer, *layer.merged]
            with self.graph.inserting_before(min((each.last.node for each in together), key=order.__getitem__)):
                written.append((layer, together, self._write(layer, together)))
        return tuple(_shape(layer, together, made) for layer, together, made in written)

    def _write(self, layer: Layer, together: Sequence[Layer]) -> Any:
        """Write a layer with those that are merged with it; return its operation."""
        call = self.graph.call_function
        size = layer.sources[0].size
        out_size = layer.window.output_size(*size)
        shortcut = layer.shortcut
        weight = self._once(side_by_side, *(each.weight for each in together), shortcut and shortcut.weight)
        biases = [*(each.bias for each in together), shortcut and shortcut.bias]
        kind = "matmul" if layer.product.target is aten.linear.default else "conv"
        options: dict[str, Any] = {"tf32": tf32.in_force(kind), "tickets": self._tickets(weight)}
        if layer.silu:
            options["silu"] = True
        if layer.norm is not None:
            options["affine"] = self._affine_of(layer)
        if shortcut is not None:
            options["shortcut"] = [self._image(place, out_size) for place in shortcut.sources]
        if any(bias is not None for bias in biases):
            options["bias"] = self._once(sum_of_biases, *biases)
        if layer.vectors:
            options["vector"] = call(side_vector, (list(layer.vectors), layer.outputs))
        if layer.residual is not None:
            options["residual"] = self._image(layer.residual, out_size)
        if layer.scale != 1:
            options["scale"] = layer.scale
        sources = [self._image(place, size) for place in layer.sources]
        made = call(run_layer, (sources, weight, dataclasses.astuple(layer.window)), options)
        out = call(operator.getitem, (made, 0))
        first = 0
        for each in together:
            part = out
            if layer.merged:
                part = call(aten.slice.Tensor, (out, 1, first, first + each.outputs))
                first += each.outputs
            new = call(shaped, (part, list(each.last.value.shape), each.last.dim))
            new.meta["val"] = each.last.value
            self._made[Place(new, each.last.dim)] = made
            each.last.node.replace_all_uses_with(new)
            self._rename(each.last.node, new)
        return made

    def _rename(self, old: fx.Node, new: fx.Node) -> None:
        """Let layers that have not been written read `new` where they read `old`."""
        for layer in self.layers:
            for each in (layer, *layer.merged, *([layer.shortcut] if layer.shortcut else [])):
                each.sources = [replace(place, node=new) if place.node is old else place for place in each.sources]
                if each.residual is not None and each.residual.node is old:
                    each.residual = replace(each.residual, node=new)

    def _affine_of(self, layer: Layer) -> fx.Node:
        """Return the affine map of the layer's norm: of the layer that made the first source, if it made that last."""
        key = (layer.norm, layer.gain, layer.shift)
        if key in self._affine:
            return self._affine[key]
        _, groups, gamma, beta, eps = (*layer.norm.args, *(None, None, 1e-5)[len(layer.norm.args) - 2 :])[:5]
        channels = sum(place.channels for place in layer.sources)
        described = (channels, groups, eps, gamma, beta, layer.gain, layer.shift)
        norm = self.graph.call_function(described_norm, described)
        first, *rest = layer.sources
        maker = self._maker(first)
        if maker is not None and "then" not in maker.kwargs and all(self._is_known(place, maker) for place in rest):
            maker.prepend(norm)
            beside = [self._statistics_of(place) for place in rest]
            maker.kwargs = {**maker.kwargs, "then": norm, "beside": beside}
            found = self.graph.call_function(operator.getitem, (maker, 2))
        else:
            both = [self._statistics_of(place) for place in layer.sources]
            found = self.graph.call_function(norm_affine, (both, first.pixels, norm))
        self._affine[key] = found
        return found

    def _maker(self, place: Place) -> Any:
        """Return the operation of a layer if the place is all of its output; None otherwise."""
        root = place.root()
        whole = root in self._made and root.args[0].target is operator.getitem
        return self._made[root] if whole else None

    def _is_known(self, place: Place, maker: fx.Node) -> bool:
        """Return whether the statistics of a place can be there before the operation of a layer."""
        known = self._maker(place) or place.node
        return known is not maker and next(node for node in self.graph.nodes if node in (known, maker)) is known

    def _statistics_of(self, place: Place) -> fx.Node:
        """Return the statistics of a source's channels: those of its maker, or of an operation of their own."""
        if place not in self._statistics:
            maker = self._maker(place)
            if maker is not None:
                maker.kwargs = {**maker.kwargs, "stats": True}
                with self.graph.inserting_after(maker):
                    self._statistics[place] = self.graph.call_function(operator.getitem, (maker, 1))
            else:
                with self.graph.inserting_after(place.node):
                    image = self._image(place, place.size)
                with self.graph.inserting_after(image):
                    self._statistics[place] = self.graph.call_function(channel_stats, (image,))
        return self._statistics[place]

    def _tickets(self, weight: fx.Node) -> fx.Node:
        """Return the memory for tickets, one for all layers: calls of a network never run at the same time."""
        self._first_weight = self._first_weight or weight
        return self._once(zeros_for_tickets, self._first_weight)

    def _image(self, place: Place, size: tuple[int, int]) -> fx.Node:
        return self.graph.call_function(as_image, (place.node, place.dim, *size))

    def _once(self, function: Any, *arguments: Any) -> fx.Node:
        """Return a node that depends on parameters alone, the same one for the same arguments."""
        key = (function, arguments)
        if key not in self._prepared:
            node = self.graph.call_function(function, arguments)
            node.meta["val"] = function(*(each and each.meta["val"].to("meta") for each in arguments))
            self._prepared[key] = node
        return self._prepared[key]


def run_layer(
    sources: Sequence[Tensor], weight: Tensor, window: tuple[Any, ...], **options: Any
) -> tuple[Tensor, Tensor | None, Affine | None]:
    """Compute a layer."""
    return conv_fused(sources, weight, Window(*window), **options)


def side_by_side(*weights: Tensor | None) -> Tensor:
    """Return the weights of layers side by side, with that of a shortcut below, as `pack_weight` does."""
    *own, shortcut = weights
    return pack_weight(torch.cat([each.reshape(*each.shape[:2], -1) for each in own if each is not None]), shortcut)


def sum_of_biases(*biases: Tensor | None) -> Tensor:
    """Return the biases of layers side by side plus that of a shortcut, float32."""
    *own, shortcut = biases
    given = [each.float() for each in own if each is not None]
    if shortcut is not None:
        given = [given[0] + shortcut.float()] if given else [shortcut.float()]
    return torch.cat(given)


def zeros_for_tickets(weight: Tensor) -> Tensor:
    """Return the memory for tickets of layers, on the device of a weight."""
    return torch.zeros(TICKETS, dtype=torch.int32, device=weight.device)


def side_vector(vectors: Sequence[Tensor], channels: int) -> Tensor:
    """Return the sum of vectors as [B or 1, N]."""
    total, *rest = (each.reshape(-1, channels) for each in vectors)
    for each in rest:
        total = total + each
    return total if total.stride(1) == 1 else total.contiguous()


def described_norm(
    channels: int,
    groups: int,
    eps: float,
    gamma: Tensor | None,
    beta: Tensor | None,
    gain: Tensor | None,
    shift: Tensor | None,
) -> GroupNorm:
    """Return the norm, with its modulation as rows [B or 1, C]."""
    given = (each if each is None else each.reshape(-1, channels).contiguous() for each in (gain, shift))
    return GroupNorm(groups, eps, gamma, beta, *given)


def _shape(layer: Layer, together: Sequence[Layer], made: Any) -> Shape:
    """Return the sizes of a layer that was written."""
    options = made.kwargs
    return Shape(
        len(layer.sources[0].value), *layer.sources[0].size, tuple(place.channels for place in layer.sources),
        sum(each.outputs for each in together), layer.window,
        tuple(place.channels for place in layer.shortcut.sources) if layer.shortcut else (),
        "affine" in options, "silu" in options, "vector" in options, "residual" in options,
        "then" in options or "stats" in options,
    )  # fmt: skip


def _merged(layers: Sequence[Layer]) -> list[Layer]:
    """Make one layer of those that read the same and add nothing, such as query, key and value."""
    firsts: dict[Any, Layer] = {}
    kept = []
    for layer in layers:
        bare = layer.last.node is layer.product and layer.window.size == 1 and layer.shortcut is None
        key = (*layer.sources, layer.window, layer.norm, layer.gain, layer.shift, layer.silu, layer.bias is None)
        first = firsts.setdefault(key, layer) if bare else layer
        if first is layer:
            kept.append(layer)
        else:
            first.merged.append(layer)
    return kept


def _at_root(layers: Mapping[Any, Layer], place: Place) -> Layer | None:
    """Return the one of the layers whose output a place is, channel by channel; None where there is none."""
    root = place.root()
    found = layers.get(root.node)
    return found if found is not None and found.last == root else None


def _fits(layer: Layer, shortcut: Layer) -> bool:
    """Return whether another layer can be computed in the product of a layer."""
    return (
        shortcut.plain
        and len(shortcut.product.users) == 1
        and shortcut.last.value.numel() == layer.last.value.numel()
        and shortcut.outputs == layer.outputs
        and shortcut.sources[0].pixels == layer.last.pixels
    )


def _options_of(node: Any) -> tuple[Any, Any, Any, Any]:
    """Return stride, padding, dilation and groups of a convolution."""
    given, dims = list(node.args[3:]), node.args[1].meta["val"].dim() - 2
    defaults: list[Any] = [[1] * dims, [0] * dims, [1] * dims, 1]
    stride, padding, dilation, groups = given + defaults[len(given) :]
    return stride, padding, dilation, groups


def _parts(place: Place) -> list[Place] | None:
    """Return the two places that a concat puts side by side; None for other operations."""
    if place.node.target is not aten.cat.default:
        return None
    parts, *rest = place.args
    dims = place.value.dim()
    if len(parts) != 2 or parts[0] is parts[1] or (rest[0] if rest else 0) % dims != place.dim % dims:
        return None
    return [Place(part, place.dim) for part in parts]


def _padded(window: Window, place: Place) -> Window | None:
    """Return the window with the zeros of a pad around the image; None for other operations."""
    if place.node.target is not aten.pad.default or place.dim != 1 or place.value.dim() != 4:
        return None
    _, sizes, mode, value = (*place.args, *("constant", None)[len(place.args) - 2 :])[:4]
    if mode != "constant" or value not in (None, 0) or len(sizes) != 4 or min(sizes) < 0:
        return None
    left, right, top, bottom = sizes
    return replace(
        window, top=window.top + top, left=window.left + left, bottom=window.bottom + bottom, right=window.right + right
    )


def _enlarged(window: Window, place: Place) -> Window | None:
    """Return the window on an image that is enlarged twice; None for other operations."""
    if place.node.target is not aten.upsample_nearest2d.vec or place.dim != 1:
        return None
    before, after = place.args[0].meta["val"].shape, place.value.shape
    return replace(window, upsample=True) if after[2:] == (2 * before[2], 2 * before[3]) else None


def _name(node: fx.Node) -> str:
    """Return the name of an operation."""
    target: Any = node.target
    return str(target).split(".")[1] if isinstance(target, torch._ops.OpOverload) else str(target.__name__)
