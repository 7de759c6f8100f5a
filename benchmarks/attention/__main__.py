"""`python -m benchmarks.attention`."""

from benchmarks.attention.run import main

if __name__ == "__main__":
    main()
