"""``python -m ddcl_lightning`` is ``ddcl``."""

from ddcl_lightning.cli import main

main()
