"""Speaks the distribution protocol to one registry: documents and blobs, with authentication, redirects and TLS.

Runs in worker processes, synchronously. Every wait and every size has a bound; no error text holds a secret or a URL's
query. Source: OCI distribution-spec; distribution, "Token Authentication Specification".
"""

import base64
import ipaddress
import json
import re
import ssl
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, unquote, urlencode, urljoin, urlsplit
from urllib.request import getproxies_environment, proxy_bypass_environment  # type: ignore[attr-defined]

import urllib3
from urllib3.exceptions import (
    HTTPError,
    InsecureRequestWarning,
    LocationParseError,
    NewConnectionError,
    ProtocolError,
    TimeoutError,
    URLSchemeUnknown,
)
from urllib3.response import BaseHTTPResponse

from cri.image_service.manifest import DOCUMENT_LIMIT_BYTES, MANIFEST_TYPES, check_digest
from oci.errors import Error, NotFound, PermissionDenied, Unavailable
from oci.version import VERSION

urllib3.disable_warnings(InsecureRequestWarning)  # of a registry that registries.conf says may be insecure

_CHUNK_BYTES = 1 << 18
_REDIRECT_LIMIT = 5
_TOKEN_LIMIT_BYTES = 1 << 20
_ERROR_LIMIT_BYTES = 4096
_TRIES = 2  # besides the first, of a request that a busy or failing server refuses
_RESUMES = 5  # of one blob, without _GAIN_BYTES gained in between
_GAIN_BYTES = 1 << 16
_RETRY_AFTER_LIMIT_S = 20.0
_DOCUMENT_DEADLINE_S = 60.0
_ERROR_DEADLINE_S = 5.0
_HAND_ON_S = 0.1
_STALL_WINDOW_S = 60.0
_STALL_BYTES_PER_S = 1024
_STALLS = 2  # of one blob, then its source is given up
_HUB_HOST = "registry-1.docker.io"


@dataclass(frozen=True, slots=True)
class Source:
    """One place to ask: as `Endpoint`, with what is needed to be let in."""

    host: str
    repository: str
    insecure: bool = False
    certs_dir: str = ""
    credentials: Mapping[str, str] | None = field(default=None, repr=False)

    @property
    def address(self) -> str:
        """host[:port] to connect to; Docker Hub's registry is not at docker.io."""
        return _HUB_HOST if self.host == "docker.io" else self.host


@dataclass(slots=True)
class Session:
    """What one worker has learned of a pull's registries, for the next worker: tokens, and who speaks plain HTTP."""

    authorizations: dict[str, str] = field(default_factory=dict, repr=False)
    schemes: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"authorizations": self.authorizations, "schemes": self.schemes}


@dataclass(frozen=True, slots=True)
class Timeouts:
    connect_s: float = 10.0
    read_s: float = 30.0


