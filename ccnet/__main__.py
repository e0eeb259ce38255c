"""`python -m ccnet`: the console command."""

import sys

from ccnet.cli.main import main

sys.exit(main())
