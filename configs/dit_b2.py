"""DiT-B/2 on ImageNet 256×256: the baseline, trained as MDT-B/2 is; see configs/dit_s2.py."""

from mdt_jax import config as configs
from mdt_jax.models.mdt import SIZES


def get_config(variant=""):
    config = configs.base(__file__, "dit_s2.py")
    config.model.update(SIZES["B"])  # as DiT
    config.train.steps = 400_000  # ours: where DiT's S and B are compared
    return configs.variant(config, variant)
