"""registries.conf decides where an image is asked for."""

import os
from pathlib import Path

import pytest

from cri.image_service.reference import parse
from cri.image_service.registries_conf import Endpoint, RegistriesConf, RegistriesFiles, load
from oci.errors import FailedPrecondition, InvalidArgument, PermissionDenied

DIGEST = "sha256:" + "a" * 64


def conf(tmp_path: Path, *texts: str) -> RegistriesConf:
    paths = []
    for at, text in enumerate(texts):
        paths.append(tmp_path / f"{at}.conf")
        paths[-1].write_text(text)
    return load(paths)


def endpoints(found: RegistriesConf, reference: str) -> list[str]:
    return [f"{each.host}/{each.repository}" for each in found.endpoints(parse(reference))]


def test_without_a_table_an_image_is_asked_for_where_its_name_says() -> None:
    assert RegistriesConf().endpoints(parse("quay.io/a/b:1")) == (Endpoint("quay.io", "a/b"),)


def test_the_longest_prefix_wins_and_is_rewritten_to_its_location(tmp_path: Path) -> None:
    found = conf(
        tmp_path,
        """
        [[registry]]
        location = "example.com"
        [[registry]]
        prefix = "example.com/foo"
        location = "internal:5000/bar"
        insecure = true
        """,
    )

    assert found.endpoints(parse("example.com/foo/image:1")) == (Endpoint("internal:5000", "bar/image", True),)
    assert endpoints(found, "example.com/foobar/image:1") == ["example.com/foobar/image"]
    assert endpoints(found, f"example.com/foo@{DIGEST}") == ["internal:5000/bar"]


def test_mirrors_come_in_order_before_the_primary_location(tmp_path: Path) -> None:
    found = conf(
        tmp_path,
        """
        [[registry]]
        location = "docker.io"
        [[registry.mirror]]
        location = "one:5000/hub"
        [[registry.mirror]]
        location = "two"
        insecure = true
        """,
    )

    assert endpoints(found, "docker.io/library/busybox:1") == [
        "one:5000/hub/library/busybox",
        "two/library/busybox",
        "docker.io/library/busybox",
    ]
    assert [each.insecure for each in found.endpoints(parse("docker.io/a:1"))] == [False, True, False]


def test_a_mirror_serves_only_digests_or_tags_where_told_so(tmp_path: Path) -> None:
    found = conf(
        tmp_path,
        """
        [[registry]]
        location = "a.io"
        [[registry.mirror]]
        location = "digests.io"
        pull-from-mirror = "digest-only"
        [[registry.mirror]]
        location = "tags.io"
        pull-from-mirror = "tag-only"
        [[registry]]
        location = "b.io"
        mirror-by-digest-only = true
        [[registry.mirror]]
        location = "digests.io"
        """,
    )

    assert endpoints(found, "a.io/x:1") == ["tags.io/x", "a.io/x"]
    assert endpoints(found, f"a.io/x@{DIGEST}") == ["digests.io/x", "a.io/x"]
    assert endpoints(found, "b.io/x:1") == ["b.io/x"]
    assert endpoints(found, f"b.io/x@{DIGEST}") == ["digests.io/x", "b.io/x"]


def test_a_wildcard_covers_every_subdomain_and_may_leave_the_name_as_it_is(tmp_path: Path) -> None:
    found = conf(tmp_path, '[[registry]]\nprefix = "*.example.com"\ninsecure = true')

    assert found.endpoints(parse("a.b.example.com/x:1")) == (Endpoint("a.b.example.com", "x", True),)
    assert found.endpoints(parse("example.com/x:1")) == (Endpoint("example.com", "x"),)


def test_a_wildcard_leaves_the_port_where_it_is(tmp_path: Path) -> None:
    found = conf(tmp_path, '[[registry]]\nprefix = "*.example.com"\nlocation = "mirror.io"')

    assert endpoints(found, "a.example.com:5000/x:1") == ["mirror.io:5000/x"]


