"""``python -m miniclip`` is ``miniclip``."""

import sys

from miniclip.cli import main

sys.exit(main())
