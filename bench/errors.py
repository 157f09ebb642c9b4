"""`UsageError`: what the user asked for cannot be done, found before anything is measured."""


class UsageError(Exception):
    """A wrong or impossible option; its message names the option and what was expected."""
