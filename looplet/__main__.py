"""`python -m looplet`: the same as the command `looplet`."""

from looplet.cli import main

if __name__ == "__main__":
    main(prog_name="python -m looplet")
