"""Whether the node's policy lets an image in, and lets a container run it: asked at the pull and at every creation.

An image is judged by where it came from: the store knows that as its origins, with the signatures found there, so that
a creation needs no network. Verifying is a worker's work; a verdict is kept for a few minutes, by all that it hangs on.
"""

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from cri.image_service import policy, signature_work
from cri.image_service import reference as references
from cri.image_service.demands import Demands
from cri.image_service.reference import Reference
from cri.image_service.refusal import is_refusal, refusal
from cri.image_service.store import Origin
from cri.image_service.workers import Workers
from oci.errors import Error, InvalidArgument, PermissionDenied, Unavailable

log = logging.getLogger(__name__)

REGISTRY = "docker"  # the transport's name in containers-policy.json(5)
_VERDICT_S = 300.0  # keys and certificates expire
_VERDICTS_LIMIT = 1000

Sources = Callable[[Reference], Awaitable[Sequence[dict[str, Any]]]]


@dataclass(frozen=True, slots=True)
class PolicyFiles:
    default: Path | None = None  # None: every image is accepted
    by_namespace: Path | None = None  # directory of <namespace>.json
    registries_d: Path | None = None  # where signatures lie, containers-registries.d(5)


@dataclass(frozen=True, slots=True)
class Run:
    """An image that a container is to run or to mount."""

    image_id: str
    meant: tuple[Reference, ...]  # the full names that the pod's author may have meant; none for an id
    repo_digests: tuple[str, ...]
    origins: tuple[Origin, ...]


@dataclass(frozen=True, slots=True)
class _Case:
    """One origin, as the policy sees it."""

    transport: str
    scopes: tuple[str, ...]
    subject: str
    reference: Reference | None = None  # of a registry's image


class Acceptance:
    def __init__(self, files: PolicyFiles, workers: Workers, timeouts: dict[str, Any]) -> None:
        self._files = files
        self._workers = workers
        self._timeouts = timeouts
        self._verdicts: dict[str, float] = {}  # what was asked → until when the good answer holds

    async def policy_of(self, namespace: str) -> Path | None:
        """The policy for the pods of a namespace, "" for none."""
        if not namespace or self._files.by_namespace is None:
            return self._files.default
        return await asyncio.to_thread(policy.of_namespace, self._files.default, self._files.by_namespace, namespace)

    async def of_pull(self, wanted: Reference, path: Path | None) -> dict[str, Any]:
        """What to ask of the worker that resolves `wanted`, beside all else.

        Raises PermissionDenied ("SignatureValidationFailed…") where `path` refuses whatever the signatures are.
        """
        scopes = policy.registry_scopes(wanted)
        demands = await asyncio.to_thread(policy.demanded, path, REGISTRY, scopes, f"image {wanted}")
        if not demands and not await asyncio.to_thread(self._is_any_demanding, scopes):
            return {}
        return {"signatures": signature_work.asked(_name(wanted), demands, self._files.registries_d)}

    async def of_file(self, path: Path, transport: str, namespace: str = "") -> None:
        """Raises PermissionDenied ("SignatureValidationFailed…") unless what lies in a local file is accepted."""
        chosen = await self.policy_of(namespace)
        scopes = await asyncio.to_thread(policy.file_scopes, path)
        demands = await asyncio.to_thread(policy.demanded, chosen, transport, scopes, f"{transport}:{path}")
        if demands:
            raise refusal(f"{chosen} demands a signature for {transport}:{path}, and a local file has none")

    async def of_run(self, run: Run, namespace: str, sources: Sources) -> Origin | None:
        """Accepts that a container of `namespace` runs the image; an origin with newer signatures is to be stored.

        Raises PermissionDenied ("SignatureValidationFailed…"), or Unavailable ("RegistryUnavailable…") where there are
        no signatures on the node and those to be had cannot be fetched from where `sources` says.
        """
        path = await self.policy_of(namespace)
        refused: Error | None = None
        for case in await asyncio.to_thread(_cases, run):
            try:
                demands = await asyncio.to_thread(policy.demanded, path, case.transport, case.scopes, case.subject)
                return await self._of_case(case, demands, run, sources) if demands else None
            except (PermissionDenied, Unavailable) as error:
                refused = refused or error
        assert refused is not None  # there is at least one case
        raise refused

    async def _of_case(self, case: _Case, demands: Demands, run: Run, sources: Sources) -> Origin | None:
        if case.reference is None:
            raise refusal(f"a signature is demanded for {case.subject}, and a local file has none")
        asked = signature_work.asked(_name(case.reference), demands, self._files.registries_d)
        request = {"verb": "verify_signatures", "signatures": asked, "signed": _signed(run.origins)}
        key = sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
        if self._verdicts.get(key, 0.0) > time.monotonic():
            return None
        try:
            await self._workers.call(request)
        except PermissionDenied as refused:
            return await self._with_newer(case.reference, asked, run, sources, refused)
        self._keep(key)
        return None

    async def _with_newer(
        self,
        reference: Reference,
        asked: signature_work.Asked,
        run: Run,
        sources: Sources,
        refused: PermissionDenied,
    ) -> Origin:
        """The image may have been signed since, or been pulled where nobody asked for signatures: looks once more."""
        digests = [each for each in _signed(run.origins) if each]
        if not digests:
            raise refused  # of an image without a manifest nothing can be signed
        request = {"verb": "newer_signatures", "signatures": asked, "digests": digests, **self._timeouts}
        try:
            found = await self._workers.call({**request, "sources": await sources(reference)})
        except Error as error:
            if is_refusal(error) or (isinstance(error, Unavailable) and not any(_signed(run.origins).values())):
                raise
            log.info("no newer signatures of image %s: %s", reference, error)
            raise refused from error
        return Origin(REGISTRY, _name(reference), found["digest"], json.dumps(found["signatures"]))

    def _keep(self, key: str) -> None:
        if len(self._verdicts) >= _VERDICTS_LIMIT:
            self._verdicts.clear()
        self._verdicts[key] = time.monotonic() + _VERDICT_S

    def _is_any_demanding(self, scopes: Sequence[str]) -> bool:
        """Whether some policy of this node demands signatures of the image: then a pull keeps them."""
        directory = self._files.by_namespace
        try:
            own = [] if directory is None else [each for each in directory.iterdir() if each.suffix == ".json"]
        except OSError:
            own = []
        for path in (self._files.default, *own):
            try:
                if policy.demanded(path, REGISTRY, scopes, ""):
                    return True
            except PermissionDenied:
                continue  # it refuses, or is broken: no signature would help
        return False


