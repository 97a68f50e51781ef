"""Where elements lie in memory: the three strides against torch's own indexing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_fast.kernels.layout import layout_of


def check(tensor):
    """Read the tensor's storage by the layout and compare; or, without a layout, see that there is none."""
    layout = layout_of(tensor)
    sample = tensor.reshape(*tensor.shape[:2], -1)
    if layout is None:
        with pytest.raises(RuntimeError, match="view size is not compatible"):
            tensor.view(*tensor.shape[:2], -1)
        return
    b, c, p = (torch.arange(size) for size in (len(tensor), layout.channels, layout.pixels))
    places = b[:, None, None] * layout.batch + c[:, None] * layout.channel + p * layout.pixel
    storage = tensor.as_strided((tensor.untyped_storage().size() // tensor.element_size(),), (1,), 0)
    assert torch.equal(storage[places + tensor.storage_offset()], sample)
    assert (layout.channels, layout.pixels) == tuple(sample.shape[1:])
    steps = tensor[:1].stride()
    assert layout.row_major == tensor[:1].is_contiguous() or steps[0] < 0
    assert layout.overlaps_itself(len(tensor)) == (places.unique().numel() < places.numel())


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_against_torch(data):
    shape = data.draw(st.lists(st.integers(1, 5), min_size=2, max_size=5), "shape")
    order = data.draw(st.permutations(range(len(shape))), "order")
    stored = [shape[i] for i in order]
    margins = data.draw(st.lists(st.integers(0, 1), min_size=len(shape), max_size=len(shape)), "margins")
    steps = data.draw(st.lists(st.integers(1, 2), min_size=len(shape), max_size=len(shape)), "steps")
    sizes = torch.Size([s * k + m for s, k, m in zip(stored, steps, margins, strict=True)])
    whole = torch.arange(sizes.numel()).view(sizes)
    part = whole[tuple(slice(m, None, k) for m, k in zip(margins, steps, strict=True))]
    check(part.permute([order.index(i) for i in range(len(shape))]))


@pytest.mark.parametrize("sizes", [(2, 1, 4), (2, 3, 1), (1, 3, 4), (2, 1, 1, 5)], ids=str)
def test_expanded_dimensions_overlap(sizes):
    tensor = torch.arange(torch.Size(sizes).numel()).view(sizes)
    check(tensor)
    check(tensor.expand(*(4 if size == 1 else size for size in sizes)))