class Registry:
    """A client of one source. Not for several threads at once."""

    def __init__(self, source: Source, session: Session, timeouts: Timeouts) -> None:
        self._source = source
        self._session = session
        self._timeouts = timeouts
        self._pools: dict[tuple[str, bool], urllib3.PoolManager] = {}

    def close(self) -> None:
        for pool in self._pools.values():
            pool.clear()

    def manifest(self, reference: str) -> tuple[bytes, str]:
        """A manifest or index by tag or digest, and its media type; a digest is verified.

        Raises NotFound, PermissionDenied, Unavailable ("RegistryUnavailable…"), or Error for what makes no sense.
        """
        path = f"/v2/{self._source.repository}/manifests/{reference}"
        response = self._get(path, {"Accept": ", ".join((*MANIFEST_TYPES, "*/*;q=0.1"))})
        content = self._bounded(response, DOCUMENT_LIMIT_BYTES, path)
        subject = f"manifest {self._source.host}/{self._source.repository}:{reference}"
        if ":" in reference:
            check_digest(content, reference, subject)
        elif (claimed := response.headers.get("Docker-Content-Digest", "")).startswith("sha256:"):
            check_digest(content, claimed, subject)
        return content, response.headers.get("Content-Type", "")

    def document(self, digest: str, size_bytes: int) -> bytes:
        """A small blob, whole and verified."""
        path = f"/v2/{self._source.repository}/blobs/{digest}"
        content = self._bounded(self._get(path, {}), size_bytes, path)
        check_digest(content, digest, f"blob {self._source.host}/{self._source.repository}@{digest}")
        return content

    def blob(self, digest: str, size_bytes: int, start: int = 0) -> Iterator[bytes]:
        """The bytes of a blob from `start` to `size_bytes`; after a broken connection it goes on where it was.

        A registry that has answered once may be gone for some seconds, as one is that restarts.
        Raises Error where the registry sends more or fewer. The digest is for the caller to verify.
        """
        path = f"/v2/{self._source.repository}/blobs/{digest}"
        done, gained, failures, stalls = start, start, 0, 0
        # Outside of the loop: who does not answer at first is not waited for, as another source may.
        response = self._get_from(path, done) if done < size_bytes else None
        while done < size_bytes:
            try:
                if response is None:
                    response = self._get_from(path, done)
                for chunk in self._rest(response, path, done, size_bytes):
                    done += len(chunk)
                    yield chunk
                if done < size_bytes:
                    raise Error(f"blob {digest} from {self._source.host} ends after {done} of {size_bytes} bytes")
            except (HTTPError, OSError, _Stalled, Unavailable) as error:
                response = None
                if done - gained >= _GAIN_BYTES:
                    gained, failures = done, 0
                failures += 1
                stalls += isinstance(error, _Stalled)
                if failures > _RESUMES or stalls >= _STALLS:
                    told = error if isinstance(error, Unavailable) else self._unavailable(path, _reason(error))
                    raise Unavailable(f"{told} at byte {done} of {size_bytes}") from error
                time.sleep(0.1 * 2**failures)

    def outside(self, url: str, limit_bytes: int) -> bytes | None:
        """What another server than the registry has under `url`, asked without credentials; None where it has nothing.

        Raises Unavailable where it does not answer, Error where it answers too much or anything else.
        """
        try:
            response = self._follow(url, {}, None)
        except (HTTPError, OSError) as error:
            raise self._unavailable(url, _reason(error)) from error
        if response.status == 404:
            response.close()
            return None
        if response.status != 200:
            raise self._refused(response.status, url, _error_text(response))
        return self._bounded(response, limit_bytes, url)

    def _get_from(self, path: str, start: int) -> BaseHTTPResponse:
        return self._get(path, {"Range": f"bytes={start}-"} if start else {})

    def _rest(self, response: BaseHTTPResponse, path: str, start: int, size_bytes: int) -> Iterator[bytes]:
        try:
            skip = 0 if response.status == 206 else start
            left = size_bytes - start
            for whole in _arriving(response):
                chunk = whole
                if skip:
                    dropped = min(skip, len(chunk))
                    chunk, skip = chunk[dropped:], skip - dropped
                if len(chunk) > left:
                    raise Error(
                        f"blob {path.rpartition('/')[2]} from {self._source.host} is longer than its {size_bytes} bytes"
                    )
                left -= len(chunk)
                if chunk:
                    yield chunk
        finally:
            response.close()  # one that was read to its end has gone back to the pool

    def _bounded(self, response: BaseHTTPResponse, limit: int, path: str) -> bytes:
        deadline = time.monotonic() + _DOCUMENT_DEADLINE_S
        parts, size = [], 0
        try:
            while part := _arrived(response, 1 << 16):
                parts.append(part)
                size += len(part)
                if size > limit:
                    raise Error(f"GET {self._url(path)}: the answer is longer than {limit} bytes")
                if time.monotonic() > deadline:
                    raise self._unavailable(path, f"no whole answer after {_DOCUMENT_DEADLINE_S:.0f} s")
        except (HTTPError, OSError) as error:
            raise self._unavailable(path, _reason(error)) from error
        finally:
            response.close()  # one that was read to its end has gone back to the pool
        return b"".join(parts)

    def _get(self, path: str, headers: Mapping[str, str]) -> BaseHTTPResponse:
        """A successful answer to GET `path`, authenticated where asked for and after redirects."""
        challenged = False
        for attempt in range(1, _TRIES + 2):
            response = self._send(path, headers)
            if response.status in (200, 206):
                return response
            message = _error_text(response)
            if response.status == 401 and not challenged:
                challenged = True
                self._authenticate(response.headers.getlist("WWW-Authenticate"))
                continue
            if attempt <= _TRIES and (wait := _retry_wait(response, attempt)) is not None:
                time.sleep(wait)
                continue
            raise self._refused(response.status, path, message)
        raise self._unavailable(path, "no answer after several tries")

    def _send(self, path: str, headers: Mapping[str, str]) -> BaseHTTPResponse:
        """One exchange over the scheme that the registry speaks: plain HTTP only where it is marked insecure."""
        address = self._source.address
        known = self._session.schemes.get(address)
        schemes = (known,) if known else ("https", "http") if self._source.insecure else ("https",)
        authorization = self._session.authorizations.get(self._realm)
        for scheme in schemes:
            url = f"{scheme}://{address}{path}"
            try:
                response = self._follow(url, dict(headers), authorization)
            except (HTTPError, OSError) as error:
                if scheme == schemes[-1]:
                    raise self._unavailable(path, _reason(error)) from error
                continue
            self._session.schemes[address] = scheme
            return response
        raise self._unavailable(path, "no scheme to try")

    def _follow(self, url: str, headers: dict[str, str], authorization: str | None) -> BaseHTTPResponse:
        origin = self._split(url)
        for _ in range(_REDIRECT_LIMIT + 1):
            parts = self._split(url)
            if authorization and (parts.scheme, parts.netloc) == (origin.scheme, origin.netloc):
                headers["Authorization"] = authorization
            else:
                headers.pop("Authorization", None)  # never for another host than the registry's own
            response = self._request("GET", url, headers)
            if response.status not in (301, 302, 303, 307, 308):
                return response
            location = response.headers.get("Location", "")
            response.close()
            try:
                url = urljoin(url, location)
                scheme = urlsplit(url).scheme
            except ValueError as error:
                raise self._no_url(location) from error
            if scheme not in ("https", "http") or (scheme == "http" and not self._source.insecure):
                raise Error(f"GET {_redacted(origin.geturl())}: redirected to {_redacted(url)}, which is not https")
        raise Error(f"GET {_redacted(origin.geturl())}: more than {_REDIRECT_LIMIT} redirects")

    def _request(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | None = None
    ) -> BaseHTTPResponse:
        pool = self._pool(url)
        all_headers = {"User-Agent": f"crito/{VERSION}", "Accept-Encoding": "identity", **headers}
        for last in (False, True):
            try:
                return pool.request(
                    method,
                    url,
                    body=body,
                    headers=all_headers,
                    redirect=False,
                    retries=False,
                    preload_content=False,
                    timeout=urllib3.Timeout(connect=self._timeouts.connect_s, read=self._timeouts.read_s),
                )
            except ProtocolError:
                if last:
                    raise  # once more, because a kept connection may have been closed meanwhile
            except (LocationParseError, URLSchemeUnknown) as error:
                raise self._no_url(url) from error
        raise AssertionError("unreachable")

    # ---- authentication

    @property
    def _realm(self) -> str:
        return f"{self._source.address}/{self._source.repository}"

    def _authenticate(self, challenges: list[str]) -> None:
        """Gets what the registry asks for; without credentials an anonymous token. Raises PermissionDenied."""
        known = self._source.credentials or {}
        by_scheme = {challenge.partition(" ")[0].lower(): challenge for challenge in challenges}
        if "bearer" in by_scheme:
            token = known.get("registry_token") or self._token(_parameters(by_scheme["bearer"]), known)
            self._session.authorizations[self._realm] = f"Bearer {token}"
        elif known.get("registry_token"):
            self._session.authorizations[self._realm] = f"Bearer {known['registry_token']}"
        elif "basic" in by_scheme and known.get("username"):
            self._session.authorizations[self._realm] = _basic(known)
        else:
            raise PermissionDenied(f"registry {self._source.host} wants credentials for {self._source.repository}")

    def _token(self, challenge: Mapping[str, str], known: Mapping[str, str]) -> str:
        realm = challenge.get("realm", "")
        scheme = self._split(realm).scheme
        if scheme not in ("https", "http") or (scheme == "http" and not self._source.insecure):
            raise PermissionDenied(f"registry {self._source.host} sends for a token to {_redacted(realm)!r}, not https")
        scope = challenge.get("scope") or f"repository:{self._source.repository}:pull"
        query = {"service": challenge.get("service", ""), "scope": scope}
        try:
            if known.get("identity_token"):
                form = {"grant_type": "refresh_token", "refresh_token": known["identity_token"], "client_id": "crito"}
                headers = {"Content-Type": "application/x-www-form-urlencoded"}
                response = self._request("POST", realm, headers, urlencode({**form, **query}).encode())
            else:
                headers = {"Authorization": _basic(known)} if known.get("username") else {}
                separator = "&" if "?" in realm else "?"
                response = self._request("GET", f"{realm}{separator}{urlencode(query)}", headers)
        except (HTTPError, OSError) as error:
            raise Unavailable(f"RegistryUnavailable: token server {_redacted(realm)}: {_reason(error)}") from error
        if response.status >= 500 or response.status == 429:
            response.close()
            raise Unavailable(f"RegistryUnavailable: token server {_redacted(realm)}: status {response.status}")
        if response.status != 200:
            text = _error_text(response)
            raise PermissionDenied(
                f"token server {_redacted(realm)} refuses {scope}: status {response.status}{text and ': ' + text}"
            )
        content = self._bounded(response, _TOKEN_LIMIT_BYTES, "token")
        try:
            answer = json.loads(content)
            token = answer.get("token") or answer["access_token"]
        except (ValueError, KeyError, AttributeError, RecursionError):
            raise Error(f"token server {_redacted(realm)} answered no token") from None
        if not isinstance(token, str) or not re.fullmatch(r"[\x21-\x7e]+", token):
            raise Error(f"token server {_redacted(realm)} answered no token")
        return token

    # ---- connections

    def _pool(self, url: str) -> urllib3.PoolManager:
        parts = urlsplit(url)
        proxy = proxy_for(parts.scheme, parts.hostname or "", parts.netloc)
        key = (f"{proxy or ''} {parts.netloc}", parts.scheme == "https")
        pool = self._pools.get(key)
        if pool is None:
            context = self._tls(parts.netloc.rpartition("@")[2]) if parts.scheme == "https" else None
            pool = _through(proxy, context) if proxy else urllib3.PoolManager(ssl_context=context)
            self._pools[key] = pool
        return pool

    def _tls(self, address: str) -> ssl.SSLContext:
        """TLS as the registry's certificate directory says. Source: containers-certs.d(5)."""
        if self._source.insecure:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        else:
            context = ssl.create_default_context()
        names = ("docker.io", address) if address == _HUB_HOST else (address,)
        for directory in [Path(self._source.certs_dir, name) for name in names if self._source.certs_dir]:
            try:
                for authority in sorted(directory.glob("*.crt")):
                    context.load_verify_locations(authority)
                for certificate in sorted(directory.glob("*.cert")):
                    context.load_cert_chain(certificate, certificate.with_suffix(".key"))
            except (OSError, ssl.SSLError) as error:
                raise Error(f"cannot use the certificates in {directory}: {error}") from error
        return context

    # ---- errors

    def _url(self, path: str) -> str:
        if "://" in path:
            return _redacted(path)  # another server's
        scheme = self._session.schemes.get(self._source.address, "https")
        return f"{scheme}://{self._source.address}{path}"

    def _split(self, url: str) -> SplitResult:
        """Raises Unavailable where it is no URL: a server said it, and another source may know better."""
        try:
            return urlsplit(url)
        except ValueError as error:
            raise self._no_url(url) from error

    def _no_url(self, text: str) -> Unavailable:
        asked = f"{self._source.host}/{self._source.repository}"
        return Unavailable(f"RegistryUnavailable: {asked} sends to {_redacted(text)!r}, which is no URL")

    def _unavailable(self, path: str, reason: str) -> Unavailable:
        return Unavailable(f"RegistryUnavailable: GET {self._url(path)}: {reason}")

    def _refused(self, status: int, path: str, text: str) -> Error:
        seen = f"GET {self._url(path)}: status {status}{text and ': ' + text}"
        if status == 404:
            return NotFound(seen)
        if status in (401, 403):
            return PermissionDenied(seen)
        if status >= 500 or status in (408, 429):
            return Unavailable(f"RegistryUnavailable: {seen}")
        return Error(seen)


