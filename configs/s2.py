"""MDT-S/2 on ImageNet 256×256, the base of the other recipes of MDT v1.

Sources: paper is arXiv 2303.14389v1; script, README and code are those of github.com/sail-sg/MDT,
branch mdtv1 (script: run.sh, code: image_train.py and models.py).
"""

from mdt_jax import config as configs
from mdt_jax.models.mdt import SIZES


def get_config(variant=""):
    config = configs.default()
    config.model.update(**SIZES["S"], patch_size=2)  # code: models.py
    config.model.update(decoder_layers=2, side_layers=1)  # script; paper, section 5.3
    config.model.num_classes = 1000  # ImageNet
    config.mask.ratio = 0.3  # script; paper, section 5.3
    config.diffusion.steps = 1000  # script
    config.data.update(name="tfds", path="imagenet2012")  # script
    config.data.update(image_size=256, channels=3)  # script
    config.data.update(batch_size=256, flip=True)  # script: 8 × 32; code: the ADM loader
    config.vae.path = "hf://stabilityai/sd-vae-ft-mse"  # code
    config.optim.update(name="adamw", lr=3e-4, clip_norm=0.0, ema_decay=0.9999)  # code
    config.train.update(steps=400_000)  # ours: where DiT's S and B are compared
    config.sample.update(num_steps=250, guidance_scale=3.8, guidance_power=4.0)  # script, code
    return configs.variant(config, variant)
