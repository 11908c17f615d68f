"""DiT-XL/2 on ImageNet 256×256: the baseline, trained as MDT-XL/2 is; see configs/dit_s2.py."""

from mdt_jax import config as configs
from mdt_jax.models.mdt import SIZES


def get_config(variant=""):
    config = configs.base(__file__, "dit_s2.py")
    config.model.update(SIZES["XL"])  # as DiT
    config.train.steps = 7_000_000  # DiT: its longest
    return configs.variant(config, variant)
