"""The CRI's ImageService: one short method per RPC, over the story in `images.py`."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from cri.api.runtime.v1 import api_pb2 as api
from cri.api.runtime.v1 import api_pb2_grpc
from cri.changes import Changes
from cri.chunks import chunks
from cri.image_service.auth import Credentials
from cri.image_service.images import Image, Images
from oci.errors import InvalidArgument
from oci.writable_layers import WritableLayers

Context = grpc.aio.ServicerContext[Any, Any]


class ImageService(api_pb2_grpc.ImageServiceServicer):
    def __init__(self, images: Images, changes: Changes, writable_layers: WritableLayers) -> None:
        self._images = images
        self._changes = changes
        self._writable_layers = writable_layers

    async def ListImages(self, request: api.ListImagesRequest, context: Context) -> api.ListImagesResponse:
        return api.ListImagesResponse(images=self._matching(request.filter))

    async def StreamImages(
        self, request: api.StreamImagesRequest, context: Context
    ) -> AsyncIterator[api.StreamImagesResponse]:
        for chunk in chunks(self._matching(request.filter)):
            yield api.StreamImagesResponse(images=chunk)

    async def ImageStatus(self, request: api.ImageStatusRequest, context: Context) -> api.ImageStatusResponse:
        image = self._images.find(_reference(request.image))
        if image is None:
            return api.ImageStatusResponse()
        info = {"info": json.dumps(_info(image))} if request.verbose else {}
        return api.ImageStatusResponse(image=_to_cri(image), info=info)

    async def PullImage(self, request: api.PullImageRequest, context: Context) -> api.PullImageResponse:
        reference = _reference(request.image)
        namespace = request.sandbox_config.metadata.namespace
        image = await self._images.pull(reference, _credentials(request), namespace=namespace)
        return api.PullImageResponse(image_ref=image.id)

    async def RemoveImage(self, request: api.RemoveImageRequest, context: Context) -> api.RemoveImageResponse:
        reference = _reference(request.image)
        await self._changes.run(f"remove image {reference}", lambda: self._images.remove(reference))
        return api.RemoveImageResponse()

    async def ImageFsInfo(self, request: api.ImageFsInfoRequest, context: Context) -> api.ImageFsInfoResponse:
        usage = await self._images.fs_usage()
        layers = self._writable_layers.total()
        return api.ImageFsInfoResponse(
            image_filesystems=[filesystem_usage(usage.path, usage.timestamp, usage.used_bytes, usage.inodes_used)],
            container_filesystems=[
                filesystem_usage(self._writable_layers.directory, layers.timestamp, layers.used_bytes, layers.inodes)
            ],
        )

    def _matching(self, image_filter: api.ImageFilter) -> list[api.Image]:
        return [_to_cri(image) for image in self._images.list(image_filter.image.image)]


def filesystem_usage(path: Path, timestamp: int, used_bytes: int, inodes: int) -> api.FilesystemUsage:
    return api.FilesystemUsage(
        timestamp=timestamp,
        fs_id=api.FilesystemIdentifier(mountpoint=str(path)),
        used_bytes=api.UInt64Value(value=used_bytes),
        inodes_used=api.UInt64Value(value=inodes),
    )


def _reference(spec: api.ImageSpec) -> str:
    if not spec.image:
        raise InvalidArgument("image.image: empty")
    return spec.image


def _credentials(request: api.PullImageRequest) -> Credentials | None:
    if not request.HasField("auth"):
        return None
    auth = request.auth
    return Credentials(
        username=auth.username,
        password=auth.password,
        auth=auth.auth,
        server_address=auth.server_address,
        identity_token=auth.identity_token,
        registry_token=auth.registry_token,
    )


def _to_cri(image: Image) -> api.Image:
    return api.Image(
        id=image.id,
        repo_tags=image.repo_tags,
        repo_digests=image.repo_digests,
        size=image.size_bytes,
        uid=None if image.uid is None else api.Int64Value(value=image.uid),
        username=image.username,
        spec=api.ImageSpec(image=next(iter((*image.repo_tags, *image.repo_digests, image.id)))),
        pinned=image.pinned,
    )


def _info(image: Image) -> dict[str, Any]:
    """What crictl inspecti shows beyond the CRI's fields: the image configuration, in the OCI's names.

    Of an artifact it is the type and the files.
    """
    if image.artifact is not None:
        files = [
            {
                "path": each.file,
                "mediaType": each.blob.media_type,
                "digest": each.blob.digest,
                "size": each.blob.size_bytes,
            }
            for each in image.artifact.files
        ]
        return {"artifact": {"type": image.artifact.type, "files": files}}
    config = image.config
    return {
        **({"additionalStore": str(image.store)} if image.store is not None else {}),
        "imageSpec": {
            "created": config.created,
            "architecture": config.architecture,
            "os": config.os,
            "config": {
                "User": config.user,
                "Env": config.env,
                "Entrypoint": config.entrypoint,
                "Cmd": config.cmd,
                "WorkingDir": config.working_dir,
                "Volumes": {path: {} for path in config.volumes},
                "StopSignal": config.stop_signal,
                "ExposedPorts": {port: {} for port in config.exposed_ports},
                "Labels": dict(config.labels),
            },
            "rootfs": {"type": "layers", "diff_ids": config.diff_ids},
        },
    }
