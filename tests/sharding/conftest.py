"""Processes of their own, for devices that must be asked for before JAX starts."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def printed_by(module: str, *arguments: str, **environment: str) -> Any:
    """The JSON that `python -m tests.sharding.MODULE ARGUMENTS...` prints."""
    command = [sys.executable, "-m", f"tests.sharding.{module}", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)
