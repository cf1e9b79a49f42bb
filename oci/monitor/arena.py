"""Where CPython puts small objects: keeping those that are used together together, for the sake of forked processes."""

import gc

_POOL_BYTES = 16 * 1024  # of CPython 3.10 and later; elsewhere nothing is gained, and nothing lost
_POOL_HEADER_BYTES = 48
_kept: list[object] = []


def fill_holes() -> None:
    """Use up what is free in the allocator's half-used pools, so that all later objects lie side by side in new ones.

    A process forked after this dirties few pages for its own objects, rather than one here and one there.
    """
    gc.collect()
    for size in range(16, 513, 16):
        for _ in range(_POOL_BYTES):
            block = _block(size)
            _kept.append(block)
            if id(block) % _POOL_BYTES == _POOL_HEADER_BYTES:  # the first of a new pool
                break


def _block(size: int) -> object:
    """A new object of just this size class."""
    if size == 16:
        return object()
    if size == 32:
        return float("1.5")
    return bytes(size - 33)  # a bytes object has 33 bytes of its own
