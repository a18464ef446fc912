"""Trunk and head: the network."""

from ecar.network.cache import StageCache
from ecar.network.trunk import Trunk

__all__ = ["StageCache", "Trunk"]
