"""scikit-learn's 1,797 handwritten digits in pixel space: minutes on two CPU cores.

Every value is ours, chosen for this small set.
"""

from mdt_jax.config import default


def get_config(variant=""):
    config = default()
    config.model.hidden_size = 64
    config.model.depth = 6
    config.model.num_heads = 4
    config.data.batch_size = 64
    config.optim.lr = 2e-3
    config.optim.ema_decay = 0.998
    config.train.steps = 3000
    config.train.log_every = 1
    config.train.sample_every = 1000
    config.train.checkpoint_every = 500
    config.sample.num_steps = 100
    config.sample.guidance_scale = 2.0
    config.sample.num_samples = 1000
    if variant == "smoke":
        config.model.hidden_size = 16
        config.model.depth = 3
        config.model.num_heads = 2
        config.model.decoder_layers = 1
        config.data.batch_size = 16
        config.train.steps = 4
        config.train.sample_every = 2
        config.train.checkpoint_every = 2
        config.sample.num_steps = 3
        config.sample.num_samples = 20
        config.sample.batch_size = 10
    elif variant:
        raise ValueError(f"unknown variant {variant!r}; the only one is 'smoke'")
    return config
