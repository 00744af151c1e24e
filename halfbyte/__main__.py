"""`python -m halfbyte`."""

from halfbyte.cli.app import main

if __name__ == "__main__":
    main()
