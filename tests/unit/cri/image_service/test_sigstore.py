"""A sigstore signature counts where one who is trusted has made it, of just this payload, at a time that was right."""

import base64
import json
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID

from cri.image_service.demands import Demands, Fulcio, Pki, SigstoreSigned
from cri.image_service.signature import ANNOTATION, Format, Signature, claim
from cri.image_service.signed_identity import Match, SignedIdentity
from cri.image_service.sigstore import BUNDLE, CERTIFICATE, CHAIN, verified
from cri.image_service.verification import check
from oci.errors import Error, PermissionDenied
from tests.fakes.signing import (
    COSIGN,
    EMAIL,
    ISSUER,
    SIGNED_AT,
    SIMPLE,
    Authority,
    Log,
    PrivateKey,
    certified,
    new_key,
    payload,
    public_pem,
    signature,
)

DIGEST = "sha256:" + "a" * 64
IDENTITY = SignedIdentity(Match.REPOSITORY)
PAYLOAD = payload(DIGEST, "a.io/x:1", COSIGN)
KEY = new_key()
LOG = Log()
AUTHORITY = Authority()
LATER = SIGNED_AT + timedelta(days=400)  # when all certificates have expired


def by_key(*keys: PrivateKey, logs: tuple[Log, ...] = ()) -> SigstoreSigned:
    pems = tuple(public_pem(each) for each in keys)
    return SigstoreSigned(IDENTITY, pems, rekor_keys=tuple(public_pem(each.key) for each in logs))


def by_fulcio(**changes: Any) -> SigstoreSigned:
    fulcio = replace(Fulcio(AUTHORITY.root, ISSUER, EMAIL), **changes)
    return SigstoreSigned(IDENTITY, fulcio=fulcio, rekor_keys=(public_pem(LOG.key),))


def keyless(log: Log = LOG, moment: datetime = SIGNED_AT, **changes: Any) -> Signature:
    certificate = AUTHORITY.certificate(KEY, **changes)
    return log.recorded(certified(AUTHORITY, KEY, PAYLOAD, certificate), certificate, moment)


# ---- keys


@pytest.mark.parametrize(
    "make",
    [
        new_key,
        lambda: ec.generate_private_key(ec.SECP384R1()),
        lambda: rsa.generate_private_key(65537, 2048),
        ed25519.Ed25519PrivateKey.generate,
    ],
)
def test_a_signature_by_a_key_of_each_kind_counts(make: Callable[[], PrivateKey]) -> None:
    key = make()

    assert verified(signature(key, PAYLOAD), by_key(key), LATER) == PAYLOAD


def test_one_of_several_keys_suffices() -> None:
    assert verified(signature(KEY, PAYLOAD), by_key(new_key(), KEY), LATER) == PAYLOAD


def test_another_key_does_not_count() -> None:
    with pytest.raises(Error, match="no key of the policy made the signature"):
        verified(signature(new_key(), PAYLOAD), by_key(KEY), LATER)


def test_another_payload_than_the_signed_one_does_not_count() -> None:
    changed = replace(signature(KEY, PAYLOAD), content=PAYLOAD.replace(b"a.io/x", b"a.io/y"))

    with pytest.raises(Error, match="no key of the policy"):
        verified(changed, by_key(KEY), LATER)


@pytest.mark.parametrize(
    ("annotations", "complaint"),
    [({}, "has no dev.cosignproject"), ({ANNOTATION: "%"}, "not base64"), ({ANNOTATION: "AAAA"}, "no key of")],
)
def test_what_is_no_signature_does_not_count(annotations: dict[str, str], complaint: str) -> None:
    with pytest.raises(Error, match=complaint):
        verified(Signature(Format.SIGSTORE, PAYLOAD, annotations), by_key(KEY), LATER)


def test_base64_may_have_line_ends() -> None:
    made = signature(KEY, PAYLOAD)
    encoded = made.annotations[ANNOTATION]

    broken = replace(made, annotations={ANNOTATION: encoded[:40] + "\r\n" + encoded[40:] + "\n"})
    assert verified(broken, by_key(KEY), LATER) == PAYLOAD


