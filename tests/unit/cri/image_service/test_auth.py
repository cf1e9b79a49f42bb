"""Credentials are found for the right registry, and shown to no other."""

import asyncio
import base64
import json
from pathlib import Path
from typing import Any

import pytest

from cri.image_service.auth import Credentials, for_endpoint
from cri.image_service.registries_conf import Endpoint
from oci.errors import FailedPrecondition, InvalidArgument


def encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def found(
    endpoint: Endpoint, registry: str = "", given: Credentials | None = None, auth_file: Path | None = None
) -> tuple[str, str] | None:
    known = asyncio.run(for_endpoint(endpoint, registry or endpoint.host, given, auth_file))
    return known.basic() if known is not None else None


def auth_file(tmp_path: Path, content: Any) -> Path:
    path = tmp_path / "auth.json"
    path.write_text(json.dumps(content))
    return path


def test_the_longest_match_in_the_auth_file_wins(tmp_path: Path) -> None:
    path = auth_file(
        tmp_path,
        {
            "auths": {
                "r.io": {"auth": encoded("host:1")},
                "r.io/a": {"auth": encoded("namespace:2")},
                "r.io/a/b": {"auth": encoded("repository:3")},
            }
        },
    )

    assert found(Endpoint("r.io", "a/b"), auth_file=path) == ("repository", "3")
    assert found(Endpoint("r.io", "a/bc"), auth_file=path) == ("namespace", "2")
    assert found(Endpoint("r.io", "x/y"), auth_file=path) == ("host", "1")
    assert found(Endpoint("r.io:5000", "a/b"), auth_file=path) is None


def test_dockers_own_key_for_docker_hub_is_understood(tmp_path: Path) -> None:
    path = auth_file(tmp_path, {"auths": {"https://index.docker.io/v1/": {"auth": encoded("me:secret:with:colons")}}})

    assert found(Endpoint("docker.io", "library/x"), auth_file=path) == ("me", "secret:with:colons")


def test_identity_tokens_are_read_from_the_auth_file(tmp_path: Path) -> None:
    path = auth_file(tmp_path, {"auths": {"r.io": {"identitytoken": "id"}}})

    known = asyncio.run(for_endpoint(Endpoint("r.io", "x"), "r.io", None, path))

    assert known is not None
    assert known.identity_token == "id"


def test_the_pulls_own_credentials_come_first_but_never_reach_another_host(tmp_path: Path) -> None:
    path = auth_file(tmp_path, {"auths": {"mirror.io": {"auth": encoded("mirror:m")}}})
    given = Credentials(username="pod", password="p")

    assert found(Endpoint("r.io", "x"), "r.io", given, path) == ("pod", "p")
    assert found(Endpoint("mirror.io", "x"), "r.io", given, path) == ("mirror", "m")


def test_a_server_address_says_which_host_the_pulls_credentials_are_for() -> None:
    given = Credentials(username="pod", password="p", server_address="https://mirror.io/v2/")

    assert found(Endpoint("mirror.io", "x"), "r.io", given) == ("pod", "p")
    assert found(Endpoint("r.io", "x"), "r.io", given) is None


def test_auth_is_decoded_and_a_wrong_one_is_refused_without_showing_it() -> None:
    assert Credentials(auth=encoded("user:pa:ss")).basic() == ("user", "pa:ss")
    for wrong in ("%%%", encoded("nocolon")):
        with pytest.raises(InvalidArgument) as caught:
            Credentials(auth=wrong).basic()
        assert wrong not in str(caught.value)


def test_secrets_are_not_in_a_repr() -> None:
    known = Credentials("user", "hunter2", encoded("user:hunter2"), "idtoken", "regtoken")

    for secret in ("hunter2", encoded("user:hunter2"), "idtoken", "regtoken"):
        assert secret not in repr(known)


def test_a_missing_auth_file_means_anonymous_and_a_broken_one_is_an_error(tmp_path: Path) -> None:
    assert found(Endpoint("r.io", "x"), auth_file=tmp_path / "none") is None
    broken = tmp_path / "broken"
    for text in ('{"auths": [1]}', "no json secret", "[]"):
        broken.write_text(text)
        with pytest.raises(FailedPrecondition, match="broken") as caught:
            found(Endpoint("r.io", "x"), auth_file=broken)
        assert "secret" not in str(caught.value)


def test_a_credential_helper_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    helper = tmp_path / "docker-credential-fake"
    helper.write_text('#!/bin/sh\nread host\nprintf \'{"Username": "for-%s", "Secret": "s"}\' "$host"\n')
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    path = auth_file(tmp_path, {"credHelpers": {"r.io": "fake"}, "auths": {"r.io": {"auth": encoded("not:this")}}})

    assert found(Endpoint("r.io", "x"), auth_file=path) == ("for-r.io", "s")


def helper_that_fails(directory: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> Path:
    helper = directory / "docker-credential-fake"
    helper.write_text(f"#!/bin/sh\nread host\necho {text}\nexit 1\n")
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:/usr/bin:/bin")
    return auth_file(directory, {"credHelpers": {"r.io": "fake"}})


def test_a_credential_helper_that_knows_nothing_makes_the_pull_anonymous(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = helper_that_fails(tmp_path, monkeypatch, "credentials not found in native keychain")

    assert found(Endpoint("r.io", "x"), auth_file=path) is None


def test_a_credential_helper_that_fails_is_an_error_with_its_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = helper_that_fails(tmp_path, monkeypatch, "the session of $FAKE_PROFILE has expired")
    monkeypatch.setenv("FAKE_PROFILE", "node-role")

    with pytest.raises(FailedPrecondition, match=r"failed for r\.io: the session of node-role has expired"):
        found(Endpoint("r.io", "x"), auth_file=path)


def test_a_credential_helper_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = auth_file(tmp_path, {"credHelpers": {"r.io": "none-such"}})

    with pytest.raises(FailedPrecondition, match=r"docker-credential-none-such for registry r.io is not in PATH"):
        found(Endpoint("r.io", "x"), auth_file=path)
