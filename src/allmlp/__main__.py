"""`python -m allmlp`: the `mixer` command."""

from allmlp.cli.main import main

if __name__ == "__main__":
    main()