def test_a_broken_key_in_the_policy_is_told() -> None:
    wanted = SigstoreSigned(IDENTITY, (public_pem(KEY), b"no key"))

    with pytest.raises(Error, match="the policy's key is not a public key in PEM"):
        verified(signature(KEY, PAYLOAD), wanted, LATER)


# ---- keys, logged


def test_a_key_may_have_to_be_logged() -> None:
    logged = LOG.recorded(signature(KEY, PAYLOAD), public_pem(KEY))

    assert verified(logged, by_key(new_key(), KEY, logs=(Log(), LOG)), LATER) == PAYLOAD
    with pytest.raises(Error, match=r"has no dev\.sigstore\.cosign/bundle"):
        verified(signature(KEY, PAYLOAD), by_key(KEY, logs=(LOG,)), LATER)


def test_the_log_must_be_the_trusted_one() -> None:
    with pytest.raises(Error, match="the Rekor bundle is not signed by the log's key"):
        verified(Log().recorded(signature(KEY, PAYLOAD), public_pem(KEY)), by_key(KEY, logs=(LOG,)), LATER)


@pytest.mark.parametrize("changed", [{"logIndex": 8}, {"integratedTime": 1}, {"logID": "other"}, {"body": "e30="}])
def test_a_promise_of_the_log_is_for_what_it_said(changed: dict[str, Any]) -> None:
    wrong = LOG.recorded(signature(KEY, PAYLOAD), public_pem(KEY), payload=changed)

    with pytest.raises(Error, match="is not signed by the log's key"):
        verified(wrong, by_key(KEY, logs=(LOG,)), LATER)


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"logIndex": 1.5}, "logIndex must be an integer"),
        ({"logIndex": -1}, "out of range"),
        ({"integratedTime": 1 << 60}, "out of range"),
        ({"body": 7}, "body must be a text"),
        ({"more": 1}, "unknown key 'more'"),
    ],
)
def test_a_bundle_is_read_strictly(changed: dict[str, Any], complaint: str) -> None:
    with pytest.raises(Error, match=complaint):
        verified(
            LOG.recorded(signature(KEY, PAYLOAD), public_pem(KEY), payload=changed), by_key(KEY, logs=(LOG,)), LATER
        )


def test_the_logs_entry_must_be_of_this_payload_signature_and_key() -> None:
    made = signature(KEY, PAYLOAD)
    other = LOG.recorded(signature(KEY, b"other"), public_pem(KEY)).annotations[BUNDLE]
    again = LOG.recorded(signature(KEY, PAYLOAD), public_pem(KEY)).annotations[BUNDLE]  # ECDSA: never the same twice
    other_key = LOG.recorded(made, public_pem(new_key())).annotations[BUNDLE]
    entry = {
        "apiVersion": "0.0.1",
        "kind": "hashedrekord",
        "spec": {
            "data": {"hash": {"algorithm": "sha256", "value": "0" * 64}},
            "signature": {
                "content": made.annotations[ANNOTATION],
                "publicKey": {"content": base64.b64encode(public_pem(KEY)).decode()},
            },
        },
    }
    other_payload = LOG.recorded(made, public_pem(KEY), entry=entry).annotations[BUNDLE]
    other_kind = LOG.recorded(made, public_pem(KEY), entry={**entry, "kind": "intoto"}).annotations[BUNDLE]

    for bundle, complaint in (
        (other, "of another signature"),
        (again, "of another signature"),
        (other_key, "of another key or certificate"),
        (other_payload, "of another payload"),
        (other_kind, "is intoto 0.0.1, expected hashedrekord 0.0.1"),
    ):
        wrong = replace(made, annotations={**made.annotations, BUNDLE: bundle})
        with pytest.raises(Error, match=complaint):
            verified(wrong, by_key(KEY, logs=(LOG,)), LATER)


# ---- Fulcio


def test_a_certificate_counts_at_the_time_that_the_log_tells() -> None:
    assert verified(keyless(), by_fulcio(), LATER) == PAYLOAD


@pytest.mark.parametrize("usage", [None, ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE])
def test_a_certificate_for_everything_is_for_signing_code(usage: x509.ObjectIdentifier | None) -> None:
    assert verified(keyless(usage=usage), by_fulcio(), LATER) == PAYLOAD


