"""Options that say who does the work, and the workers that they ask for."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halfbyte.errors import UsageError

if TYPE_CHECKING:
    from halfbyte.types import Progress

Devices = Annotated[
    str | None,
    typer.Option("--devices", metavar="D,D", help="Solve on these devices, a process each: cuda:0,cuda:1."),
]
Count = Annotated[
    int | None, typer.Option("--workers", metavar="N", min=1, help="Solve in so many processes on the one device.")
]
Ray = Annotated[
    str | None,
    typer.Option("--ray", metavar="ADDRESS", help="Spread the work over Ray: local, or a cluster's address."),
]
RayWorkers = Annotated[
    int | None,
    typer.Option("--ray-workers", metavar="N", min=1, help="Workers of the cluster that local starts."),
]
RayResources = Annotated[
    list[str] | None,
    typer.Option(
        "--ray-resources",
        metavar="PLATFORM=RESOURCE",
        help="Judge cells on that platform, on nodes with that Ray resource. Repeatable.",
    ),
]


def ray_workers(
    address: str | None, count: int | None, resources: list[str] | None, device: str | None, progress: Progress
) -> AbstractContextManager[Any]:
    """What --ray, --ray-workers and --ray-resources ask for; a context without workers where there is no --ray."""
    platforms = _pairs(resources or [])
    if address is None:
        if count or platforms:
            raise UsageError("--ray-workers and --ray-resources belong to --ray local or --ray ADDRESS")
        return nullcontext()
    from halfbyte.experiments.fanout import LOCAL, RayWorkers
    from halfbyte.experiments.quantize import device_of

    if count and address != LOCAL:
        raise UsageError("--ray-workers belongs to --ray local: a cluster that is there has as many as it has room for")
    return RayWorkers(address, count, device_of(device), platforms, progress)


def solvers(
    devices: str | None,
    count: int | None,
    ray: str | None,
    of_ray: int | None,
    device: str | None,
    progress: Progress,
) -> AbstractContextManager[Any]:
    """What --devices, --workers and --ray ask for, one of them at most."""
    if sum(bool(given) for given in (devices, count, ray)) > 1:
        raise UsageError("--devices, --workers and --ray are three ways to the same: give one")
    if devices or count:
        from halfbyte.engine import Processes
        from halfbyte.experiments.quantize import device_of

        return Processes(device_list(devices) or [device_of(device)] * (count or 1), progress)
    return ray_workers(ray, of_ray, None, device, progress)


def device_list(devices: str | None) -> list[str]:
    """ "cuda:0,cuda:1" as a list; nothing where nothing is given."""
    names = [name.strip() for name in (devices or "").split(",")] if devices is not None else []
    if not all(names):
        raise UsageError(f"--devices {devices}: write them as cuda:0,cuda:1")
    return names


def _pairs(words: list[str]) -> dict[str, str]:
    pairs = {}
    for word in words:
        platform, equals, resource = (part.strip() for part in word.partition("="))
        if not (platform and equals and resource):
            raise UsageError(f"--ray-resources {word}: write it as h100=RESOURCE")
        pairs[platform] = resource
    return pairs
