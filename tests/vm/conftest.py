"""The end-to-end tests' registry, image and daemons, for the tests in the virtual machine."""

from tests.e2e.conftest import busybox, directory, image_registry, make_daemon

__all__ = ["busybox", "directory", "image_registry", "make_daemon"]
