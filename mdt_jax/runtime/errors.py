"""The errors for what a user can put right."""


class UserError(ValueError):
    """Says in one line what was wrong, where, and what to do. Commands print it and exit with 2."""


class DamagedError(UserError):
    """A file of our own does not hold what was written to it."""


class NotFiniteError(UserError):
    """Samples hold NaN or infinity. A run in training goes on without them."""
