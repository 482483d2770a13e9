"""What lies in eval/ is imported as eval/run.py imports it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "eval"))
