"""The CRI's times: nanoseconds, strictly rising."""

from oci.clock import Clock


def test_the_clock_never_tells_the_same_time_twice() -> None:
    clock = Clock()

    times = [clock.now() for _ in range(1000)]

    assert times == sorted(set(times))
