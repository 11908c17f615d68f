"""MDT-L/2 on ImageNet 256×256: configs/s2.py, which names the sources, at another size."""

from mdt_jax import config as configs
from mdt_jax.models.mdt import SIZES


def get_config(variant=""):
    config = configs.base(__file__, "s2.py")
    config.model.update(SIZES["L"])  # code: models.py
    config.data.batch_size = 256  # as S/2: 8 × 32
    config.train.steps = 400_000  # ours: where DiT's S and B are compared
    return configs.variant(config, variant)
