import sys

from ccnet.cli.main import main

sys.exit(main())
