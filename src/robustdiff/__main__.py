"""``python -m robustdiff``, and so ``accelerate launch -m robustdiff``."""

from robustdiff.cli import main

if __name__ == "__main__":
    main()
