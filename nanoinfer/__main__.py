"""`python -m nanoinfer check`."""

import argparse
import sys


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m nanoinfer", description="An LLM inference engine.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check", help="report versions, devices and kernels, and test every kernel in seconds")
    parser.parse_args()
    from nanoinfer import check

    return check.main()


if __name__ == "__main__":
    sys.exit(main())
