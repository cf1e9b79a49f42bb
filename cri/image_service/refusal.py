"""The policy's no, as kubelet knows it: by the first word of the error."""

from oci.errors import PermissionDenied

_WORD = "SignatureValidationFailed"


def refusal(why: str) -> PermissionDenied:
    return PermissionDenied(f"{_WORD}: {why}")


def is_refusal(error: Exception) -> bool:
    return isinstance(error, PermissionDenied) and str(error).startswith(_WORD)
