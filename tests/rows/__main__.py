"""Proves the table of rows: without what a row is about, one of its tests fails. `python -m tests.rows [PATTERN]`.

For each row its tests run once more with a daemon that lacks just this: a call is answered with an error, a field of
requests is not seen, a field of answers is not filled in. Exit status 0: no row has survived that, and all were tried.
"""

import fnmatch
import json
import os
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "tests/rows/rows.toml"
KINDS = ("calls", "requests", "answers")


def main(pattern: str) -> int:
    table = tomllib.loads(TABLE.read_text())
    rows = {f"{kind}:{row}": tests for kind in KINDS for row, tests in table[kind].items()}
    chosen = {row: tests for row, tests in rows.items() if fnmatch.fnmatch(row, pattern)}
    with tempfile.TemporaryDirectory(prefix="crito-rows-") as directory:
        program, plan = Path(directory) / "crito", Path(directory) / "plan.json"
        program.write_text(
            f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\n"
            "from tests.rows import mutant\nmutant.install()\nfrom cri.cli import main\nsys.exit(main())\n"
        )
        program.chmod(0o755)
        plan.write_text(json.dumps(chosen))
        environment = {
            **os.environ,
            "CRITO_TEST_PROGRAM": str(program),
            "CRITO_TEST_PLAN": str(plan),
            "CRITO_TEST_MUTATION": str(Path(directory) / "mutation"),
        }
        tests = sorted({test for named in chosen.values() for test in named})
        command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.rows.mutant", "--no-header", "--tb=no", *tests]
        return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "*"))
