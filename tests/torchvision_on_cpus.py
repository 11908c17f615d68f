"""Makes torchvision importable: its wheel on PyPI looks for operators that a CPU's PyTorch lacks.

To be imported before diffusers, clean-fid and torch-fidelity, which import it. None of the
operators is used, so that their names are enough.
"""

import torch

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
