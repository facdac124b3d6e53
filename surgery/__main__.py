"""`python -m surgery`, which `torchrun -m surgery` needs: the command line."""

from surgery.cli import main

if __name__ == "__main__":
    main()
