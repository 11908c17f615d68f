"""MDTv2-XL/2 on ImageNet 256×256: configs/v2_s2.py, which names the sources, at another size.

Here script is run_ddp_master.sh; the mask ratio, the number of diffusion steps, data and sampling
are the same in both scripts.
"""

from mdt_jax import config as configs
from mdt_jax.models.mdt import SIZES


def get_config(variant=""):
    config = configs.base(__file__, "v2_s2.py")
    config.model.update(SIZES["XL"])  # code: models.py
    config.model.decoder_layers = 4  # script; the README says 2 for training, 4 for sampling
    config.data.batch_size = 256  # script: 32 × 8
    config.optim.lr = 3e-4  # code; constant: author, issue 47
    config.train.steps = 2_000_000  # ours; neither script nor README says
    return configs.variant(config, variant)
