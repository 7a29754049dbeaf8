"""`python -m flowanchor train ...`: the command `flowanchor`, also for `torchrun -m flowanchor train ...`."""

from flowanchor.programs.umbrella import main

if __name__ == "__main__":
    main()
