"""Proxies of the environment, which cannot reach this machine's loopback."""

import ipaddress

import httpx


def without_proxy(address: str) -> dict[str, None]:
    """`mounts` of an httpx client: overrides the environment's proxies for a loopback address.

    Raises:
        httpx.InvalidURL: the address is no URL.
    """
    host = httpx.URL(address).host
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost" or host.endswith(".localhost")
    return dict.fromkeys(("all://", "http://", "https://")) if loopback else {}
