"""Kills real runs at random moments: python -m tests.faults [--kills=50] [--processes=1,2,4]

Prints a line for each kind of run; ends with an error at the first that differs by a bit from the
run that nobody killed. Ten minutes for fifty kills of one process, on two cores.
"""

import argparse
import math

import tests.conftest  # noqa: F401  (what it sets of the environment, for the runs too)
from tests.faults.kills import check


def main() -> None:
    parser = argparse.ArgumentParser(prog='python -m tests.faults')
    parser.add_argument('--kills', type=int, default=50, help='of each kind of run')
    parser.add_argument('--processes', default='1,2,4', help='numbers of processes')
    parser.add_argument('--updates', default='dense,sparse', help='of value tables')
    parser.add_argument('--minutes', type=float, default=math.inf, help='none is killed later')
    parser.add_argument('--seed', type=int, default=0, help='of the moments and signals')
    given = parser.parse_args()
    for processes in map(int, given.processes.split(',')):
        for updates in given.updates.split(','):
            print(check(updates, processes, given.kills, given.seed, 60 * given.minutes), flush=True)


if __name__ == '__main__':
    main()