def test_a_newer_certificate_tells_its_issuer_in_der() -> None:
    assert verified(keyless(issuer="", issuer_v2=ISSUER), by_fulcio(), LATER) == PAYLOAD
    assert verified(keyless(issuer_v2=ISSUER), by_fulcio(), LATER) == PAYLOAD
    long = "https://" + "i" * 150 + ".test"
    assert verified(keyless(issuer="", issuer_v2=long), by_fulcio(oidc_issuer=long), LATER) == PAYLOAD


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"issuer": "https://other.test"}, "given by the OIDC issuer 'https://other.test', expected"),
        ({"issuer": ""}, "names no OIDC issuer"),
        ({"issuer_v2": "https://other.test"}, "names two OIDC issuers"),
        ({"names": [x509.RFC822Name("other@example.test")]}, "is for other@example.test, expected dev@example.test"),
        ({"names": [x509.DNSName("example.test")]}, "is for no email address, expected"),
        ({"usage": ExtendedKeyUsageOID.SERVER_AUTH}, "a certificate is not for code signing"),
        ({"ends": SIGNED_AT - timedelta(seconds=1)}, "not valid at validation time"),
        ({"starts": SIGNED_AT + timedelta(seconds=1)}, "not valid at validation time"),
    ],
)
def test_a_certificate_of_another_kind_does_not_count(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(Error, match=complaint):
        verified(keyless(**changes), by_fulcio(), SIGNED_AT)


def test_a_certificate_of_another_authority_does_not_count() -> None:
    with pytest.raises(Error, match="the certificate is not trusted"):
        verified(keyless(), by_fulcio(authorities=Authority().root), SIGNED_AT)


def test_a_certificate_needs_the_chain_to_its_root() -> None:
    alone = keyless()
    without = replace(alone, annotations={key: text for key, text in alone.annotations.items() if key != CHAIN})

    with pytest.raises(Error, match="the certificate is not trusted"):
        verified(without, by_fulcio(), SIGNED_AT)
    assert verified(without, by_fulcio(authorities=AUTHORITY.root + AUTHORITY.intermediate), SIGNED_AT) == PAYLOAD


def test_the_certificates_key_must_have_signed() -> None:
    certificate = AUTHORITY.certificate(KEY)
    wrong = LOG.recorded(certified(AUTHORITY, new_key(), PAYLOAD, certificate), certificate)

    with pytest.raises(Error, match="the certificate's key did not sign"):
        verified(wrong, by_fulcio(), SIGNED_AT)


def test_the_logged_certificate_must_be_the_one_beside_the_signature() -> None:
    other = AUTHORITY.certificate(KEY)
    wrong = replace(keyless(), annotations={**keyless().annotations, CERTIFICATE: other.decode()})

    with pytest.raises(Error, match="of another key or certificate"):
        verified(wrong, by_fulcio(), SIGNED_AT)


def test_a_certificate_without_a_log_does_not_count() -> None:
    made = certified(AUTHORITY, KEY, PAYLOAD, AUTHORITY.certificate(KEY))

    with pytest.raises(Error, match=r"has no dev\.sigstore\.cosign/bundle"):
        verified(made, by_fulcio(), SIGNED_AT)


# ---- an authority of one's own


def by_pki(**changes: Any) -> SigstoreSigned:
    return SigstoreSigned(IDENTITY, pki=replace(Pki(AUTHORITY.root, subject_email=EMAIL), **changes))


def test_a_certificate_of_ones_own_authority_counts_while_it_is_valid() -> None:
    names = [x509.RFC822Name(EMAIL), x509.DNSName("ci.example.test"), x509.DNSName("*.build.test")]
    made = certified(AUTHORITY, KEY, PAYLOAD, AUTHORITY.certificate(KEY, names=names))

    for wanted in (
        by_pki(),
        by_pki(subject_hostname="CI.example.test"),
        by_pki(subject_email="", subject_hostname="one.build.test"),
    ):
        assert verified(made, wanted, SIGNED_AT) == PAYLOAD
    for wanted, moment, complaint in (
        (by_pki(), LATER, "not valid at validation time"),
        (by_pki(subject_email="other@example.test"), SIGNED_AT, "expected other@example.test"),
        (by_pki(subject_hostname="build.test"), SIGNED_AT, "is not for the host 'build.test'"),
        (by_pki(subject_hostname="a.b.build.test"), SIGNED_AT, "is not for the host"),
        (by_pki(subject_hostname="192.0.2.1"), SIGNED_AT, "is not for the host"),
        (by_pki(roots=Authority().root), SIGNED_AT, "is not trusted"),
    ):
        with pytest.raises(Error, match=complaint):
            verified(made, wanted, moment)


def test_intermediates_of_the_policy_need_not_lie_beside_the_signature() -> None:
    made = signature(KEY, PAYLOAD, {CERTIFICATE: AUTHORITY.certificate(KEY).decode()})

    assert verified(made, by_pki(intermediates=AUTHORITY.intermediate), SIGNED_AT) == PAYLOAD
    with pytest.raises(Error, match="is not trusted"):
        verified(made, by_pki(), SIGNED_AT)


# ---- what is signed


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (payload(DIGEST, "a.io/x:1", SIMPLE), "is of type 'atomic container signature'"),
        (payload("sha256:1", "a.io/x:1", COSIGN), "'sha256:1' is not a digest"),
        (payload(DIGEST, "a.io/x:1", COSIGN, {"timestamp": 1.5}), "timestamp must be an integer"),
        (payload(DIGEST, "a.io/x:1", COSIGN, {"creator": 1}), "creator must be a text"),
        (PAYLOAD + b"x", "is not JSON"),
        (PAYLOAD.replace(b'"optional"', b'"critical"'), "a key is there twice"),
        (PAYLOAD.replace(b'"optional"', b'"other"'), "lacks optional"),
        (PAYLOAD.replace(b'"identity": {', b'"identity": {"more": 1, '), "unknown key 'more'"),
        (b"[" * 100_000, "is not JSON"),
        (PAYLOAD.decode().encode("utf-16"), "is not JSON"),
        (b"\xef\xbb\xbf" + PAYLOAD, "is not JSON"),
    ],
)
def test_a_payload_is_read_strictly(content: bytes, complaint: str) -> None:
    with pytest.raises(Error, match=complaint):
        claim(content, Format.SIGSTORE)


