"""`python -m bench NAME [ARGS…]` runs a benchmark; without a name, lists them.

A benchmark is a module of this folder that can be run, with a docstring that says what it measures. It prints what it
measured and on what machine; none is part of the tests, because a time is not a promise.
"""

import ast
import runpy
import sys
from pathlib import Path


def find_benchmarks() -> dict[str, str]:
    """Their names, and the first line of what each says of itself."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("[!_]*.py")):
        source = path.read_text()
        if "__main__" in source:
            found[path.stem] = (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]
    return found


def main(arguments: list[str]) -> int:
    benchmarks = find_benchmarks()
    if arguments and arguments[0] in benchmarks:
        sys.argv[1:] = arguments[1:]
        runpy.run_module(f"bench.{arguments[0]}", run_name="__main__", alter_sys=True)
        return 0
    if not benchmarks:
        print("There is no benchmark yet: each comes with the part it measures.")
    else:
        print("python -m bench NAME [ARGS…], where NAME is one of:")
        for name, purpose in benchmarks.items():
            print(f"  {name:<12} {purpose}")
    return 2 if arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