def test_what_says_more_counts_more_than_a_wildcard_that_comes_first(tmp_path: Path) -> None:
    found = conf(
        tmp_path,
        '[[registry]]\nprefix = "*.example.com"\n[[registry.mirror]]\nlocation = "mirror.io"',
        '[[registry]]\nlocation = "bad.example.com"\nblocked = true\n'
        '[[registry]]\nprefix = "*.corp.example.com"\nblocked = true',
    )

    assert endpoints(found, "good.example.com/x:1") == ["mirror.io/x", "good.example.com/x"]
    for blocked in ("bad.example.com/x:1", "a.corp.example.com/x:1"):
        with pytest.raises(PermissionDenied, match="is blocked"):
            found.endpoints(parse(blocked))


def test_a_blocked_registry_is_refused_by_name(tmp_path: Path) -> None:
    found = conf(tmp_path, '[[registry]]\nlocation = "bad.io"\nblocked = true')

    with pytest.raises(PermissionDenied, match=r"registry bad.io of image bad.io/x:1 is blocked"):
        found.endpoints(parse("bad.io/x:1"))


def test_a_short_name_means_its_alias_else_each_search_registry(tmp_path: Path) -> None:
    found = conf(
        tmp_path,
        'unqualified-search-registries = ["quay.io", "docker.io"]\n[aliases]\nfedora = "registry.fedora.org/fedora"',
    )

    assert [str(each) for each in found.qualified(parse("fedora:40"))] == ["registry.fedora.org/fedora:40"]
    assert [str(each) for each in found.qualified(parse("nginx:1"))] == ["quay.io/nginx:1", "docker.io/library/nginx:1"]
    assert [str(each) for each in found.qualified(parse("x.io/nginx:1"))] == ["x.io/nginx:1"]


def test_without_any_say_a_short_name_is_docker_hubs(tmp_path: Path) -> None:
    assert [str(each) for each in RegistriesConf().qualified(parse("nginx:1"))] == ["docker.io/library/nginx:1"]


def test_an_empty_search_list_makes_short_names_an_error(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="'nginx:1' names no registry"):
        conf(tmp_path, "unqualified-search-registries = []").qualified(parse("nginx:1"))


def test_enforcing_mode_chooses_no_registry_among_several(tmp_path: Path) -> None:
    text = 'short-name-mode = "enforcing"\nunqualified-search-registries = ["a.io", "b.io"]'

    with pytest.raises(InvalidArgument, match=r"does not choose among a.io, b.io"):
        conf(tmp_path, text).qualified(parse("nginx:1"))


@pytest.mark.parametrize("mode", ["enforcing", "permissive", "disabled"])
def test_an_alias_or_a_single_registry_is_meant_in_every_mode(tmp_path: Path, mode: str) -> None:
    text = f'short-name-mode = "{mode}"\nunqualified-search-registries = ["a.io"]\n[aliases]\nweb = "b.io/team/web"\n'
    found = conf(tmp_path, text)

    assert [str(each) for each in found.qualified(parse("nginx:1"))] == ["a.io/nginx:1"]
    assert [str(each) for each in found.qualified(parse("web:1"))] == ["b.io/team/web:1"]
    assert [str(each) for each in found.qualified(parse(f"web@{DIGEST}"))] == [f"b.io/team/web@{DIGEST}"]


@pytest.mark.parametrize("mode", ["permissive", "disabled"])
def test_without_anybody_to_ask_all_registries_are_tried_unless_that_is_forbidden(tmp_path: Path, mode: str) -> None:
    text = f'short-name-mode = "{mode}"\nunqualified-search-registries = ["a.io", "b.io"]'

    assert [str(each) for each in conf(tmp_path, text).qualified(parse("x"))] == ["a.io/x", "b.io/x"]


def test_a_drop_in_overrides_tables_of_the_same_prefix_and_adds_others(tmp_path: Path) -> None:
    found = conf(
        tmp_path,
        '[[registry]]\nlocation = "a.io"\n[[registry]]\nlocation = "b.io"\n[aliases]\nx = "a.io/x"\ny = "a.io/y"',
        '[[registry]]\nprefix = "a.io"\nlocation = "c.io"\n[aliases]\nx = ""\nz = "a.io/z"',
    )

    assert endpoints(found, "a.io/x:1") == ["c.io/x"]
    assert endpoints(found, "b.io/x:1") == ["b.io/x"]
    assert set(found.aliases) == {"y", "z"}


