"""python -m mlp_mixer: the same as the command `mixer`."""

from mlp_mixer.cli.main import main

if __name__ == "__main__":
    main()
