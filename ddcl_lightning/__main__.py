"""``python -m ddcl_lightning`` is ``ddcl``."""

from ddcl_lightning.cli.commands import main

main()
