"""What a node has to get images by: proxies, client certificates, credential stores, credentials of a namespace."""

import asyncio
import base64
import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from cri.image_service.catalog import Image
from cri.image_service.images import Images, ImageSettings
from cri.image_service.registry import proxy_for
from oci.errors import Error, FailedPrecondition, PermissionDenied, Unavailable
from tests.fakes import layers
from tests.fakes.image_store import run, settings
from tests.fakes.layers import directory, file, tar
from tests.fakes.proxy import FakeProxy
from tests.fakes.registry import FakeRegistry, after, wants

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="layers hold owners and device nodes")

APP = layers.image([tar([directory("etc"), file("etc/app", b"app")])])
NAME = "example.test/team/app"


@pytest.fixture
def registry(registry: FakeRegistry) -> FakeRegistry:
    registry.add("team/app", "1", APP)
    return registry


@pytest.fixture
def tls(tmp_path: Path) -> Path:
    """A directory with a certificate for registry.test, and one for a client, each its own authority."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    made = tmp_path / "tls"
    made.mkdir()
    for name in ("registry.test", "client"):
        command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
        names = ["-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}"]
        files = ["-keyout", str(made / f"{name}.key"), "-out", str(made / f"{name}.crt")]
        subprocess.run([*command.split(), *names, *files], check=True, capture_output=True, stdin=subprocess.DEVNULL)
    return made


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


def pull(with_settings: ImageSettings, reference: str = f"{NAME}:1", namespace: str = "") -> Image:
    image: Image = run(with_settings, lambda images: images.pull(reference, namespace=namespace))
    return image


def basic(secret: str) -> str:
    return "Basic " + base64.b64encode(secret.encode()).decode()


def auth_entry(secret: str) -> dict[str, str]:
    return {"auth": base64.b64encode(secret.encode()).decode()}


# ---- proxies


def test_https_goes_through_a_tunnel_of_the_proxy_and_trusts_what_the_registrys_directory_says(
    tmp_path: Path, tls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        FakeRegistry(certificate=tls / "registry.test.crt", key=tls / "registry.test.key") as secure,
        FakeProxy(secure.address, wants=basic("me:p@ss")) as proxy,
    ):
        secure.add("app", "1", APP)
        certs = tmp_path / "certs.d/registry.test"
        certs.mkdir(parents=True)
        shutil.copy(tls / "registry.test.crt", certs / "ca.crt")
        where = settings(tmp_path, certs_dir=tmp_path / "certs.d")

        monkeypatch.setenv("HTTPS_PROXY", f"http://me:p%40ss@{proxy.address}")
        assert pull(where, "registry.test/app:1").id == APP.id
        assert set(proxy.asked) == {"CONNECT registry.test:443"}

        run(where, lambda images: images.remove(APP.id))
        monkeypatch.setenv("HTTPS_PROXY", f"http://me:wrong-secret@{proxy.address}")
        with pytest.raises(Unavailable, match=r"^RegistryUnavailable: ") as caught:
            pull(where, "registry.test/app:1")
        assert "wrong-secret" not in str(caught.value)


def test_plain_http_is_asked_of_the_proxy_which_may_be_named_without_a_scheme(
    tmp_path: Path, registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    registries = '[[registry]]\nlocation = "registry.test:81"\ninsecure = true\n'
    with FakeProxy(registry.address) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.address)
        monkeypatch.setenv("HTTPS_PROXY", "127.0.0.1:1")

        assert pull(settings(tmp_path, extra=registries), "registry.test:81/team/app:1").id == APP.id
        assert "GET http://registry.test:81/v2/team/app/manifests/1" in proxy.asked


@pytest.mark.parametrize(
    ("no_proxy", "address", "is_direct"),
    [
        ("registry.test", "registry.test:81", True),
        (".test,other", "registry.test:81", True),
        ("other, *.test", "registry.test:81", True),
        ("*.registry.test", "other.test:81", False),
        ("*.test:81", "registry.test:81", True),
        ("other.test", "registry.test:81", False),
        ("*", "registry.test", True),
        ("registry.test:81", "registry.test:81", True),
        ("registry.test:82", "registry.test:81", False),
        ("10.0.0.0/8, 203.0.113.0/24", "203.0.113.7:81", True),
        ("10.0.0.0/8,203.0.113.0/24", "198.51.100.7:81", False),
        ("2001:db8::/32", "[2001:db8::7]:81", True),
        ("10.0.0.0/8", "registry.test", False),
        ("", "localhost:5000", True),
        ("", "127.0.0.1:5000", True),
    ],
)
def test_no_proxy_has_names_domains_and_networks(
    monkeypatch: pytest.MonkeyPatch, no_proxy: str, address: str, is_direct: bool
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.test:3128")
    monkeypatch.setenv("NO_PROXY", no_proxy)

    chosen = proxy_for("https", urlsplit(f"//{address}").hostname or "", address)

    assert chosen == (None if is_direct else "http://proxy.test:3128")


def test_a_proxy_that_is_no_url_of_http_is_named_without_its_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "socks5://me:secret@proxy.test:1080")

    with pytest.raises(Error, match=r"proxy 'socks5://proxy.test:1080' in the environment is not an http") as caught:
        pull(settings(tmp_path), "registry.test/app:1")
    assert "secret" not in str(caught.value)


# ---- certificates


def test_a_registry_that_wants_a_client_certificate_gets_the_one_of_its_directory(tmp_path: Path, tls: Path) -> None:
    with FakeRegistry(
        certificate=tls / "registry.test.crt", key=tls / "registry.test.key", client_authority=tls / "client.crt"
    ) as secure:
        secure.add("app", "1", APP)
        certs = tmp_path / "certs.d" / secure.address
        certs.mkdir(parents=True)
        where = settings(
            tmp_path,
            certs_dir=tmp_path / "certs.d",
            extra=f'[[registry]]\nlocation = "{secure.address}"\ninsecure = true\n',
        )
        with pytest.raises(Unavailable):
            pull(where, f"{secure.address}/app:1")

        shutil.copy(tls / "client.crt", certs / "client.cert")
        shutil.copy(tls / "client.key", certs / "client.key")
        assert pull(where, f"{secure.address}/app:1").id == APP.id


# ---- credential stores


@pytest.fixture
def helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """docker-credential-fake, which knows the servers that are files in the directory that comes back."""
    programs, known = tmp_path / "bin", tmp_path / "known"
    programs.mkdir()
    known.mkdir()
    program = programs / "docker-credential-fake"
    program.write_text(
        f'#!/bin/sh\nread server\ncat "{known}/$(echo "$server" | tr / _)" 2>/dev/null && exit\n'
        "echo credentials not found in native keychain\nexit 1\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    return known


def test_the_store_of_all_secrets_is_asked_where_the_file_itself_has_none(
    tmp_path: Path, registry: FakeRegistry, helper: Path
) -> None:
    registry.trouble["^/v2/"] = wants(basic("stored:s"), 'Basic realm="r"')
    (helper / registry.address).write_text('{"Username": "stored", "Secret": "s"}')
    auth_file = tmp_path / "auth.json"
    auth_file.write_text(json.dumps({"auths": {registry.address: {}}, "credsStore": "fake"}))
    where = settings(tmp_path, registry, auth_file=auth_file)

    assert pull(where)

    run(where, lambda images: images.remove(APP.id))
    auth_file.write_text(json.dumps({"auths": {registry.address: auth_entry("in:file")}, "credsStore": "fake"}))
    with pytest.raises(PermissionDenied):
        pull(where)


def test_a_store_that_this_node_does_not_have_is_not_asked(
    tmp_path: Path, registry: FakeRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    auth_file = tmp_path / "auth.json"
    auth_file.write_text('{"auths": {}, "credsStore": "desktop"}')

    assert pull(settings(tmp_path, registry, auth_file=auth_file)).id == APP.id
    assert "names the store docker-credential-desktop, which is not in PATH" in caplog.text


def test_credential_helpers_of_registries_conf_are_asked_in_their_order(
    tmp_path: Path, registry: FakeRegistry, helper: Path
) -> None:
    auth_file = tmp_path / "auth.json"
    auth_file.write_text(json.dumps({"auths": {registry.address: auth_entry("from:file")}}))
    (helper / registry.address).write_text('{"Username": "from", "Secret": "helper"}')
    for order, expected in (('"fake", "containers-auth.json"', "helper"), ('"containers-auth.json", "fake"', "file")):
        registry.trouble["^/v2/"] = wants(basic(f"from:{expected}"), 'Basic realm="r"')
        where = settings(tmp_path, registry, f"credential-helpers = [{order}]\n", auth_file=auth_file)
        assert pull(where)
        run(where, lambda images: images.remove(APP.id))

    (helper / registry.address).unlink()
    registry.trouble["^/v2/"] = wants(basic("from:file"), 'Basic realm="r"')
    assert pull(
        settings(tmp_path, registry, 'credential-helpers = ["fake", "containers-auth.json"]\n', auth_file=auth_file)
    )


# ---- credentials of a namespace


def namespaced(directory: Path, namespace: str, secret: str, host: str, name: str = NAME) -> Path:
    directory.mkdir(exist_ok=True)
    path = directory / f"{namespace}-{hashlib.sha256(name.encode()).hexdigest()}.json"
    path.write_text(json.dumps({"auths": {host: auth_entry(secret)}}))
    return path


def test_the_file_of_a_namespace_is_used_for_one_pull_instead_of_the_nodes_and_is_gone_then(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    registry.trouble["^/v2/"] = wants(basic("team-a:a"), 'Basic realm="r"')
    node_wide = tmp_path / "auth.json"
    node_wide.write_text(json.dumps({"auths": {registry.address: auth_entry("node:n")}}))
    files = tmp_path / "auth"
    where = settings(tmp_path, registry, auth_file=node_wide, namespaced_auth_dir=files)

    for_a = namespaced(files, "team-a", "team-a:a", registry.address)
    with pytest.raises(PermissionDenied):
        pull(where, namespace="team-b")
    assert for_a.exists()
    assert pull(where, namespace="team-a").id == APP.id
    assert not for_a.exists()
    assert list((files / "in-use").iterdir()) == []
    with pytest.raises(PermissionDenied):
        pull(where, namespace="team-a")

    registry.trouble["^/v2/"] = wants(basic("node:n"), 'Basic realm="r"')
    assert pull(where, namespace="team-a").id == APP.id


def test_the_file_is_gone_also_after_a_pull_that_failed_and_when_it_makes_no_sense(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    registry.trouble["^/v2/"] = wants(basic("right:r"), 'Basic realm="r"')
    files = tmp_path / "auth"
    where = settings(tmp_path, registry, namespaced_auth_dir=files)

    namespaced(files, "team-a", "wrong:w", registry.address)
    with pytest.raises(PermissionDenied):
        pull(where, namespace="team-a")
    namespaced(files, "team-a", "x:y", registry.address).write_text("no json: secret")
    with pytest.raises(FailedPrecondition, match="cannot read auth file") as caught:
        pull(where, namespace="team-a")
    assert "secret" not in str(caught.value)

    assert [path.name for path in files.iterdir()] == ["in-use"]
    assert list((files / "in-use").iterdir()) == []


def test_pulls_at_once_of_two_namespaces_use_their_own_credentials_and_fetch_a_layer_once(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    files = tmp_path / "auth"
    where = settings(tmp_path, registry, namespaced_auth_dir=files)
    namespaced(files, "team-a", "team-a:a", registry.address)
    namespaced(files, "team-b", "team-b:b", registry.address)
    registry.trouble["manifests/"] = after(0.2, wants(basic("team-a:a"), 'Basic realm="r"'))

    async def story(images: Images) -> list[Any]:
        pulls = (images.pull(f"{NAME}:1", namespace=each) for each in ("team-a", "team-b", "team-a"))
        return await asyncio.gather(*pulls, return_exceptions=True)

    first, other, joined = run(where, story)

    assert first.id == joined.id == APP.id
    assert isinstance(other, PermissionDenied)
    assert registry.asked[f"/v2/team/app/blobs/{layers.digest(APP.layers[0])}"] == 1


def test_the_file_of_a_pull_that_joins_another_is_gone_too(tmp_path: Path, registry: FakeRegistry) -> None:
    files = tmp_path / "auth"
    where = settings(tmp_path, registry, namespaced_auth_dir=files)
    registry.trouble["manifests/"] = after(1, wants(basic("team-a:a"), 'Basic realm="r"'))

    async def story(images: Images) -> None:
        namespaced(files, "team-a", "team-a:a", registry.address)
        first = asyncio.create_task(images.pull(f"{NAME}:1", namespace="team-a"))
        await asyncio.sleep(0.3)
        namespaced(files, "team-a", "team-a:a", registry.address)
        second = asyncio.create_task(images.pull(f"{NAME}:1", namespace="team-a"))
        assert (await first).id == (await second).id == APP.id

    run(where, story)

    assert [path.name for path in files.iterdir()] == ["in-use"]
    assert list((files / "in-use").iterdir()) == []


@pytest.mark.parametrize("namespace", ["../other", "a/b", "", "UPPER", ".."])
def test_what_is_no_name_of_a_namespace_has_no_file(tmp_path: Path, registry: FakeRegistry, namespace: str) -> None:
    files = tmp_path / "auth"
    files.mkdir()
    outside = namespaced(tmp_path, "other", "x:y", registry.address)

    assert pull(settings(tmp_path, registry, namespaced_auth_dir=files), namespace=namespace).id == APP.id
    assert outside.exists()


def test_a_short_name_is_looked_for_as_docker_hubs_which_is_how_kubelet_spells_it(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    registry.add("library/short", "1", APP)
    registry.trouble["^/v2/"] = wants(basic("me:m"), 'Basic realm="r"')
    conf = (
        f'[[registry]]\nlocation = "docker.io"\n[[registry.mirror]]\nlocation = "{registry.address}"\ninsecure = true\n'
    )
    files = tmp_path / "auth"
    namespaced(files, "team-a", "me:m", registry.address, "docker.io/library/short")

    assert pull(settings(tmp_path, extra=conf, namespaced_auth_dir=files), "short:1", namespace="team-a").id == APP.id
