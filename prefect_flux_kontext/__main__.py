"""`python -m prefect_flux_kontext` is the command line."""

from __future__ import annotations

import sys

from prefect_flux_kontext.cli import main

if __name__ == "__main__":
    sys.exit(main())
