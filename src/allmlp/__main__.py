"""python -m allmlp: the same as the command `mixer`."""

from allmlp.cli.main import main

if __name__ == "__main__":
    main()
