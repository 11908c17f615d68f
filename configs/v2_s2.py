"""MDTv2-S/2 on ImageNet 256×256, the base of the other recipes of MDTv2.

Sources: script, README, code and author are those of github.com/sail-sg/MDT, branch main (script:
run.sh; code: image_train.py, models.py and train_util.py).
"""

from mdt_jax import config as configs
from mdt_jax.models.mdt import SIZES


def get_config(variant=""):
    config = configs.default()
    config.model.version = "v2"  # code
    config.model.update(**SIZES["S"], patch_size=2)  # code: models.py
    config.model.decoder_layers = 6  # script; README and code say 4
    config.model.update(side_layers=1, num_classes=1000)  # code; ImageNet
    config.mask.update(ratio=0.3, ratio_max=0.5)  # script; code: 0.2 is added to it
    config.diffusion.update(steps=1000, loss_weight="min_snr_5")  # script; code
    config.data.update(name="tfds", path="imagenet2012")  # script
    config.data.update(image_size=256, channels=3)  # script
    config.data.update(batch_size=256, flip=True)  # script: 8 × 32; code: the ADM loader
    config.vae.path = "hf://stabilityai/sd-vae-ft-mse"  # code
    config.optim.update(name="adan", lr=5e-4)  # code; rate: script; constant: author, issue 47
    config.optim.update(clip_norm=1.0, ema_decay=0.9999)  # code
    config.train.update(steps=400_000)  # ours: where DiT's S and B are compared
    config.sample.update(num_steps=250, guidance_scale=3.8, guidance_power=4.0)  # script, code
    return configs.variant(config, variant)
