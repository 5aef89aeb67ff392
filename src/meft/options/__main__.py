"""Writes the reference page of options: `python -m meft.options docs/options.md`."""

from __future__ import annotations

import sys
from pathlib import Path

from .page import reference_page

Path(sys.argv[1]).write_text(reference_page(), encoding="utf-8")
