"""`python -m bench NAME` runs a benchmark; without a name, lists them.

A benchmark is a module of this folder with a docstring and a function `run()`. It prints what it measured and on what
machine; none is part of the tests, because a time is not a promise.
"""

import importlib
import pkgutil
import sys

import bench


def main(arguments: list[str]) -> int:
    names = sorted(module.name for module in pkgutil.iter_modules(bench.__path__) if not module.name.startswith("_"))
    if not names:
        print("There is no benchmark yet: each comes with the part it measures.")
        return 0 if not arguments else 2
    if len(arguments) != 1 or arguments[0] not in names:
        print("python -m bench NAME, where NAME is one of:")
        for name in names:
            purpose = (importlib.import_module(f"bench.{name}").__doc__ or "").strip().partition("\n")[0]
            print(f"  {name:<12} {purpose}")
        return 0 if not arguments else 2
    importlib.import_module(f"bench.{arguments[0]}").run()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
