"""pytorch-fid, torch-fidelity and clean-fid, and weights to give them and us."""

# ruff: noqa: I001, E402, F401

import numpy as np

from tests import torchvision_on_cpus
from tests.published import zeros_like_published

from cleanfid import fid as clean_fid
from pytorch_fid import fid_score, inception
from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc
from torch_fidelity.feature_extractor_inceptionv3 import (
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
