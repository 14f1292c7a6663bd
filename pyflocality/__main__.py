"""Runs the command line: `python -m pyflocality`."""

from __future__ import annotations

import sys

from pyflocality.cli import main

sys.exit(main())
