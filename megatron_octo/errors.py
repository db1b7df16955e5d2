"""Errors a user can act on: what failed, the value, the fix. The command line prints them without a traceback."""


class OctoError(Exception):
    """A failure of ours with a message for the user; exit code 1.

    `what` states the fact with the offending value in it; `fix` says what to do about it.
    """

    exit_code = 1

    def __init__(self, what: str, *, fix: str = "") -> None:
        super().__init__(f"{what}\n  fix: {fix}" if fix else what)
        self.what, self.fix = what, fix


class BadInput(OctoError):
    """The user's settings or files are wrong; nothing was changed on disk; exit code 2."""

    exit_code = 2


class SettingsError(BadInput, ValueError):
    """A settings object that contradicts itself. A ValueError, so that tyro and pydantic report it too."""


class StoppedByWatch(OctoError):
    """A run was ended because it goes wrong in a way that going on would not mend: a person decides; exit code 3."""

    exit_code = 3


class VerificationError(OctoError):
    """A result did not pass its own check; exit code 1."""
