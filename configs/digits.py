"""scikit-learn's 1,797 handwritten digits in pixel space: minutes on two CPU cores.

Every value is ours, chosen for this small set.
"""

from mdt_jax import config as configs


def get_config(variant=""):
    config = configs.default()
    config.model.update(hidden_size=64, depth=6, num_heads=4)
    config.data.batch_size = 64
    config.optim.update(lr=2e-3, ema_decay=0.998)
    config.train.update(steps=3000, log_every=10, sample_every=1000, checkpoint_every=500)
    config.sample.update(num_steps=100, guidance_scale=2.0, num_samples=1000)
    return configs.variant(config, variant)
