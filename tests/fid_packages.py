"""pytorch-fid, torch-fidelity and clean-fid, and weights to give them and us.

They import torchvision, whose wheel on PyPI looks for operators that a CPU's PyTorch does not have;
none of them is used, so their names are enough.
"""

import numpy as np
import torch

from tests.published import zeros_like_published

NAMES = (
    "nms", "qnms", "roi_align", "qroi_align", "_roi_align_backward", "ps_roi_align",
    "_ps_roi_align_backward", "roi_pool", "_roi_pool_backward", "ps_roi_pool",
    "_ps_roi_pool_backward", "deform_conv2d", "_deform_conv2d_backward",
)  # fmt: skip
try:
    import torchvision  # noqa: F401
except RuntimeError:  # operator torchvision::nms does not exist
    _operators = torch.library.Library("torchvision", "FRAGMENT")
    for _name in NAMES:
        _operators.define(f"{_name}(Tensor x) -> Tensor")

from cleanfid import fid as clean_fid  # noqa: E402, F401
from pytorch_fid import fid_score, inception  # noqa: E402, F401
from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc  # noqa: E402, F401
from torch_fidelity.feature_extractor_inceptionv3 import (  # noqa: E402, F401
    FeatureExtractorInceptionV3,
)


def random_state(seed: int = 0) -> dict[str, np.ndarray]:
    """A state_dict of FID's Inception whose activations neither vanish nor explode."""
    random, state = np.random.RandomState(seed), {}
    for name, array in zeros_like_published().items():
        shape = array.shape
        if name.endswith(("conv.weight", "fc.weight")):
            values = random.normal(0, np.sqrt(2 / np.prod(shape[1:])), shape)
        elif name.endswith(("running_var", "bn.weight")):
            values = random.uniform(0.5, 1.5, shape)
        else:
            values = random.normal(0, 0.05, shape)
        state[name] = values.astype(np.float32)
    return state
