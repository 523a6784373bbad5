"""The custom operators: table, oracle, rules, kernels, gradients."""
