"""Which name a signature must bear to count for an image: "signedIdentity" of containers-policy.json(5)."""

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from cri.image_service import reference as references
from cri.image_service.reference import Reference
from cri.image_service.strict_json import Object
from oci.errors import Error, InvalidArgument

_HEX_64 = re.compile(r"[0-9a-f]{64}")


class Match(StrEnum):
    EXACT = "matchExact"
    REPO_DIGEST_OR_EXACT = "matchRepoDigestOrExact"
    REPOSITORY = "matchRepository"
    EXACT_REFERENCE = "exactReference"
    EXACT_REPOSITORY = "exactRepository"
    REMAP = "remapIdentity"


_FIELDS: dict[Match, tuple[str, ...]] = {
    Match.EXACT: (),
    Match.REPO_DIGEST_OR_EXACT: (),
    Match.REPOSITORY: (),
    Match.EXACT_REFERENCE: ("dockerReference",),
    Match.EXACT_REPOSITORY: ("dockerRepository",),
    Match.REMAP: ("prefix", "signedPrefix"),
}


@dataclass(frozen=True, slots=True)
class SignedIdentity:
    match: Match = Match.REPO_DIGEST_OR_EXACT
    name: str = ""  # the reference, or repository, that a signature must bear whatever the image's own name is
    prefix: str = ""
    signed_prefix: str = ""

    def accepts(self, image: str, signed: str) -> bool:
        """Whether a signature for the name `signed` counts for the image that is meant by `image`, "" for none."""
        found = _normalized(signed)
        if found is None:
            return False
        if self.match in (Match.EXACT_REFERENCE, Match.EXACT_REPOSITORY):
            wanted = _normalized(self.name)
        else:
            wanted = _normalized(image)
        if wanted is None:
            return False
        if self.match is Match.REMAP:
            remapped = self._remapped(wanted)
            return remapped is not None and _matches_repo_digest_or_exact(remapped, found)
        if self.match is Match.REPO_DIGEST_OR_EXACT:
            return _matches_repo_digest_or_exact(wanted, found)
        if self.match in (Match.REPOSITORY, Match.EXACT_REPOSITORY):
            return wanted.name == found.name
        return not _is_name_only(wanted) and str(wanted) == str(found)

    def _remapped(self, wanted: Reference) -> Reference | None:
        """`wanted` with the signed prefix where it has the prefix, at a "/"; None where that makes no name."""
        if wanted.name != self.prefix and not wanted.name.startswith(f"{self.prefix}/"):
            return wanted
        try:
            remapped = references.parse(self.signed_prefix + str(wanted)[len(self.prefix) :])
        except InvalidArgument:
            return None
        return None if remapped.is_short else remapped


def parse(value: Any, subject: str) -> SignedIdentity:
    """The identity that a requirement's "signedIdentity" describes. Raises Error naming `subject` and what is wrong."""
    kind = Object(value, subject, ("type",), None).text("type")
    try:
        match = Match(kind)
    except ValueError:
        raise Error(f"{subject}: type {kind!r} is not one of {', '.join(Match)}") from None
    fields = Object(value, subject, ("type", *_FIELDS[match]))
    if match is Match.REMAP:
        prefix, signed_prefix = fields.text("prefix"), fields.text("signedPrefix")
        for prefix_text in (prefix, signed_prefix):
            if not _is_prefix(prefix_text):
                raise Error(f"{subject}: prefix {prefix_text!r} is not host[:port][/path]")
        return SignedIdentity(match, prefix=prefix, signed_prefix=signed_prefix)
    name = fields.text(_FIELDS[match][0]) if _FIELDS[match] else ""
    if name:
        parsed = _normalized(name)
        if parsed is None:
            raise Error(f"{subject}: {name!r} is not the name of an image")
        if match is Match.EXACT_REFERENCE and _is_name_only(parsed):
            raise Error(f"{subject}: dockerReference {name!r} has neither tag nor digest")
    elif _FIELDS[match]:
        raise Error(f"{subject}: {_FIELDS[match][0]} is empty")
    return SignedIdentity(match, name)


def _matches_repo_digest_or_exact(wanted: Reference, signed: Reference) -> bool:
    """A name by tag must be the signed one; one by digest must have its repository: the digest is verified anyway."""
    if _is_name_only(signed):
        return False
    if wanted.tag:
        return str(signed) == str(wanted)
    return bool(wanted.digest) and signed.name == wanted.name


def _is_name_only(reference: Reference) -> bool:
    return not reference.tag and not reference.digest


def _normalized(text: str) -> Reference | None:
    """The full name that `text` spells; one without a registry is Docker Hub's. None for what is no name."""
    try:
        parsed = references.parse(text)
    except InvalidArgument:
        return None
    if parsed.is_short:
        if _HEX_64.fullmatch(text):  # an image's id, which is no name (distribution/reference, normalize.go)
            return None
        return references.with_registry(parsed, references.DOCKER_HUB)
    return parsed


def _is_prefix(text: str) -> bool:
    """Whether `text` is host[:port], or a name without tag and digest."""
    try:
        parsed = references.parse(text if "/" in text else f"{text}/name")
    except InvalidArgument:
        return False
    return _is_name_only(parsed)
