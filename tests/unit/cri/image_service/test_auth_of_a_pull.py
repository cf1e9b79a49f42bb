"""What a PullImage request brings along of credentials reaches whoever uses them."""

from cri.api.runtime.v1 import api_pb2 as api
from cri.image_service import service
from cri.image_service.auth import Credentials


def test_all_that_a_pull_brings_along_is_credentials() -> None:
    fields = {
        "username": "user",
        "password": "secret",
        "auth": "dTpw",
        "server_address": "registry.example",
        "identity_token": "identity",
        "registry_token": "bearer",
    }

    found = service._credentials(api.PullImageRequest(auth=api.AuthConfig(**fields)))

    assert found == Credentials(**fields)
    assert service._credentials(api.PullImageRequest()) is None
