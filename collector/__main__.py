"""`python -m collector` is the same as `collector`."""

from collector.cli import main

if __name__ == "__main__":
    main()
