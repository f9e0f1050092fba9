"""`python -m dave_fast` is `dave-fast`."""

from dave_fast.cli.app import main

if __name__ == "__main__":
    main()
