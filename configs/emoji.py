"""Google's emoji, 32×32 in colour, in pixel space: docs/your-pictures.md.

benchmarks/emoji.py makes their folders. --config.model.num_classes=0 trains without the categories.
Every value is ours.
"""

from mdt_jax import config as configs


def get_config(variant=""):
    config = configs.default()
    config.model.update(hidden_size=128, depth=8, num_heads=4, patch_size=4, num_classes=-1)
    config.data.update(name="folder", path="emoji/train", image_size=32, channels=3, batch_size=64)
    config.optim.update(lr=1e-3, ema_decay=0.999)
    config.train.update(steps=20_000, sample_every=1000, checkpoint_every=500)
    config.sample.update(num_steps=100, guidance_scale=2.0, num_samples=1000)
    config.evaluation.reference = "emoji/test"
    return configs.variant(config, variant)
