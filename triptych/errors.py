"""The one exception that means "the user can mend this".

Every entry point (CLI, trainer, nodes) prints its sentence and exits non-zero, without a traceback.
"""


class TriptychError(ValueError):
    """Bad input, stated in one sentence: what is wrong, with the value, and the remedy."""
