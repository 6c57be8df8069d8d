"""`python -m tests.journeys [NAME ...]`: run the journeys, or those named, and print each as a page."""

import importlib
import sys
from pathlib import Path


def main() -> None:
    files = sorted(Path(__file__).parent.glob("test_*.py"))
    for name in sys.argv[1:] or [path.stem.removeprefix("test_") for path in files]:
        module = importlib.import_module(f"tests.journeys.test_{name}")
        if hasattr(module, "journey"):
            print(f"## {name.replace('_', ' ')}: {module.__doc__.splitlines()[0]}\n\n{module.journey()}\n")


if __name__ == "__main__":
    main()
