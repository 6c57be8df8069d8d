"""`python -m brlite` is the command `brlite`."""

from brlite.commands.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
