"""`python -m deploy.cli`: the `hotpath` command where it is not on the path."""

from deploy.cli.main import main

if __name__ == "__main__":
    main()
