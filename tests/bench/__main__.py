"""The bench's command. What it needs is imported here only: the processes that it spawns import this module too."""

if __name__ == "__main__":
    from tests.bench.command import main

    main()
