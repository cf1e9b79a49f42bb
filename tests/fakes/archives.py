"""Images whose archives go to the edges of what tar and layers can say, by name; the same every time."""

import gzip
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.e2e.harness.images import BUSYBOX, busybox_layer
from tests.fakes.layers import directory, entry, file, hard_link, symlink, tar

LONG = "n" * 255
DEEP = "/".join(["d" * 60] * 6)
ATTRIBUTES = {"SCHILY.xattr.user.mine": "value", "SCHILY.xattr.trusted.other": "t"}
CAPABILITY = b"\x01\0\0\x02\0\4\0\0\0\0\0\0\0\0\0\0\0\0\0\0".decode("latin-1")
SYSTEM = tar(
    [
        directory("bin", 0o755, mtime=1),
        file("bin/sh", b"shell", 0o755, mtime=2),
        directory("etc", 0o750, uid=1, gid=2, mtime=3),
        file("etc/passwd", b"root", 0o640, mtime=4),
        directory("etc/conf.d", 0o711, mtime=5),
        file("etc/conf.d/a", b"a", mtime=6),
        symlink("lib", "usr/lib", mtime=7),
        directory("usr", 0o755, mtime=8),
        directory("usr/lib", 0o755, mtime=9),
        file("usr/lib/libc", b"libc", mtime=10),
    ]
)


LOWER = tar(
    [
        directory("./", 0o755, mtime=1000),
        directory("etc", 0o750, uid=1, gid=2, mtime=1001),
        file("etc/passwd", b"root", 0o640, uid=3, gid=4, mtime=1002),
        directory("usr", 0o755, mtime=1003),
        directory("usr/lib", 0o711, uid=9, mtime=1004),
        file("usr/lib/lib.so.1", b"elf" * 5000, 0o755),
        symlink("usr/lib/lib.so", "lib.so.1"),
        symlink("lib", "usr/lib", mtime=1005),
        hard_link("usr/lib/same", "usr/lib/lib.so.1"),
        file("usr/suid", b"s", 0o6755, uid=7, gid=7),
        file("usr/capable", b"c", 0o755, pax_headers={"SCHILY.xattr.security.capability": CAPABILITY}),
        directory("gone", mtime=1006),
        file("gone/a", b"a"),
        directory("opaque", mtime=1007),
        file("opaque/hidden", b"h"),
        directory("becomes-file", mtime=1008),
        file("becomes-file/x", b"x"),
        file("becomes-dir", b"f"),
        file("n" * 200, b"long", pax_headers={"mtime": "1234567890.123456789"}),
        entry("fifo", type=tarfile.FIFOTYPE, mode=0o622),
        entry("tty", type=tarfile.CHRTYPE, devmajor=5, devminor=0, mode=0o620, gid=5),
    ]
)
UPPER = tar(
    [
        file("usr/lib/new", b"new", mtime=2000),  # without entries for usr and usr/lib
        file(".wh.gone"),
        directory("opaque", 0o700, mtime=2001),
        file("opaque/.wh..wh..opq"),
        file("opaque/shown", b"s"),
        file("becomes-file", b"now a file"),
        directory("becomes-dir", 0o751, mtime=2002),
        file("becomes-dir/y", b"y"),
        file("usr/capable", b"changed", 0o700),
    ]
)
TOP = tar([file("usr/.wh.suid"), file("etc/hosts", b"hosts", mtime=3000), directory("var", mtime=3001)])
TREES = [LOWER, UPPER, TOP]


def sparse(*options: str) -> bytes:
    """A file with holes at its start, amid it and at its end, as GNU tar writes it."""
    with tempfile.TemporaryDirectory() as folder:
        with (Path(folder) / "sparse").open("wb") as made:
            for offset in (1 << 20, 3 << 20):
                made.seek(offset)
                made.write(b"data" * 3000)
            made.truncate(5 << 20)
        command = ["tar", "-C", folder, "--sparse", "--mtime=@1000", "--owner=0", "--group=0", *options, "-cf", "-"]
        return subprocess.run([*command, "sparse"], check=True, capture_output=True).stdout


