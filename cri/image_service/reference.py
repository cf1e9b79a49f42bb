"""Names of images: parsing and writing them by the rules of the distribution project's reference grammar."""

import re
from dataclasses import dataclass, replace

from oci.errors import InvalidArgument

DOCKER_HUB = "docker.io"
_ALPHANUMERIC = r"[a-z0-9]+"
_PATH_COMPONENT = rf"{_ALPHANUMERIC}(?:(?:[._]|__|-+){_ALPHANUMERIC})*"
_REPOSITORY = re.compile(rf"{_PATH_COMPONENT}(?:/{_PATH_COMPONENT})*")
_HOST_COMPONENT = r"(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])"
_REGISTRY = re.compile(rf"(?:{_HOST_COMPONENT}(?:\.{_HOST_COMPONENT})*|\[[a-fA-F0-9:]+\])(?::[0-9]{{1,5}})?")
_TAG = re.compile(r"\w[\w.-]{0,127}", re.ASCII)
_DIGEST_LENGTHS = {"sha256": 64, "sha512": 128}
_NAME_LIMIT = 255


@dataclass(frozen=True, slots=True)
class Reference:
    """An image's name; `registry` is "" for a short name such as "busybox:1.36"."""

    registry: str
    repository: str
    tag: str = ""
    digest: str = ""

    @property
    def name(self) -> str:
        """Registry and repository, without tag and digest."""
        return f"{self.registry}/{self.repository}" if self.registry else self.repository

    @property
    def is_short(self) -> bool:
        return not self.registry

    @property
    def tagged(self) -> str:
        """ "name:tag", or "" where there is no tag."""
        return f"{self.name}:{self.tag}" if self.tag else ""

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        digest = f"@{self.digest}" if self.digest else ""
        return f"{self.name}{tag}{digest}"


def parse(text: str) -> Reference:
    """The reference that `text` spells, without defaults for registry and tag, except docker.io's "library/".

    Raises InvalidArgument naming the text and what is wrong with it.
    Source: distribution/reference, grammar in reference.go; a leading part is a registry when it holds a dot, a colon
    or an upper-case letter, or is "localhost".
    """
    if not text:
        raise InvalidArgument("image reference is empty")
    rest, _, digest = text.partition("@")
    if "@" in text:
        check_digest(digest, text)
    registry, rest = _split_registry(rest)
    repository, colon, tag = rest.partition(":")
    if colon and not _TAG.fullmatch(tag):
        raise InvalidArgument(f"invalid image reference {text!r}: {tag!r} is not a tag")
    if registry and not _REGISTRY.fullmatch(registry):
        raise InvalidArgument(f"invalid image reference {text!r}: {registry!r} is not a registry's host[:port]")
    if not _REPOSITORY.fullmatch(repository):
        raise InvalidArgument(f"invalid image reference {text!r}: {_why_no_repository(repository)}")
    reference = with_registry(Reference("", repository, tag, digest), registry)
    if len(reference.name) > _NAME_LIMIT:
        raise InvalidArgument(f"invalid image reference {text!r}: the name is longer than {_NAME_LIMIT} characters")
    return reference


def with_registry(reference: Reference, registry: str) -> Reference:
    """`reference` at `registry`; on Docker Hub a name of one part is below "library/"."""
    if registry == "index.docker.io":
        registry = DOCKER_HUB
    repository = reference.repository
    if registry == DOCKER_HUB and "/" not in repository:
        repository = f"library/{repository}"
    return replace(reference, registry=registry, repository=repository)


def with_default_tag(reference: Reference) -> Reference:
    """`reference` with the tag "latest" where it has neither tag nor digest."""
    if reference.tag or reference.digest:
        return reference
    return replace(reference, tag="latest")


def check_digest(digest: str, subject: str) -> None:
    """Raises InvalidArgument unless `digest` is "sha256:<64 hex>" or "sha512:<128 hex>"."""
    algorithm, _, encoded = digest.partition(":")
    length = _DIGEST_LENGTHS.get(algorithm)
    if length is None or len(encoded) != length or not re.fullmatch(r"[0-9a-f]+", encoded):
        raise InvalidArgument(f"invalid image reference {subject!r}: {digest!r} is not a sha256 or sha512 digest")


def is_image_id(text: str) -> bool:
    """Whether `text` is an image's id, with or without "sha256:"."""
    return re.fullmatch(r"(sha256:)?[0-9a-f]{64}", text) is not None


def _split_registry(text: str) -> tuple[str, str]:
    first, slash, rest = text.partition("/")
    if slash and (first == "localhost" or "." in first or ":" in first or first != first.lower()):
        return first, rest
    return "", text


def _why_no_repository(repository: str) -> str:
    if repository != repository.lower():
        return f"repository {repository!r} must be lower case"
    return f"{repository!r} is not a repository name"
