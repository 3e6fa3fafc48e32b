#!/usr/bin/python3
"""Runs rdma-core's own pyverbs tests (a folder of them, as Debian ships it, unpacked) in an order that a seed decides, one
line for each: what came out, its name, and why.

usage: run.py FOLDER SEED [options of the suite: --dev NAME, --gid N]

The verdict is the caller's: the suite turns "not supported" into a skip, so that a run without a failure says little."""
import importlib.util
import os
import random
import re
import sys
import unittest

# These need one vendor's hardware.
VENDORS = re.compile(r"tests\.test_(mlx5|efa|cuda)")


def load(folder):
    """Imports the folder as the package `tests`, which is what its modules call it."""
    sys.path[:0] = [os.path.dirname(folder), folder]
    spec = importlib.util.spec_from_file_location(
        "tests", os.path.join(folder, "__init__.py"), submodule_search_locations=[folder])
    package = importlib.util.module_from_spec(spec)
    sys.modules["tests"] = package
    spec.loader.exec_module(package)
    return package


def flat(suite):
    for test in suite:
        if isinstance(test, unittest.TestSuite):
            yield from flat(test)
        else:
            yield test


class Lines(unittest.TestResult):
    """The first thing that goes wrong with a test is its result: tearDown may add to it."""

    def startTest(self, test):
        super().startTest(test)
        self.outcome = ("OK", "")

    def note(self, word, why):
        if self.outcome[0] in ("OK", "SKIP"):
            first = str(why).splitlines()
            self.outcome = (word, first[0] if first else "")

    def addSkip(self, test, reason):
        self.note("SKIP", reason)

    def addFailure(self, test, err):
        self.note("FAIL", err[1])

    def addError(self, test, err):
        self.note("ERROR", f"{err[0].__name__}: {err[1]}")

    def stopTest(self, test):
        word, why = self.outcome
        print(word, test.id(), why, flush=True)
        super().stopTest(test)


def main():
    folder, seed = os.path.abspath(sys.argv[1]), sys.argv[2]
    package = load(folder)
    sys.argv[1:] = sys.argv[3:]
    sys.modules["args_parser"].parser.parse_args()  # the suite's own, imported by it
    tests = [t for t in flat(unittest.defaultTestLoader.loadTestsFromModule(package)) if not VENDORS.match(t.id())]
    tests.sort(key=lambda test: test.id())
    random.seed(seed)  # the tests themselves draw from it too
    random.shuffle(tests)
    result = Lines()
    for test in tests:
        test.run(result)
    print("END", len(tests))


main()
