"""`python -m client` is the `carousel` command."""

import sys

from client.cli import main

sys.exit(main())
