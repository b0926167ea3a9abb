"""Where the model that comes with the package lies."""

from pathlib import Path

DEMO = Path(__file__).parent / "demo"
