"""``residual_norm`` as XLA runs it: the definition, whose means and sums it fuses into a few kernels."""

from pallas_kernels.residual_norm.reference import default_config, residual_norm, why_not

__all__ = ["default_config", "residual_norm", "why_not"]
