"""The console script `hotpath`. `up` goes straight to the supervisor: importing the rest would delay every start."""

import sys


def main() -> None:
    """Run the command line; exits with the command's code."""
    if sys.argv[1:2] == ["up"]:
        from deploy.cli import up  # noqa: PLC0415 - see above

        up.entry()
    from deploy.cli import app  # noqa: PLC0415 - see above

    app.run()


if __name__ == "__main__":
    main()
