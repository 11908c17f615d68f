"""MDT-XL/2 on LSUN bedroom 256×256, without classes.

The published project trained on ImageNet alone: the network and its training are those of
configs/xl2.py; the data and what follows from it are ours.
"""

from mdt_jax import config as configs


def get_config(variant=""):
    config = configs.default()
    config.model.update(hidden_size=1152, depth=28, num_heads=16, patch_size=2)  # xl2.py
    config.model.update(decoder_layers=2, side_layers=1)  # xl2.py
    config.model.num_classes = 0  # ours: one kind of picture
    config.mask.ratio = 0.3  # xl2.py
    config.diffusion.steps = 1000  # xl2.py
    # Prepared by: tfds build lsun/bedroom --file_format=array_record
    config.data.update(name="tfds", path="lsun/bedroom")  # ours: 3,033,042 images
    config.data.update(image_size=256, channels=3)  # xl2.py
    config.data.update(batch_size=256, flip=True)  # xl2.py
    config.vae.path = "hf://stabilityai/sd-vae-ft-mse"  # xl2.py
    config.optim.update(name="adamw", lr=3e-4, clip_norm=0.0, ema_decay=0.9999)  # xl2.py
    config.train.update(steps=500_000)  # ours
    config.sample.update(num_steps=250, guidance_scale=1.0)  # ours: nothing to guide by
    return configs.variant(config, variant)
