"""`python -m benchmarks.interaction`."""

from benchmarks.interaction.run import main

if __name__ == "__main__":
    main()
