"""Which images may be taken: reads containers-policy.json(5) and says what it demands of an image.

The whole file is read strictly: one that is wrong anywhere refuses everything. Whether signatures meet what is demanded
is verified in a worker, see verification.py. Source: containers-policy.json(5); containers/image, signature/.
"""

import base64
import binascii
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cri.image_service import signed_identity, strict_json
from cri.image_service.demands import Demands, Fulcio, Pki, SignedBy, SigstoreSigned
from cri.image_service.reference import Reference
from cri.image_service.refusal import refusal
from cri.image_service.signed_identity import SignedIdentity
from cri.image_service.strict_json import Object
from oci.errors import Error

SYSTEM_POLICY = Path("/etc/containers/policy.json")  # where containers-policy.json(5) says; nodes may have none
_KEY_TYPES = ("GPGKeys", "signedByGPGKeys", "X509Certificates", "signedByX509CAs")
_REKOR = ("rekorPublicKeyPath", "rekorPublicKeyPaths", "rekorPublicKeyData", "rekorPublicKeyDatas")
_KEYS = ("keyPath", "keyPaths", "keyData", "keyDatas")


def demanded(path: Path | None, transport: str, scopes: Sequence[str], subject: str) -> Demands:
    """What the policy at `path` demands of the image's signatures, its key files read; empty where it demands none.

    Raises PermissionDenied starting "SignatureValidationFailed" where the image is rejected whatever its signatures
    are. `scopes` are the image's own, most specific first. No path means that nothing is required, and so does a node
    without the system's file; a file elsewhere that is missing, or any that is wrong, refuses.
    """
    policy = _read(path)
    rules = policy.rules(transport, scopes) if policy is not None else ()
    refusing = next((rule for rule in rules if isinstance(rule, _Refuses)), None)
    if refusing is not None:
        raise refusal(f"{path} {refusing.why} {subject}")
    return _demands(path, rules)


def demanded_of_any(path: Path | None) -> Demands:
    """All that the policy may demand, of whatever image. Raises PermissionDenied for a file or a key of no use."""
    policy = _read(path)
    if policy is None:
        return Demands()
    by_scope = [rules for scopes in policy.transports.values() for rules in scopes.values()]
    return _demands(path, [rule for rules in (policy.default, *by_scope) for rule in rules])


def of_namespace(default: Path | None, directory: Path | None, namespace: str) -> Path | None:
    """The policy for a pod's namespace: its own file in `directory` where there is one, else the default."""
    if directory is None or not namespace:
        return default
    if "/" in namespace or namespace in (".", ".."):
        raise refusal(f"{namespace!r} is not the name of a namespace")
    own = directory / f"{namespace}.json"
    try:
        own.lstat()  # a link to nowhere is a policy that cannot be read, and refuses
    except (FileNotFoundError, NotADirectoryError):
        return default
    except OSError as error:
        raise refusal(f"cannot look for policy {own}: {error.strerror}") from error
    return own


def registry_scopes(reference: Reference) -> list[str]:
    """The scopes of a registry's image, most specific first: reference, repository, namespaces, host, wildcards."""
    scopes = [f"{reference.name}@{reference.digest}"] if reference.digest else []
    if reference.tag and not reference.digest:
        scopes.append(reference.tagged)
    parts = reference.name.split("/")
    scopes += ["/".join(parts[:length]) for length in range(len(parts), 0, -1)]
    labels = reference.registry.partition(":")[0].split(".")
    scopes += ["*." + ".".join(labels[start:]) for start in range(1, len(labels))]
    return scopes


def file_scopes(path: Path) -> list[str]:
    """The scopes of an image from a local file or directory: its path and the directories above it."""
    resolved = path.resolve()
    return [str(resolved), *(str(parent) for parent in resolved.parents if str(parent) != "/")]


# ---- what a file says


@dataclass(frozen=True, slots=True)
class _Accepts:
    pass


@dataclass(frozen=True, slots=True)
class _Refuses:
    why: str


@dataclass(frozen=True, slots=True)
class _Material:
    """Keys or certificates, in files or in the policy itself."""

    paths: tuple[str, ...] = ()
    datas: tuple[bytes, ...] = ()

    def read(self) -> tuple[bytes, ...]:
        return (*(Path(path).read_bytes() for path in self.paths), *self.datas)


@dataclass(frozen=True, slots=True)
class _SignedBy:
    keys: _Material
    identity: SignedIdentity


