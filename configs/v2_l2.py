"""MDTv2-L/2 on ImageNet 256×256: configs/v2_s2.py, which names the sources, at another size.

The published script is for S/2 alone.
"""

from mdt_jax import config as configs
from mdt_jax.models.mdt import SIZES


def get_config(variant=""):
    config = configs.base(__file__, "v2_s2.py")
    config.model.update(SIZES["L"])  # code: models.py
    config.model.decoder_layers = 4  # code: the default; no script is for L
    config.data.batch_size = 256  # as S/2: 8 × 32
    config.optim.lr = 3e-4  # code; constant: author, issue 47
    config.train.steps = 400_000  # ours: where DiT's S and B are compared
    return configs.variant(config, variant)
