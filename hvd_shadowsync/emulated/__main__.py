"""The command line of emulated hosts."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import hvd_shadowsync.emulated as package
from hvd_shadowsync.emulated import cluster, job
from hvd_shadowsync.emulated.network import add_options, network_from
from hvd_shadowsync.launcher.command import LaunchError

PROGRAM = "python -m hvd_shadowsync.emulated"
VERBS = ("up", "run", "cut", "mend", "down")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command on emulated hosts, or make hosts that stay, use them, take them away."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        if given[:1] and given[0] in VERBS:
            return _verb(verbs().parse_args(given))
        options = parser().parse_args(given)
        network = network_from(options.hosts, options)
        return job.run(network, _command(options), os.environ, each=options.each)
    except LaunchError as error:
        print(f"emulated: {error}", file=sys.stderr)
        return 2


def _verb(options: argparse.Namespace) -> int:
    if options.verb == "up":
        made = cluster.up(network_from(options.hosts, options)).network
        print(f"up: {', '.join(host.name for host in made.as_hosts())}")
        return 0
    if options.verb == "run":
        inner = after_run().parse_args(options.rest)
        return cluster.run(options.hosts, _command(inner), os.environ, how=inner.how)
    if options.verb == "cut":
        cluster.cut(options.link, options.seconds)
        return 0
    if options.verb == "mend":
        cluster.mend(options.link)
        return 0
    print("the hosts are gone" if cluster.down() else "no hosts were up")
    return 0


def _command(options: argparse.Namespace) -> list[str]:
    command: list[str] = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        raise LaunchError("no command given; put it last")
    return command


def parser() -> argparse.ArgumentParser:
    """Return the command line for one command."""
    result = argparse.ArgumentParser(
        prog=PROGRAM,
        description=package.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("--hosts", type=int, required=True)
    result.add_argument("--each", action="store_true", help="run the command once on each host, as torchrun would")
    add_options(result)
    result.add_argument("command", nargs=argparse.REMAINDER)
    return result


def verbs() -> argparse.ArgumentParser:
    """Return the command line for hosts that stay."""
    result = argparse.ArgumentParser(prog=PROGRAM)
    added = result.add_subparsers(dest="verb", required=True)
    up = added.add_parser("up", help="make hosts that stay")
    up.add_argument("hosts", type=int)
    add_options(up)
    run = added.add_parser("run", help="run a command on the hosts that are up")
    run.add_argument("hosts", type=int)
    run.add_argument("rest", nargs=argparse.REMAINDER, metavar="[--fault-tolerant | --each | --first] COMMAND ...")
    cut = added.add_parser("cut", help="have a link carry nothing")
    cut.add_argument(
        "link", metavar="LINK", help="host2, the one at 10.77.0.2; or rack2, the second rack's to the others"
    )
    cut.add_argument("seconds", type=float, nargs="?", help="wait so long, and make it whole again; default: for good")
    mend = added.add_parser("mend", help="make a link that was cut whole again")
    mend.add_argument("link", metavar="LINK")
    added.add_parser("down", help="take the hosts away")
    return result


def after_run() -> argparse.ArgumentParser:
    """Return the command line behind `run N`."""
    result = argparse.ArgumentParser(prog=f"{PROGRAM} run N")
    how = result.add_mutually_exclusive_group()
    ways = {
        "fault-tolerant": "one rank on each host, by shadowrun --fault-tolerant",
        "each": "once on each host, as torchrun would",
        "first": "once, on the first host",
    }
    for name, said in ways.items():
        how.add_argument(f"--{name}", dest="how", action="store_const", const=name, help=f"{said}; default: by mpirun")
    result.set_defaults(how="mpi")
    result.add_argument("command", nargs=argparse.REMAINDER)
    return result


if __name__ == "__main__":
    sys.exit(main())
