"""An export with its matrix products in eight bits or fewer: `vssm.quantize`."""
