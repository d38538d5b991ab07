"""`python -m keepwarm`."""

from keepwarm.cli import main

if __name__ == "__main__":
    main()
