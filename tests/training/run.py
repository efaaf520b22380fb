"""Run commands of robustdiff one after another: each process of several does, started by torch.distributed.run."""

import json
import sys

from robustdiff import cli

if __name__ == "__main__":
    for arguments in json.loads(sys.argv[1]):
        sys.argv = ["robustdiff", *arguments]
        try:
            cli.main()
        except SystemExit as stop:
            if stop.code:
                raise
