"""What the daemon tells a stream server when it starts one; two servers with the same settings are interchangeable."""

from dataclasses import dataclass

from cri.streaming.tls import TlsSettings


@dataclass(frozen=True, slots=True)
class StreamSettings:
    address: str  # an IP address; also the host of the URLs
    port: int = 0  # 0 takes a free one
    idle_timeout_s: float = 4 * 3600.0  # 0 ends no session
    tls: TlsSettings | None = None
