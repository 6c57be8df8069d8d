"""`python -m brlite` is the command `brlite`."""

from brlite.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
