"""What the tests of the training step share."""

from mdt_jax.train.step import sample_losses, summary


def training_loss(model, objective, params, batch, draws):
    """(loss, what is logged of it)."""
    loss, values = sample_losses(model, objective, params, batch, draws)
    return loss, summary(model, objective, values, draws)