def _arrived(response: BaseHTTPResponse, limit: int) -> bytes:
    """What has come of the body, at most `limit` bytes; waits where that is nothing, and is empty at the end."""
    left = response.length_remaining
    return response.read1(min(limit, left or limit), decode_content=False)


def _arriving(response: BaseHTTPResponse) -> Iterator[bytes]:
    """The body in chunks: large ones while it comes fast, otherwise what there is when more comes.

    Raises _Stalled where it comes too slowly. What came before an error is given out first.
    """
    pace, parts, size, since = _Pace(), list[bytes](), 0, time.monotonic()
    try:
        while part := _arrived(response, _CHUNK_BYTES - size):
            parts.append(part)
            size += len(part)
            now = time.monotonic()
            pace.count(len(part), now)
            if size == _CHUNK_BYTES or now - since >= _HAND_ON_S:
                with pace.paused():
                    yield b"".join(parts)
                parts, size, since = [], 0, time.monotonic()
    except (HTTPError, OSError, _Stalled):
        yield b"".join(parts)
        raise
    yield b"".join(parts)


class _Stalled(Exception):
    pass


class _Pace:
    """Notices a sender so slow that it holds us up for ever while never timing out; our own pauses do not count."""

    def __init__(self) -> None:
        self._since = time.monotonic()
        self._bytes = 0

    def count(self, size: int, now: float) -> None:
        self._bytes += size
        elapsed = now - self._since
        if elapsed < _STALL_WINDOW_S:
            return
        if self._bytes < _STALL_BYTES_PER_S * elapsed:
            raise _Stalled(f"only {self._bytes} bytes came in {elapsed:.0f} s")
        self._since, self._bytes = now, 0

    @contextmanager
    def paused(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        self._since += time.monotonic() - began


def _retry_wait(response: BaseHTTPResponse, attempt: int) -> float | None:
    """How long to wait before the same request again; None where that would not help, or not soon."""
    if response.status not in (429, 500, 502, 503, 504):
        return None
    after = response.headers.get("Retry-After", "")
    if after.isdecimal():  # isdigit would take "²", too
        return float(after) if float(after) <= _RETRY_AFTER_LIMIT_S else None
    return 0.3 * float(2**attempt)


def _error_text(response: BaseHTTPResponse) -> str:
    """The codes and messages of an error answer, short and in one line. Closes the response."""
    deadline = time.monotonic() + _ERROR_DEADLINE_S
    content = b""
    try:
        while len(content) < _ERROR_LIMIT_BYTES and time.monotonic() < deadline:
            if not (part := _arrived(response, _ERROR_LIMIT_BYTES - len(content))):
                break
            content += part
        errors = json.loads(content)["errors"]
        texts = [f"{each.get('code', '')} {each.get('message', '')}".strip() for each in errors]
        return re.sub(r"[^\x20-\x7e]+", " ", "; ".join(texts))[:300]
    except (HTTPError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return ""
    finally:
        response.close()


def _parameters(challenge: str) -> dict[str, str]:
    found = re.findall(r'(\w+)=(?:"([^"]*)"|([^\s,"]+))', challenge)
    return {name.lower(): quoted or plain for name, quoted, plain in found}


def _basic(known: Mapping[str, str]) -> str:
    secret = f"{known.get('username', '')}:{known.get('password', '')}"
    return "Basic " + base64.b64encode(secret.encode()).decode()


def _redacted(url: str) -> str:
    """`url` without user, query and fragment: signed URLs and tokens are secrets."""
    try:
        parts = urlsplit(url)
    except ValueError:  # "http://[x/"
        scheme, separator, rest = re.split(r"[?#]", url, maxsplit=1)[0].rpartition("://")
        return f"{scheme}{separator}{rest.rpartition('@')[2]}"[:200]
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}" + ("?…" if parts.query else "")


def _through(proxy: str, context: ssl.SSLContext | None) -> urllib3.ProxyManager:
    """Connections by way of `proxy`, as the environment spells it: a URL, or host:port for plain HTTP."""
    url = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    if url.scheme not in ("http", "https") or not url.hostname:
        raise Error(f"the proxy {_redacted(url.geturl())!r} in the environment is not an http or https URL")
    secret = f"{unquote(url.username)}:{unquote(url.password or '')}" if url.username else None
    headers = urllib3.make_headers(proxy_basic_auth=secret) if secret else None
    address = f"{url.scheme}://{url.netloc.rpartition('@')[2]}"
    return urllib3.ProxyManager(address, proxy_headers=headers, ssl_context=context)


def proxy_for(scheme: str, host: str, address: str) -> str | None:
    """The proxy from HTTP_PROXY, HTTPS_PROXY and NO_PROXY; loopback is never proxied, as in Go programs.

    Source: golang.org/x/net, http/httpproxy, "Config.NoProxy": *.domain is .domain.
    """
    proxies: dict[str, str] = getproxies_environment()
    if "no" in proxies:
        entries = (entry.strip() for entry in proxies["no"].split(","))
        proxies["no"] = ",".join(entry[1:] if entry.startswith("*.") else entry for entry in entries)
    if host == "localhost" or _is_loopback(host) or _is_in_network(host, proxies.get("no", "")):
        return None
    return None if proxy_bypass_environment(address.rpartition("@")[2], proxies) else proxies.get(scheme)


def _is_in_network(host: str, no_proxy: str) -> bool:
    """Whether NO_PROXY has a network, such as 10.0.0.0/8, of which `host` is an address. Names are not looked up."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    for entry in no_proxy.split(","):
        try:
            if address in ipaddress.ip_network(entry.strip(), strict=False):
                return True
        except ValueError:
            continue
    return False


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _reason(error: BaseException) -> str:
    """What went wrong on the connection, in the kernel's or TLS's words; urllib3's own text would hold the URL."""
    if isinstance(error, NewConnectionError) or not isinstance(error, TimeoutError):
        seen: BaseException | None = error
        for _ in range(8):
            if isinstance(seen, ssl.SSLCertVerificationError):
                return f"certificate not trusted: {seen.verify_message}"
            if isinstance(seen, OSError) and seen.strerror:
                return seen.strerror
            reason = getattr(seen, "reason", None)
            seen = reason if isinstance(reason, BaseException) else seen and (seen.__cause__ or seen.__context__)
            if seen is None:
                break
    if isinstance(error, TimeoutError):
        return "timed out"
    if isinstance(error, _Stalled):
        return str(error)
    return "connection broken" if isinstance(error, ProtocolError) else type(error).__name__
