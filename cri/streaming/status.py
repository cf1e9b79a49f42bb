"""How a session ended, as clients read it from the error stream: a metav1.Status from protocol v4 on, text before."""

import json
from typing import Any


def success(is_json: bool) -> bytes:
    """Before v4 success is silence."""
    return _encode({"metadata": {}, "status": "Success"}) if is_json else b""


def exit_code(code: int, is_json: bool) -> bytes:
    """The process has ended with `code`, which is not 0."""
    message = f"command terminated with non-zero exit code: {code}"
    if not is_json:
        return message.encode()
    causes = [{"reason": "ExitCode", "message": str(code)}]
    return _encode(
        {
            "metadata": {},
            "status": "Failure",
            "message": message,
            "reason": "NonZeroExitCode",
            "details": {"causes": causes},
        }
    )


def failure(message: str, is_json: bool) -> bytes:
    """The process was not started, or nobody knows how it ended."""
    if not is_json:
        return message.encode()
    return _encode(
        {
            "metadata": {},
            "status": "Failure",
            "message": f"Internal error occurred: {message}",
            "reason": "InternalError",
            "details": {"causes": [{"message": message}]},
            "code": 500,
        }
    )


def _encode(status: dict[str, Any]) -> bytes:
    return json.dumps(status, separators=(",", ":")).encode()
