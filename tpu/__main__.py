"""`python -m tpu`, from the root of a checkout."""

import sys

from tpu.cli import main

if __name__ == "__main__":
    sys.exit(main())
