"""The TLS side of the stream server: contexts from files, made anew when the files change."""

import logging
import ssl
from dataclasses import dataclass
from pathlib import Path

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TlsSettings:
    cert: str
    key: str
    ca: str = ""  # "" asks callers for no certificate
    min_version: str = "VersionTLS12"
    cipher_suites: tuple[str, ...] = ()  # of TLS 1.2, by their IANA names; () is OpenSSL's choice


_VERSIONS = {"VersionTLS12": ssl.TLSVersion.TLSv1_2, "VersionTLS13": ssl.TLSVersion.TLSv1_3}


class TlsContexts:
    """The context for the next connection. A pair of files that does not fit leaves the one before in use."""

    def __init__(self, settings: TlsSettings) -> None:
        """Raises OSError or ssl.SSLError where the files are not usable."""
        self._settings = settings
        self._seen = self._signature()
        self._context = self._make()

    def current(self) -> ssl.SSLContext:
        signature = self._signature()
        if signature != self._seen:
            self._seen = signature
            try:
                self._context = self._make()
            except (OSError, ssl.SSLError) as error:
                _log.error(
                    "certificate %s has changed and is not usable, the old one stays: %s", self._settings.cert, error
                )
        return self._context

    def _make(self) -> ssl.SSLContext:
        settings = self._settings
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = _VERSIONS[settings.min_version]
        if settings.cipher_suites:
            context.set_ciphers(":".join(map(openssl_name, settings.cipher_suites)))
        context.load_cert_chain(settings.cert, settings.key)
        if settings.ca:
            context.load_verify_locations(settings.ca)
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def _signature(self) -> tuple[tuple[int, int, int] | None, ...]:
        """Tells when a file was written or replaced; a missing one (in the middle of a replacement) is None."""
        settings = self._settings
        return tuple(_stat(Path(path)) for path in (settings.cert, settings.key, settings.ca) if path)


def openssl_name(suite: str) -> str:
    """What OpenSSL calls a suite: TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256 is ECDHE-RSA-AES128-GCM-SHA256 there."""
    exchange, _, cipher = suite.removeprefix("TLS_").partition("_WITH_")
    cipher = cipher.replace("AES_", "AES").replace("CHACHA20_POLY1305_SHA256", "CHACHA20_POLY1305")
    return "-".join(filter(None, [exchange if exchange != "RSA" else "", cipher])).replace("_", "-")


def _stat(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size
