import jax
import numpy as np
import pytest

from mdt_jax.runtime.errors import UserError
from mdt_jax.weights.inception_names import from_published, shapes, to_published
from tests.published import zeros_like_published


@pytest.fixture(scope="module")
def state():
    """Names and shapes of the published file, numbered values."""
    return {
        name: np.arange(array.size, dtype=np.float32).reshape(array.shape)
        for name, array in zeros_like_published().items()
    }


def test_the_numbers_of_the_published_network(state):
    learned = [array.size for name, array in state.items() if "running" not in name]
    # torchvision's Inception3 without its auxiliary head: 23,834,568 of which 1000·2049 are logits.
    assert sum(learned) == 23_834_568 + 8 * 2049
    assert sum(name.endswith("conv.weight") for name in state) == 94


def test_there_and_back_every_key_is_bit_equal(state):
    model, params = from_published({**state, "Conv2d_1a_3x3.bn.num_batches_tracked": np.array(0)})
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda s: s.shape, shapes(model))
    kernel = state["Mixed_6b.branch7x7_2.conv.weight"]
    assert params["Mixed_6b"]["branch7x7_2"]["conv"]["kernel"].shape == (1, 7, 128, 128)
    assert params["Mixed_6b"]["branch7x7_2"]["conv"]["kernel"][0, 3, 5, 9] == kernel[9, 5, 0, 3]
    back = to_published(model, params)
    assert set(back) == set(state)
    for name, array in state.items():
        assert back[name].dtype == array.dtype
        np.testing.assert_array_equal(back[name], array)


def test_other_weights_are_refused_by_name(state):
    with pytest.raises(UserError, match="unexpected Mixed_8a.bias"):
        from_published({**state, "Mixed_8a.bias": np.zeros(1)})
    with pytest.raises(UserError, match="missing fc.weight"):
        from_published({name: array for name, array in state.items() if name != "fc.weight"})
    with pytest.raises(UserError, match=r"Mixed_7c\.branch_pool\.bn\.bias has the shape \[3\]"):
        from_published({**state, "Mixed_7c.branch_pool.bn.bias": np.zeros(3)})


def test_torchvisions_inception_is_refused_by_name(state):
    """The same names and shapes, but for its second head, which is not always there, and 1,000."""
    head = {"fc.weight": np.zeros((1000, 2048)), "fc.bias": np.zeros(1000)}
    with_second = {**state, **head, "AuxLogits.fc.bias": np.zeros(1000)}
    for theirs in (with_second, {**state, **head}):
        with pytest.raises(UserError, match="torchvision's Inception v3; FID's.*pt_inception-2015"):
            from_published(theirs)
