"""`python -m hf_kprune` is `hf-kprune`."""

import sys

from .cli.terminal import main


if __name__ == "__main__":
    sys.exit(main())
