"""`python -m weighbridge.cli`."""

from weighbridge.cli import main

raise SystemExit(main())