def test_version_1_files_still_say_search_insecure_and_blocked(tmp_path: Path) -> None:
    found = conf(
        tmp_path,
        "[registries.search]\nregistries = ['a.io']\n[registries.insecure]\nregistries = ['b.io']\n"
        "[registries.block]\nregistries = ['c.io']",
    )

    assert [str(each) for each in found.qualified(parse("x:1"))] == ["a.io/x:1"]
    assert found.endpoints(parse("b.io/x:1"))[0].insecure
    with pytest.raises(PermissionDenied):
        found.endpoints(parse("c.io/x:1"))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("this is no toml", "cannot read"),
        ("[[registry]]\ninsecure = true", "prefix or location"),
        (
            '[[registry]]\nlocation = "a.io"\ninsecure = "yes"',
            r"registry\[0\].insecure is 'yes'; expected true or false",
        ),
        ('[[registry]]\nprefix = "a.*.io"\nlocation = "b.io"', "wildcard"),
        ('[[registry]]\nprefix = "a.io"', "location"),
        ('unqualified-search-registries = "a.io"', "expected a list of texts"),
        ('short-name-mode = "maybe"', "enforcing, permissive or disabled"),
        ('[[registry]]\nlocation = "a.io"\n[[registry.mirror]]\ninsecure = true', r"mirror\[0\].location"),
        ('[[registry]]\nlocation = "https://a.io"', r"registry\[0\].location is 'https://a.io'; .* without a scheme"),
        ('[[registry]]\nprefix = "http://a.io"\nlocation = "a.io"', "prefix .* without a scheme"),
        ('[[registry]]\nlocation = "a.io"\n[[registry.mirror]]\nlocation = "http://b.io"', "without a scheme"),
        ('unqualified-search-registries = ["https://a.io"]', "without a scheme"),
        ('[aliases]\nx = "y"', "full image name"),
        ('[aliases]\nx = "a.io/y:1"', "full image name"),
    ],
)
def test_a_wrong_file_is_an_error_with_file_key_and_expectation(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(FailedPrecondition, match=complaint) as caught:
        conf(tmp_path, text)
    assert "0.conf" in str(caught.value)


def test_files_are_read_anew_when_they_change_and_the_last_good_ones_stay_in_force(tmp_path: Path) -> None:
    main, drop_ins = tmp_path / "registries.conf", tmp_path / "registries.conf.d"
    drop_ins.mkdir()
    (drop_ins / "ignored.txt").write_text("not toml")
    files = RegistriesFiles(main, drop_ins)
    reference = parse("a.io/x:1")

    assert files.current().endpoints(reference) == (Endpoint("a.io", "x"),)

    main.write_text('[[registry]]\nlocation = "a.io"\ninsecure = true')
    assert files.current().endpoints(reference) == (Endpoint("a.io", "x", True),)

    (drop_ins / "10.conf").write_text('[[registry]]\nprefix = "a.io"\nlocation = "b.io"')
    assert files.current().endpoints(reference) == (Endpoint("b.io", "x"),)

    (drop_ins / "10.conf").write_text("broken")
    assert files.current().endpoints(reference) == (Endpoint("b.io", "x"),)

    (drop_ins / "10.conf").unlink()
    assert files.current().endpoints(reference) == (Endpoint("a.io", "x", True),)


def test_without_any_good_file_the_error_names_the_broken_one(tmp_path: Path) -> None:
    main = tmp_path / "registries.conf"
    main.write_text("broken")

    with pytest.raises(FailedPrecondition, match=str(main)):
        RegistriesFiles(main, None).current()


def test_a_replaced_file_of_the_same_size_is_noticed(tmp_path: Path) -> None:
    main, other = tmp_path / "a", tmp_path / "b"
    main.write_text('[[registry]]\nlocation = "a.io"\nblocked = false')
    other.write_text('[[registry]]\nlocation = "a.io"\nblocked = true ')
    os.utime(other, ns=(1, 1))
    files = RegistriesFiles(main, None)
    files.current()

    other.rename(main)

    with pytest.raises(PermissionDenied):
        files.current().endpoints(parse("a.io/x:1"))
