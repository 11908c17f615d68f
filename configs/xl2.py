"""MDT-XL/2 on ImageNet 256×256: configs/s2.py, which names the sources, at another size."""

from mdt_jax import config as configs
from mdt_jax.models.mdt import SIZES


def get_config(variant=""):
    config = configs.base(__file__, "s2.py")
    config.model.update(SIZES["XL"])  # code: models.py
    config.data.batch_size = 256  # README: 64 × 4
    config.train.steps = 6_500_000  # paper: the longest of its table
    return configs.variant(config, variant)
