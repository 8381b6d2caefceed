"""Checked-in files that are generated: written, or compared with what would be written."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(file: Path, text: str, module: str, arguments: list[str] | None = None) -> None:
    """Writes `text` to `file`, or to the file named in the arguments; with `--check` exits with 1 where it differs."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=f"Generates {file} from the models.")
    parser.add_argument("file", type=Path, nargs="?", default=file, help=f"the file (default: {file})")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the file is not current")
    asked = parser.parse_args(arguments)
    if asked.check:
        if not asked.file.is_file() or asked.file.read_text(encoding="utf-8") != text:
            sys.exit(f"{asked.file} is not current; run `python -m {module}`")
        return
    asked.file.parent.mkdir(parents=True, exist_ok=True)
    asked.file.write_text(text, encoding="utf-8")
    print(asked.file)
