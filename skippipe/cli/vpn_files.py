"""The files of `skippipe vpn`: one for each host, readable for this user alone."""

from collections.abc import Sequence
from ipaddress import IPv4Network
from pathlib import Path

from skippipe.checkpoint.huggingface.new_directory import check_unused, new_directory
from skippipe.cluster.wireguard import Endpoint, VpnHost, configuration, vpn_hosts
from skippipe.errors import InputError
from skippipe_scheduler.errors import nearest
from skippipe_scheduler.files import write_atomically
from skippipe_scheduler.problem.cluster import load_cluster


def write_vpn(
    cluster_path: Path, target: Path, endpoints: Sequence[str], nodes: Sequence[str], network: str
) -> list[VpnHost]:
    """Write DIR/NODE.conf for all nodes of a cluster file, or for those of `nodes`; return their hosts.

    Args:
        cluster_path: The cluster file.
        target: A folder that does not exist, or is empty: keys in use are not replaced.
        endpoints: NODE=HOST[:PORT] for each host that others reach.
        nodes: One node of each host; all nodes where there is none.
        network: The private addresses, as 10.87.0.0/24.

    Raises:
        InputError: Any of these is not as it should be, or a name cannot be one of a file.
        StorageError: The folder cannot be written.
    """
    names = [node.name for node in load_cluster(cluster_path).members()]
    for node in nodes:
        if node not in names:
            raise InputError(f"--node: {cluster_path} has no node {node!r}; {nearest(node, names)}")
    chosen = [name for name in names if not nodes or name in nodes]
    for name in chosen:
        if name.startswith(".") or "/" in name:
            raise InputError(f"{cluster_path}: a node named {name!r} can have no file of that name; rename it")
    given: dict[str, Endpoint] = {}
    for node, place in map(_split, endpoints):
        if node in given:
            raise InputError(f"--endpoint {node}={place}: {node} has one already; give one of them")
        given[node] = Endpoint.of(place)
    addresses = _network(network)
    hosts = vpn_hosts(chosen, given, addresses)
    check_unused(target)
    with new_directory(target) as folder:
        for host in hosts:
            write_atomically(folder / f"{host.name}.conf", configuration(host, hosts, addresses), private=True)
    return hosts


def _split(text: str) -> tuple[str, str]:
    node, equals, place = text.rpartition("=")  # a name may have one, too
    if not equals:
        raise InputError(f"--endpoint: {text!r} is not NODE=HOST[:PORT]")
    return node, place


def _network(text: str) -> IPv4Network:
    try:
        return IPv4Network(text)
    except ValueError as reason:
        raise InputError(f"--network: {reason}; give addresses as 10.87.0.0/24") from None
