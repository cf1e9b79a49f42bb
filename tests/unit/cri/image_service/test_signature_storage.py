"""registries.d says where the signatures of an image lie."""

from pathlib import Path

import pytest

from cri.image_service.policy import registry_scopes
from cri.image_service.reference import parse
from cri.image_service.signature_storage import DEFAULT_LOOKASIDE, Storage, load
from oci.errors import Error


def storage(directory: Path, reference: str) -> Storage:
    return load(directory, registry_scopes(parse(reference)))


def test_without_files_signatures_lie_in_the_systems_directory(tmp_path: Path) -> None:
    assert storage(tmp_path / "none", "a.io/x:1") == Storage(DEFAULT_LOOKASIDE, attachments=False)
    assert load(None, []) == Storage(DEFAULT_LOOKASIDE, attachments=False)


def test_the_most_specific_entry_that_says_something_wins(tmp_path: Path) -> None:
    (tmp_path / "default.yaml").write_text(
        "default-docker:\n  sigstore: file:///default\n  use-sigstore-attachments: true\n"
    )
    (tmp_path / "a.yaml").write_text(
        "docker:\n"
        "  a.io:\n    lookaside: https://a.io/sigs\n    sigstore: https://old\n"
        "  a.io/team:\n    use-sigstore-attachments: false\n"
        "  a.io/team/x:1:\n    lookaside: file:///one\n    lookaside-staging: file:///written\n"
    )
    (tmp_path / "notes.txt").write_text("no: yaml: at all")

    assert storage(tmp_path, "b.io/x:1") == Storage("file:///default", attachments=True)
    assert storage(tmp_path, "a.io/x:1") == Storage("https://a.io/sigs", attachments=True)
    assert storage(tmp_path, "a.io/team/x:2") == Storage("https://a.io/sigs", attachments=False)
    assert storage(tmp_path, "a.io/team/x:1") == Storage("file:///one", attachments=False)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("docker: [", "cannot read .*2.yaml"),
        ("- x", "must be a mapping"),
        ("docker: [x]", "docker must be a mapping of scopes"),
        ("docker: {a.io: {lookaside: 1}}", "docker: a.io: lookaside must be a URL"),
        ("docker: {a.io: {use-sigstore-attachments: 'yes'}}", "a.io: use-sigstore-attachments must be true or false"),
        ("docker: {b.io: {}}", "docker: b.io is also in .*1.yaml"),
        ("default-docker: {lookaside: file:///x}", "default-docker is also in .*1.yaml"),
    ],
)
def test_a_wrong_file_is_told(tmp_path: Path, content: str, complaint: str) -> None:
    (tmp_path / "1.yaml").write_text("default-docker: {lookaside: file:///d}\ndocker: {b.io: {}}\n")
    (tmp_path / "2.yaml").write_text(content)

    with pytest.raises(Error, match=complaint):
        storage(tmp_path, "a.io/x:1")
