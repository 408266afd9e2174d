"""`python -m polygraft`, the same as `polygraft`."""

from polygraft.cli import main

if __name__ == "__main__":
    main()
