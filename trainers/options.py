"""Options that were added to a spec after content keys had been made of it."""

from collections.abc import Mapping
from types import MappingProxyType

LEFT_OUT_AT_DEFAULT = "left out of content keys at its default"

# Of a dataclass field: it enters a content key only where it is set, so that adding it orphaned no artifact.
# Its default must then never change.
ADDED: Mapping[str, bool] = MappingProxyType({LEFT_OUT_AT_DEFAULT: True})
