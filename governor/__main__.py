"""`python -m governor`."""

from governor.cli import main

main()
