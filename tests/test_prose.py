"""The wording of code and documentation."""

import subprocess
import sys
from pathlib import Path


def test_code_and_documentation_use_plain_english() -> None:
    check = Path(__file__).parents[1] / ".ci" / "prose"
    result = subprocess.run([sys.executable, check], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]
