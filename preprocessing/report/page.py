"""What every self-contained page needs: its templates, and the hash by which its policy allows its style or script."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

import jinja2


def templates(folder: Path) -> jinja2.Environment:
    """The templates of a folder; values in them are escaped."""
    loader = jinja2.FileSystemLoader(folder)
    return jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)


def policy_hash(text: str) -> str:
    """The SHA-256 of an inline style or script as a Content-Security-Policy names it, without quotes: sha256-..."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
