"""Your own colour pictures, 64×64 in pixel space: docs/your-pictures.md.

--config.data.path is their folder. Every value is ours, chosen for a first try: no run of
this recipe has been measured.
"""

from mdt_jax import config as configs


def get_config(variant=""):
    config = configs.default()
    config.model.update(hidden_size=192, depth=8, num_heads=6, patch_size=4, num_classes=-1)
    config.data.update(name="folder", image_size=64, channels=3, batch_size=32, flip=True)
    config.optim.update(lr=5e-4, ema_decay=0.999)
    config.train.update(steps=20_000, sample_every=1000, checkpoint_every=500)
    config.sample.update(num_steps=100, guidance_scale=2.0, num_samples=100, batch_size=36)
    return configs.variant(config, variant)
