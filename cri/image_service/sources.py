"""Where an image is asked for: its full names, and for each the registries' endpoints with the credentials for them.

Knows registries.conf and auth files as they are now; what is asked there is for the workers.
"""

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cri.image_service import auth
from cri.image_service import reference as references
from cri.image_service.auth import AuthFile, Credentials, NamespacedAuth
from cri.image_service.reference import Reference
from cri.image_service.registries_conf import RegistriesFiles
from oci.errors import Error

log = logging.getLogger(__name__)


class Sources:
    def __init__(
        self,
        registries: RegistriesFiles,
        auth_file: Path | None = None,
        namespaced_auth_dir: Path | None = None,
        certs_dir: Path | None = None,
    ) -> None:
        self._registries = registries
        self._auth_file = auth_file
        self._namespaced_auth = NamespacedAuth(namespaced_auth_dir) if namespaced_auth_dir is not None else None
        self._certs_dir = certs_dir

    async def sweep(self) -> None:
        """Removes the credentials of pulls that a crash has cut short."""
        if self._namespaced_auth is not None:
            await asyncio.to_thread(self._namespaced_auth.sweep)

    async def qualified(self, wanted: Reference) -> tuple[Reference, ...]:
        """The full names that `wanted` stands for, in the order in which they are to be asked for."""
        conf = await asyncio.to_thread(self._registries.current)
        return conf.qualified(wanted)

    def local_meanings(self, wanted: Reference) -> tuple[Reference, ...]:
        """What a short name may mean, by the configuration that was read last, and Docker Hub's rule."""
        if not wanted.is_short:
            return (wanted,)
        try:
            meanings = self._registries.last().qualified(wanted)
        except Error:
            meanings = ()
        return (*meanings, references.with_registry(wanted, references.DOCKER_HUB))

    async def take_auth(self, namespace: str, image: Reference) -> AuthFile | None:
        """The namespace's own credentials for one pull of `image`; None where it brought none."""
        if self._namespaced_auth is None or not namespace:
            return None
        own = await asyncio.to_thread(self._namespaced_auth.take, namespace, image)
        if own is not None:
            log.info("pulling %s with the credentials of namespace %s", image, namespace)
        return own

    async def of(
        self, wanted: Reference, credentials: Credentials | None = None, own: AuthFile | None = None
    ) -> Sequence[dict[str, Any]]:
        """The endpoints for a full name, the first to be asked first, as workers take them.

        With a namespace's `own` credentials the node's auth file is not asked.
        """
        conf = await asyncio.to_thread(self._registries.current)
        auth_file = self._auth_file if own is None else own
        sources = []
        for endpoint in conf.endpoints(wanted):
            known = await auth.for_endpoint(endpoint, wanted.registry, credentials, auth_file, conf.credential_helpers)
            sources.append(
                {
                    "host": endpoint.host,
                    "repository": endpoint.repository,
                    "insecure": endpoint.insecure,
                    "certs_dir": str(self._certs_dir or ""),
                    "credentials": known.to_json() if known is not None else None,
                }
            )
        return sources
