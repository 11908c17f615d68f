"""The errors for what a user can put right."""


class UserError(ValueError):
    """Says in one line what was wrong, where, and what to do. Commands print it and exit with 2."""


class NotFiniteError(UserError):
    """Samples hold NaN or infinity. A run in training goes on without them."""
