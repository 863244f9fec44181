"""The proof: miniclip beside transformers, stage by stage. This is only the door: the rooms are in validation/."""

import sys

from validation.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