@dataclass(frozen=True, slots=True)
class _Fulcio:
    authorities: _Material
    oidc_issuer: str
    subject_email: str

    def read(self) -> Fulcio:
        return Fulcio(b"\n".join(self.authorities.read()), self.oidc_issuer, self.subject_email)


@dataclass(frozen=True, slots=True)
class _Pki:
    roots: _Material
    intermediates: _Material
    subject_email: str
    subject_hostname: str

    def read(self) -> Pki:
        roots, intermediates = (b"\n".join(each.read()) for each in (self.roots, self.intermediates))
        return Pki(roots, intermediates, self.subject_email, self.subject_hostname)


@dataclass(frozen=True, slots=True)
class _SigstoreSigned:
    identity: SignedIdentity
    keys: _Material
    fulcio: _Fulcio | None
    pki: _Pki | None
    rekor_keys: _Material

    def read(self) -> SigstoreSigned:
        return SigstoreSigned(
            self.identity,
            self.keys.read(),
            self.fulcio.read() if self.fulcio is not None else None,
            self.pki.read() if self.pki is not None else None,
            self.rekor_keys.read(),
        )


_Rule = _Accepts | _Refuses | _SignedBy | _SigstoreSigned


@dataclass(frozen=True, slots=True)
class _Policy:
    default: tuple[_Rule, ...]
    transports: Mapping[str, Mapping[str, tuple[_Rule, ...]]]

    def rules(self, transport: str, scopes: Sequence[str]) -> tuple[_Rule, ...]:
        by_scope = self.transports.get(transport, {})
        return next((by_scope[scope] for scope in (*scopes, "") if scope in by_scope), self.default)


def _read(path: Path | None) -> _Policy | None:
    """The policy, None where nothing is required."""
    if path is None or (path == SYSTEM_POLICY and not os.path.lexists(path)):
        return None
    try:
        return _parsed(strict_json.parse(path.read_bytes(), f"policy {path}"), f"policy {path}")
    except OSError as error:
        raise refusal(f"cannot read policy {path}: {error.strerror}") from error
    except Error as error:
        raise refusal(str(error)) from error


def _demands(path: Path | None, rules: Sequence[_Rule]) -> Demands:
    try:
        return Demands(
            tuple(SignedBy(rule.keys.read(), rule.identity) for rule in rules if isinstance(rule, _SignedBy)),
            tuple(rule.read() for rule in rules if isinstance(rule, _SigstoreSigned)),
        )
    except OSError as error:
        why = f"{path} demands a key or certificate that cannot be read: {error.filename}: {error.strerror}"
        raise refusal(why) from error


def _parsed(content: Any, subject: str) -> _Policy:
    top = Object(content, subject, ("default",), ("transports",))
    transports = {}
    if "transports" in top:
        for transport, by_scope in _entries(top.raw("transports"), f"{subject}: transports"):
            where = f"{subject}: transport {transport!r}"
            transports[transport] = {
                scope: _rules(value, f"{where}, scope {scope!r}") for scope, value in _entries(by_scope, where)
            }
    return _Policy(_rules(top.raw("default"), f"{subject}: default"), transports)


def _entries(value: Any, subject: str) -> list[tuple[str, Any]]:
    if not isinstance(value, dict):
        raise Error(f"{subject} must be an object")
    return list(value.items())


def _rules(value: Any, subject: str) -> tuple[_Rule, ...]:
    if not isinstance(value, list) or not value:
        raise Error(f"{subject}: requirements must be a list that is not empty")
    return tuple(_rule(each, f"{subject}, requirement {number}") for number, each in enumerate(value, 1))


def _rule(value: Any, subject: str) -> _Rule:
    kind = Object(value, subject, ("type",), None).text("type")
    parse = _KINDS.get(kind)
    if parse is None:
        raise Error(f"{subject} is of unknown type {kind!r}")
    return parse(value, subject)


def _accepts(value: Any, subject: str) -> _Rule:
    Object(value, subject, ("type",))
    return _Accepts()


def _rejects(value: Any, subject: str) -> _Rule:
    Object(value, subject, ("type",))
    return _Refuses("rejects")


def _signed_base_layer(value: Any, subject: str) -> _Rule:
    fields = Object(value, subject, ("type", "baseLayerIdentity"))
    signed_identity.parse(fields.raw("baseLayerIdentity"), f"{subject}: baseLayerIdentity")
    return _Refuses("requires signedBaseLayer, which nothing implements, for")


