"""`python -m atoma_jax.cli`: the program where its script is not on the path."""

from atoma_jax.cli import main

if __name__ == "__main__":
    main()