def origin_of_pull(wanted: Reference, resolved: dict[str, Any]) -> Origin:
    """What the store shall know of a pull of `wanted`, of the worker's answer."""
    found = resolved["signatures"]
    return Origin(REGISTRY, _name(wanted), resolved["manifest_sha256"], None if found is None else json.dumps(found))


def origin_of_file(path: Path, transport: str) -> Origin:
    return Origin(transport, str(path), "")


def origins_of_names(names: Sequence[str], manifest_digest: str) -> tuple[Origin, ...]:
    """What is to be assumed of an image of which only the names are known."""
    return tuple(Origin(REGISTRY, name, manifest_digest) for name in names)


def _cases(run: Run) -> list[_Case]:
    """What to ask the policy about; that one of them is accepted suffices.

    The name that the pod's author wrote counts where the image came under it; as of a tag that moved on meanwhile, the
    repository suffices. Else, as with an image's id, the names count under which the image came. Local files always do.
    """
    pulled = [references.parse(each.name) for each in run.origins if each.transport == REGISTRY]
    digests = {each.rpartition("@")[2] for each in run.repo_digests}
    digests |= {each.manifest_digest for each in run.origins}
    repositories = {each.name for each in pulled}
    meant = [each for each in run.meant if each.name in repositories and (not each.digest or each.digest in digests)]
    cases = [_registry_case(each) for each in dict.fromkeys(meant or pulled)]
    for origin in run.origins:
        if origin.transport != REGISTRY:
            path = Path(origin.name)
            subject = f"image {run.image_id} of {origin.transport}:{path}"
            cases.append(_Case(origin.transport, tuple(policy.file_scopes(path)), subject))
    return cases or [_Case(REGISTRY, (), f"image {run.image_id}, which has no name")]


def _registry_case(reference: Reference) -> _Case:
    return _Case(REGISTRY, tuple(policy.registry_scopes(reference)), f"image {_name(reference)}", reference)


def _signed(origins: Sequence[Origin]) -> dict[str, list[Any]]:
    """All signatures on the node, by the manifest they were found for: a signature says itself for which name it is."""
    found: dict[str, list[Any]] = {}
    for origin in origins:
        if origin.transport == REGISTRY:
            signatures = found.setdefault(origin.manifest_digest, [])
            signatures += [each for each in json.loads(origin.signatures or "[]") if each not in signatures]
    return found


def _name(reference: Reference) -> str:
    """The reference by digest alone, else by tag."""
    return f"{reference.name}@{reference.digest}" if reference.digest else reference.tagged


def meant(text: str, qualified: Callable[[Reference], tuple[Reference, ...]]) -> tuple[Reference, ...]:
    """The full names that `text` may stand for; none for an image's id or a path."""
    if references.is_image_id(text):
        return ()
    try:
        parsed = references.with_default_tag(references.parse(text))
    except InvalidArgument:
        return ()
    return tuple(replace(each, tag="") if each.digest else each for each in qualified(parsed))