ARCHIVES: Mapping[str, Sequence[bytes]] = {
    **({"busybox": [gzip.decompress(busybox_layer()[0].data)]} if BUSYBOX.exists() else {}),
    "everything in three layers": TREES,
    "absolute paths": [
        tar([directory("/d", 0o711, mtime=5), file("/d/f", b"f"), file("/g", b"g"), symlink("/s", "/d/f")])
    ],
    "paths with dots": [
        tar([file("../up", b"1"), file("a/../../over", b"2"), file("./b/./c//d", b"3"), file("/../e", b"4")])
    ],
    "links out of the tree": [
        tar(
            [
                symlink("abs", "/etc/shadow"),
                symlink("up", "../../../../etc/shadow"),
                symlink("dangling", "/none"),
                symlink("loop", "loop"),
            ]
        )
    ],
    "files through links out of the tree": [
        tar([symlink("abs", "/etc"), file("abs/in", b"1"), symlink("up", "../../../../tmp/x"), file("up/in", b"2")])
    ],
    "files in place of links out of the tree": [
        tar([symlink("f", "/etc/shadow"), file("f", b"mine"), symlink("d", "/etc"), directory("d", 0o700, mtime=5)])
    ],
    "a link in place of a directory that is in use": [
        tar([directory("d"), file("d/one", b"1"), symlink("d", "/etc"), file("d/two", b"2")])
    ],
    "a hard link out of the tree": [tar([hard_link("h", "../../../../../etc/hostname")])],
    "a hard link through a link out of the tree": [tar([symlink("d", "/etc"), hard_link("h", "d/hostname")])],
    "a hard link to nothing": [tar([hard_link("h", "missing")])],
    "a hard link to a file of the layer below": [SYSTEM, tar([hard_link("h", "etc/passwd")])],
    "hard links to links": [
        tar(
            [
                file("f", b"f", 0o4755, mtime=5),
                hard_link("h1", "f"),
                hard_link("h2", "h1"),
                symlink("s", "f", mtime=6),
                hard_link("hs", "s"),
                hard_link("hs2", "hs"),
                entry("p", type=tarfile.FIFOTYPE),
                hard_link("hp", "p"),
            ]
        )
    ],
    "a hard link to itself and twice": [
        tar([file("a", b"x"), hard_link("a", "a"), hard_link("b", "a"), hard_link("b", "./a")])
    ],
    "whiteouts of everything": [SYSTEM, tar([file(".wh.bin"), file(".wh.etc"), file(".wh.lib"), file(".wh.usr")])],
    "an opaque root": [SYSTEM, tar([file(".wh..wh..opq"), file("only", b"o")])],
    "opaque directories": [
        SYSTEM,
        tar(
            [
                directory("etc", 0o700, mtime=50),
                file("etc/.wh..wh..opq"),
                file("etc/new", b"n"),
                directory("usr", 0o755, mtime=51),
                directory("usr/lib", 0o755, mtime=52),
                file("usr/lib/new"),
                file("usr/lib/.wh..wh..opq"),
            ]
        ),
    ],
    "whiteouts and what comes in their place": [
        SYSTEM,
        tar(
            [
                file(".wh.bin"),
                file("bin", b"now a file"),
                file("etc/conf.d/.wh.a"),
                directory("etc/conf.d/a", 0o700, mtime=50),
                file(".wh.usr"),
                directory("usr", 0o700, mtime=51),
                file("usr/new", b"n"),
            ]
        ),
    ],
    "what comes and a whiteout after it": [
        SYSTEM,
        tar(
            [
                directory("bin", 0o755, mtime=50),
                file("bin/sh", b"new"),
                file("bin/.wh.sh"),
                file("new", b"n"),
                file(".wh.new"),
            ]
        ),
    ],
    "whiteouts of nothing": [
        SYSTEM,
        tar([file(".wh.none"), directory("etc", 0o750, mtime=50), file("etc/.wh.none"), file("none2/.wh.none")]),
    ],
    "whiteouts in the lowest layer": [
        tar(
            [
                file(".wh.none"),
                file("f", b"f"),
                directory("d", 0o755, mtime=5),
                file("d/.wh..wh..opq"),
                file("d/x", b"x"),
            ]
        )
    ],
    "whiteouts through two layers": [
        SYSTEM,
        tar([file("etc/conf.d/.wh.a"), file("etc/.wh.passwd")]),
        tar([file("etc/passwd", b"again", mtime=60)]),
    ],
    "AUFS' own files": [tar([file(".wh..wh.plnk"), directory(".wh..wh.orph"), file("kept", b"k")])],
    "device nodes": [
        tar(
            [
                entry("null", type=tarfile.CHRTYPE, devmajor=1, devminor=3, mode=0o666),
                entry("disk", type=tarfile.BLKTYPE, devmajor=259, devminor=300, mode=0o660, gid=6),
                entry("p", type=tarfile.FIFOTYPE, mode=0o622, uid=5),
            ]
        )
    ],
    "a device node 0:0": [
        tar([file("f", b"f"), directory("d", mtime=5)]),
        tar([entry("zero", type=tarfile.CHRTYPE, mode=0o600), entry("f", type=tarfile.CHRTYPE, mode=0o600)]),
    ],
    "names of 255 bytes": [
        tar([directory("d" * 255, 0o711, mtime=5), file(f"{'d' * 255}/{LONG}", b"f"), symlink("s", "t" * 255)])
    ],
    "names of 255 bytes, GNU headers": [
        tar(
            [
                directory("d" * 255, 0o711, mtime=5),
                file(f"{'d' * 255}/{LONG}", b"f"),
                hard_link("h", f"{'d' * 255}/{LONG}"),
                symlink("s", "t" * 300),
            ],
            tarfile.GNU_FORMAT,
        )
    ],
    "names of 256 bytes": [tar([file("n" * 256)])],
    "a prefix of ustar": [
        tar([file(f"{'p' * 90}/{'q' * 90}", b"f"), directory(f"{'p' * 90}", 0o711, mtime=5)], tarfile.USTAR_FORMAT)
    ],
    "names of any bytes": [tar([file("\udcff\udc80 \n\x01", b"f"), file("ümläut", b"u")])],
    "PAX headers": [
        tar(
            [
                file(
                    "f",
                    b"f",
                    uid=3_000_000,
                    gid=3_000_001,
                    mtime=5.5,
                    pax_headers={"mtime": "1234567890.123456789", "comment": "c", **ATTRIBUTES},
                ),
                directory("d", 0o755, mtime=5, pax_headers=ATTRIBUTES),
                file(DEEP + "/f", b"d"),
            ]
        )
    ],
    "GNU numbers": [
        tar(
            [file("f", b"f", uid=3_000_000, gid=3_000_001, mtime=1 << 34), file("old", b"o", mtime=-1000)],
            tarfile.GNU_FORMAT,
        )
    ],
    "file capabilities and set-id bits": [
        tar(
            [
                file("c", b"c", 0o755, uid=5, pax_headers={"SCHILY.xattr.security.capability": CAPABILITY}),
                file("s", b"s", 0o6755, uid=7, gid=8),
                directory("t", 0o3777, gid=9, mtime=5),
            ]
        )
    ],
    "xattrs that steer overlayfs": [
        tar(
            [
                directory("d", 0o755, mtime=5, pax_headers={"SCHILY.xattr.trusted.overlay.opaque": "y"}),
                file("f", b"f", pax_headers={"SCHILY.xattr.trusted.overlay.redirect": "/etc"}),
            ]
        )
    ],
    "a sparse file, GNU's old format": [sparse("--format=gnu")],
    "a sparse file, PAX 0.0": [sparse("--format=pax", "--sparse-version=0.0")],
    "a sparse file, PAX 0.1": [sparse("--format=pax", "--sparse-version=0.1")],
    "a sparse file, PAX 1.0": [sparse("--format=pax", "--sparse-version=1.0")],
    "duplicate entries": [
        tar(
            [
                file("f", b"old", 0o600),
                file("f", b"new", 0o640),
                directory("d", 0o700, mtime=5),
                file("d/kept", b"k"),
                directory("d", 0o711, mtime=6),
                symlink("s", "x"),
                symlink("s", "y"),
                entry("p", type=tarfile.FIFOTYPE),
                hard_link("p", "f"),
            ]
        )
    ],
    "duplicate entries of other kinds": [
        tar(
            [
                directory("a"),
                file("a/in", b"gone"),
                file("a", b"file now"),
                file("b", b"file"),
                directory("b", 0o700, mtime=5),
                file("b/in", b"in"),
                symlink("c", "b"),
                directory("c", 0o711, mtime=6),
            ]
        )
    ],
    "a file as a parent": [tar([file("e", b"file"), file("e/in", b"needs a directory")])],
    "a file to a directory and back between layers": [
        tar([file("a", b"file"), directory("b", 0o700, mtime=5), file("b/in", b"gone"), symlink("c", "b")]),
        tar([directory("a", 0o711, mtime=6), file("a/in", b"in"), file("b", b"file"), directory("c", 0o700, mtime=7)]),
        tar([file("a", b"file again"), directory("b", 0o755, mtime=8), entry("c", type=tarfile.FIFOTYPE)]),
    ],
    "a file as a parent between layers": [tar([file("e", b"file")]), tar([file("e/in", b"needs a directory")])],
    "a link as a parent between layers": [SYSTEM, tar([file("lib/new", b"n")])],
    "a link and a directory between layers": [SYSTEM, tar([directory("lib", 0o755, mtime=50), file("lib/new", b"n")])],
    "directories that no entry describes": [tar([file("a/b/c", b"x"), directory("a/d", 0o700, mtime=5)])],
    "directories that a layer below describes": [
        SYSTEM,
        tar([file("etc/conf.d/new", b"n"), file("usr/lib/new", b"n")]),
    ],
    "a root with attributes": [
        tar([directory("./", 0o700, uid=8, gid=9, mtime=5), file("f", b"f")]),
        tar([file("g", b"g")]),
    ],
    "a directory described below and implied above": [
        tar([directory("a", 0o700, uid=5, mtime=7)]),
        tar([file("a/b/c", b"x")]),
    ],
    "a directory whited out and implied": [
        tar([directory("a", 0o700), file("a/x")]),
        tar([file(".wh.a"), file("a/y")]),
    ],
    "an opaque directory that is implied": [
        tar([directory("a", 0o711), directory("a/b", 0o701)]),
        tar([file("a/.wh..wh..opq"), file("a/b/c")]),
    ],
    "a directory described twice": [
        tar([directory("a", 0o700, mtime=9)]),
        tar([directory("a", 0o755, mtime=10), file("a/b/c")]),
    ],
    "files before their directories": [tar([file("d/f", b"f"), directory("d", 0o700, uid=3, mtime=5)])],
}
