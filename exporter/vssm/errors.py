"""Exceptions that callers may want to catch; everything else is a ValueError or TypeError."""


class VssmError(Exception):
    """Base of the package's own exceptions; the command line turns it into exit code 2."""


class CheckpointError(VssmError):
    """A checkpoint cannot be read, or does not fit the model."""


class ArtifactError(VssmError):
    """An exported directory is missing something, was changed, or cannot be written."""


class RuntimeUnavailableError(VssmError):
    """A runtime, provider or native library that was asked for is not there."""


class MissingPackageError(VssmError, ImportError):
    """A package that only some functions need is not installed; the message names the extra."""


class UnsupportedError(VssmError):
    """What was asked for is well-formed, but this model or runtime cannot do it."""
