"""All parsers that are fuzzed, by name."""

from collections.abc import Mapping

from simulations.fuzz.data import DATA
from simulations.fuzz.devices import DEVICES
from simulations.fuzz.doors import DOORS
from simulations.fuzz.network import NETWORK
from simulations.fuzz.operators import OPERATORS
from simulations.fuzz.parsers import Target

TARGETS: Mapping[str, Target] = {**NETWORK, **DOORS, **OPERATORS, **DEVICES, **DATA}