def _signed_by(value: Any, subject: str) -> _Rule:
    keys = ("keyPath", "keyPaths", "keyData")
    fields = Object(value, subject, ("type", "keyType"), (*keys, "signedIdentity"))
    key_type = fields.text("keyType")
    if key_type not in _KEY_TYPES:
        raise Error(f"{subject}: keyType {key_type!r} is not one of {', '.join(_KEY_TYPES)}")
    made = _SignedBy(_material(fields, keys, exactly_one=True), _identity(fields))
    if key_type != "GPGKeys":
        return _Refuses(f"requires signedBy with keyType {key_type}, which nothing implements, for")
    return made


def _sigstore_signed(value: Any, subject: str) -> _Rule:
    fields = Object(value, subject, ("type",), (*_KEYS, "fulcio", "pki", *_REKOR, "signedIdentity"))
    sources = [name for name in (*_KEYS, "fulcio", "pki") if name in fields]
    if len(sources) != 1:
        raise Error(f"{subject} must have exactly one of {', '.join((*_KEYS, 'fulcio', 'pki'))}")
    made = _SigstoreSigned(
        _identity(fields),
        _material(fields, _KEYS),
        _fulcio(fields.raw("fulcio"), f"{subject}: fulcio") if "fulcio" in fields else None,
        _pki(fields.raw("pki"), f"{subject}: pki") if "pki" in fields else None,
        _material(fields, _REKOR),
    )
    has_rekor = made.rekor_keys != _Material()
    if made.fulcio is not None and not has_rekor:
        raise Error(f"{subject}: fulcio needs one of {', '.join(_REKOR)}")
    if made.pki is not None and has_rekor:
        raise Error(f"{subject}: pki takes no key of a Rekor log")
    return made


def _fulcio(value: Any, subject: str) -> _Fulcio:
    fields = Object(value, subject, ("oidcIssuer", "subjectEmail"), ("caPath", "caData"))
    made = _Fulcio(
        _material(fields, ("caPath", "caData"), exactly_one=True),
        fields.text("oidcIssuer"),
        fields.text("subjectEmail"),
    )
    if not made.oidc_issuer or not made.subject_email:
        raise Error(f"{subject}: oidcIssuer and subjectEmail must not be empty")
    return made


def _pki(value: Any, subject: str) -> _Pki:
    roots, intermediates = ("caRootsPath", "caRootsData"), ("caIntermediatesPath", "caIntermediatesData")
    subjects = ("subjectEmail", "subjectHostname")
    fields = Object(value, subject, (), (*roots, *intermediates, *subjects))
    email, hostname = (fields.text(name) if name in fields else "" for name in subjects)
    if not email and not hostname:
        raise Error(f"{subject} must have subjectEmail or subjectHostname")
    return _Pki(_material(fields, roots, exactly_one=True), _material(fields, intermediates), email, hostname)


def _identity(fields: Object) -> SignedIdentity:
    if "signedIdentity" not in fields:
        return SignedIdentity()
    return signed_identity.parse(fields.raw("signedIdentity"), f"{fields.subject}: signedIdentity")


def _material(fields: Object, names: tuple[str, ...], *, exactly_one: bool = False) -> _Material:
    """What stands under one of `names`, which end in Path, Paths, Data or Datas."""
    given = [name for name in names if name in fields]
    if len(given) > 1 or (exactly_one and not given):
        raise Error(f"{fields.subject} must have {'exactly' if exactly_one else 'at most'} one of {', '.join(names)}")
    if not given:
        return _Material()
    name = given[0]
    values = fields.texts(name) if name.endswith("s") else (fields.text(name),)
    if not all(values):
        raise Error(f"{fields.subject}: {name} is empty")
    if name.endswith(("Path", "Paths")):
        return _Material(paths=values)
    return _Material(datas=tuple(_decoded(each, f"{fields.subject}: {name}") for each in values))


def _decoded(text: str, subject: str) -> bytes:
    try:
        return base64.b64decode(text.replace("\n", "").replace("\r", ""), validate=True)  # base64(1) breaks lines
    except (binascii.Error, ValueError) as error:
        raise Error(f"{subject} is not base64") from error


_KINDS: dict[str, Callable[[Any, str], _Rule]] = {
    "insecureAcceptAnything": _accepts,
    "reject": _rejects,
    "signedBy": _signed_by,
    "sigstoreSigned": _sigstore_signed,
    "signedBaseLayer": _signed_base_layer,
}
