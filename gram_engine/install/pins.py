"""The versions that requirements*.txt pin for one version of Python.

Only the standard library is imported: this runs before anything is installed.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PYTHONS = ((3, 11), (3, 12), (3, 13))
"""Supported versions of Python, as in tools/make_venv.sh and setup.py."""
LINE = re.compile(r'([\w-]+)(?:\[[\w,]+\])?==([\w.]+)(?:; *python_version (<|>=) "3\.(\d+)")?')


def pins(file: str, python: tuple[int, int] = sys.version_info[:2]) -> dict[str, str]:
    """Package -> version in a requirements file of the checkout, for a Python version (major, minor).

    Of the markers only python_version is evaluated; others, such as the platform, are taken to hold.
    """
    found = {}
    for line in (ROOT / file).read_text(encoding="utf-8").splitlines():
        if match := LINE.match(line):
            name, version, operator, minor = match.groups()
            older = operator is not None and python < (3, int(minor))
            if operator is None or older == (operator == "<"):
                found[name] = version
    return found
