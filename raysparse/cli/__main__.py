"""`python -m raysparse.cli`: the commands where the package lies in a folder and is not installed, as in a Ray job."""

from raysparse.cli import main

main()
