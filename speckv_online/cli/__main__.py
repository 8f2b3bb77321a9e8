"""``python -m speckv_online.cli`` is ``speckv``."""

from speckv_online.cli.app import main

if __name__ == "__main__":
    raise SystemExit(main())
