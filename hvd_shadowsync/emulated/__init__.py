"""Several hosts on one machine: network namespaces with links of known rate, latency and loss.

The hosts, the switches between them and the command live in namespaces of their own, down to process ids. When the
first process in there ends, by whatever signal, the kernel takes all of it away: nothing is left to be cleaned up, and
the machine's own network is never touched. Temporary files (TMPDIR) and /dev/shm are the job's own as well. Needs
Linux with `ip` and `tc`, and root or user namespaces.

For one command:

    python -m hvd_shadowsync.emulated --hosts 4 --rate 1gbit --latency 0.2ms [--racks 2 --rack-rate 1gbit] COMMAND...

COMMAND runs on the first host. The others, listed in SHADOW_EMULATED, are reached by `/proc/1/fd/200 HOST COMMAND`,
which takes ssh's place. With `--each` it runs once on each host, with RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR,
MASTER_PORT and GLOO_SOCKET_IFNAME set as torchrun would: so `torch.distributed` starts from `env://`. What the
processes print is passed through; when one fails the others are ended, and its exit code is the command's.
`shadowrun --emulated 4 ...` starts the ranks of one MPI job on all hosts.

For several commands one after the other, hosts that stay until they are taken away (or killed):

    python -m hvd_shadowsync.emulated up 4 --rate 1gbit --latency 0.2ms
    python -m hvd_shadowsync.emulated run 4 COMMAND...          # mpirun, one rank on each host
    python -m hvd_shadowsync.emulated run 4 --each COMMAND...   # as above; --first: once, on the first host
    python -m hvd_shadowsync.emulated run 4 --fault-tolerant COMMAND...     # as shadowrun --fault-tolerant does
    python -m hvd_shadowsync.emulated cut host2 10              # its link carries nothing for ten seconds
    python -m hvd_shadowsync.emulated cut host2                 # the same until `mend host2`
    python -m hvd_shadowsync.emulated down

A link that is cut loses what is on it, and neither end notices: as where a switch farther away fails. `--cut
host2@20+10` does so for one command, from second 20 on for ten, and `rack2@20` for all hosts of a rack, for good.

Latency and loss are the kernel's where it has netem, else a process's of ours for each host (see `delay`), which takes
CPU time from the job. The hosts have this machine's settings for TCP: over a long way, one connection fills a link only
where net.ipv4.tcp_rmem and tcp_wmem allow for rate times round trip, as between real hosts.
"""

from hvd_shadowsync.emulated.job import AGENT, run, wrapped
from hvd_shadowsync.emulated.network import OPTIONS, SUBNET, Network, add_options, commands, network_from

__all__ = ["AGENT", "OPTIONS", "SUBNET", "Network", "add_options", "commands", "network_from", "run", "wrapped"]
