"""`python -m robust`: the command line, where the `robust` script is not on the path."""

from robust.cli.main import main

if __name__ == "__main__":
    main()
