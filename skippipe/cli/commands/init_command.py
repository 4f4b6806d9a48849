"""`skippipe init`: a folder to begin with, and `skippipe vpn`: a private network of the hosts."""

import shlex
from pathlib import Path

import click

from skippipe.cli.user_path import UserPath

FIRST = "configs/experiments/tiny.yaml"


@click.command("init")
@click.argument("target", metavar="DIR", type=UserPath(file_okay=False))
def command(target: Path) -> None:
    """Write example experiments, cluster files and launch templates into DIR, as a start for your own.

    DIR may exist; files in it are never overwritten.
    """
    from skippipe.cli.starter.folder import write_starter

    num_files = len(write_starter(target))
    click.echo(
        f"{target}: {num_files} files\n"
        "  configs/experiments/  experiments: tiny.yaml to begin, three-regions.yaml\n"
        "  configs/clusters/     machines and links; describe or measure yours here\n"
        "  launch/               torchrun, SLURM, Kubernetes and SkyPilot\n"
        "Next:\n"
        f"  cd {shlex.quote(str(target))}\n"
        f"  skippipe plan --config {FIRST} --out runs/tiny/plan.json\n"
        f"  torchrun --nproc-per-node 4 -m skippipe train --config {FIRST}\n"
        "  skippipe report runs/tiny"
    )


@click.command("vpn")
@click.argument("cluster", type=UserPath())
@click.option("--out", "target", required=True, type=UserPath(file_okay=False), help="New folder for the files.")
@click.option(
    "--endpoint",
    "endpoints",
    multiple=True,
    metavar="NODE=HOST[:PORT]",
    help="Where others reach the host of a node by UDP; at least one has to be.",
)
@click.option("--node", "nodes", multiple=True, help="One node of each host, where a host has several; all by default.")
@click.option("--network", default="10.87.0.0/24", show_default=True, help="Private addresses that no host uses yet.")
def vpn(cluster: Path, target: Path, endpoints: tuple[str, ...], nodes: tuple[str, ...], network: str) -> None:
    """Write a WireGuard configuration for the host of each node in CLUSTER, with keys of its own.

    Hosts without an endpoint may be behind NAT. Every file holds a private key: bring it to its host over a connection
    that nobody reads, and delete it here.
    """
    from skippipe.cli.vpn_files import write_vpn

    hosts = write_vpn(cluster, target, endpoints, nodes, network)
    for host in hosts:
        click.echo(f"{target / host.name}.conf  {host.address}  {host.endpoint or 'no endpoint: behind NAT'}")
    click.echo(
        "On each host, as root:\n"
        "  install -m 600 NODE.conf /etc/wireguard/skippipe.conf\n"
        "  wg-quick up skippipe\n"
        f"Then train with GLOO_SOCKET_IFNAME=skippipe, and {hosts[0].address} as the address of the first host."
    )
