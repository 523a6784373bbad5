"""What stands in for mamba_ssm, causal_conv1d, timm and the like."""
