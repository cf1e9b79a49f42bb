"""Writes the pages and files that are made from the declarations in cri/."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from cri.config_text import default_toml, reference_markdown  # noqa: E402  after the path

(ROOT / "docs/reference/configuration.md").write_text(reference_markdown())
(ROOT / "deploy/config/crito.toml").write_text(default_toml())
