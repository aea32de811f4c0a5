"""`python -m mtml` is the command `mtml`."""

from mtml.cli import main

if __name__ == "__main__":
    main()
