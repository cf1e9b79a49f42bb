"""The kinds of error that Crito raises on purpose: who is at fault, and whether another try can help.

Every message says what was tried, on what, and what was seen. `OSError` passes through the leaves unchanged.
Only `cri/errors.py` knows which gRPC code a kind becomes.
"""


class Error(Exception):
    """Something failed that nobody outside can mend; the base of all kinds."""


class InvalidArgument(Error):
    """The request is wrong whatever the state; the text names the field and its value."""


class NotFound(Error):
    """The object that the request names does not exist."""


class AlreadyExists(Error):
    """Another object has this identity."""


class FailedPrecondition(Error):
    """The request is right but not in this state."""


class PermissionDenied(Error):
    """A policy or a registry refuses."""


class ResourceExhausted(Error):
    """The node lacks room: disk, memory, addresses."""


class Unavailable(Error):
    """Something outside (registry, D-Bus, network plugin) does not answer; another try may help."""


class DeadlineExceeded(Error):
    """It took longer than it may."""


class Unimplemented(Error):
    """Crito cannot do this, or this host cannot."""