def test_cosign_writes_null_for_no_annotations() -> None:
    content = json.dumps({**json.loads(PAYLOAD), "optional": None}).encode()

    assert claim(content, Format.SIGSTORE).manifest_digest == DIGEST
    with pytest.raises(Error, match="optional must be an object"):
        claim(content.replace(COSIGN.encode(), SIMPLE.encode()), Format.SIMPLE)


def test_each_demand_is_met_by_a_signature_of_its_own() -> None:
    other = new_key()
    both = Demands(sigstore_signed=(by_key(KEY), by_key(other)))
    ours, theirs = signature(KEY, PAYLOAD), signature(other, PAYLOAD)

    check(both, "a.io/x:1", DIGEST, [theirs, ours])
    with pytest.raises(PermissionDenied, match=r"^SignatureValidationFailed: image a.io/x:1: .*no key of the policy"):
        check(both, "a.io/x:1", DIGEST, [ours])


@pytest.mark.parametrize(
    ("identity", "digest", "signatures", "complaint"),
    [
        ("a.io/x:1", DIGEST, [], "a signature is required, but there is none"),
        ("a.io/x:1", DIGEST, [Signature(Format.SIMPLE, b"x")], r"there is none \(1 of another format\)"),
        ("a.io/x:1", "sha256:" + "b" * 64, None, f"is for the manifest {DIGEST}, not sha256:bbb"),
        ("b.io/x:1", DIGEST, None, "is for 'a.io/x:1', which matchRepository does not accept"),
        ("a.io/x:1", DIGEST, [Signature(Format.SIGSTORE, b"", {ANNOTATION: "é"})], "not base64"),
    ],
)
def test_a_signature_must_be_for_this_image(
    identity: str, digest: str, signatures: list[Signature] | None, complaint: str
) -> None:
    found = [signature(KEY, PAYLOAD)] if signatures is None else signatures

    with pytest.raises(PermissionDenied, match=f"^SignatureValidationFailed: .*{complaint}"):
        check(Demands(sigstore_signed=(by_key(KEY),)), identity, digest, found)
