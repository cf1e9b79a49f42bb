"""The one edge between our kinds of error and gRPC's status codes."""

import errno

import grpc

from oci import errors

_CODES: dict[type[BaseException], grpc.StatusCode] = {
    errors.InvalidArgument: grpc.StatusCode.INVALID_ARGUMENT,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    errors.FailedPrecondition: grpc.StatusCode.FAILED_PRECONDITION,
    errors.PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    errors.ResourceExhausted: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
    errors.DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.Unimplemented: grpc.StatusCode.UNIMPLEMENTED,
    errors.Error: grpc.StatusCode.INTERNAL,
}

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM}


def code_of(error: BaseException) -> grpc.StatusCode:
    """The gRPC code that tells a client whose fault `error` is; UNKNOWN for a defect of ours."""
    for kind in type(error).__mro__:
        if kind in _CODES:
            return _CODES[kind]
    if isinstance(error, OSError):
        return grpc.StatusCode.RESOURCE_EXHAUSTED if error.errno in _FULL else grpc.StatusCode.INTERNAL
    return grpc.StatusCode.UNKNOWN


def is_expected(error: BaseException) -> bool:
    """Whether `error` was raised on purpose or by the kernel, rather than by a defect of ours."""
    return isinstance(error, errors.Error | OSError)


def text_of(error: BaseException) -> str:
    """What to tell a client: the error's own words, with its kind where it is not one of ours."""
    return str(error) if isinstance(error, errors.Error) else f"{type(error).__name__}: {error}"
