"""`python -m mgpu`."""

from __future__ import annotations

from mgpu.cli import main

if __name__ == "__main__":
    main()
