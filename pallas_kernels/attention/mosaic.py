"""``attention`` by hand-written Mosaic GPU kernels: `mosaic_decode` for a few queries over a long cache.

No card has run it: it serves who asks for ``implementation="mosaic"``.
"""

from __future__ import annotations

from pallas_kernels.attention.mosaic_decode import Config, attention, default_config, why_not

__all__ = ["Config", "attention", "default_config", "why_not"]
