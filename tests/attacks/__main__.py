"""`python -m tests.attacks`."""

import sys

from tests.attacks.run import main

if __name__ == "__main__":
    sys.exit(main())
