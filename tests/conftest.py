"""What all tests share: the cgroup hierarchy that crun needs on hybrid hosts, and patience on a busy machine."""

from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.hugetlb import hugetlb_hierarchy

settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


@pytest.fixture(scope="session", autouse=True)
def crun_can_run(request: pytest.FixtureRequest) -> Iterator[None]:
    """As root and with more than unit tests to run: crun's hybrid mode works for as long as the session lasts."""
    if all("/tests/unit/" in str(item.path) for item in request.session.items):
        yield
        return
    with hugetlb_hierarchy():
        yield
