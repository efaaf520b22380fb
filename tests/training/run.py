"""Train a recipe file on the CPU: for runs of several processes, started by accelerate's launcher."""

import sys

from robustdiff.recipe import load_recipe
from robustdiff.training.trainer import train

if __name__ == "__main__":
    train(load_recipe(sys.argv[1]), cpu=True)
