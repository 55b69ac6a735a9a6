"""``python -m jaxkv`` is ``jaxkv``."""

import sys

from jaxkv.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
